"""The whole state by logical array, so that any number of ranks can go on: replaced whole, the last few kept."""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from mpi4py import MPI

from hpcmoe.errors import CheckpointError, on_all, on_root, raise_or_return
from hpcmoe.replacing import remove_folder
from hpcmoe.write.boxes import HeldPiece
from hpcmoe.write.checksums import check_checksum, read_checksums
from hpcmoe.write.hdf5 import Values, checkpoint_errors
from hpcmoe.write.pieces import MASTER, OF_MASTER, WriteTasks, check_files, write_in_tasks
from hpcmoe.write.steps import CHECKPOINT_NAME, list_checkpoints, newest_checkpoint, step_of
from hpcmoe.write.trust import check_pieces, find_pieces

log = logging.getLogger(__name__)
_PARTIAL = re.compile(r"checkpoint-\d+(\.old)?\.partial")


def save_checkpoint(
    comm: MPI.Comm, folder: Path, step: int, pieces: Sequence[HeldPiece], metadata: Values, keep: int
) -> WriteTasks:
    """Write folder/checkpoint-STEP, then remove all but the last `keep`, in tasks. Collective over comm.

    pieces: this rank's, which with the other ranks' tile each logical array; metadata: a flat dict of strings, numbers
    and small arrays, as rank 0 has them. Raises CheckpointError on all ranks; earlier checkpoints then stay.
    pieces.run_tasks runs the tasks, pieces.read_pieces reads the checkpoint.
    """
    started = time.monotonic()
    yield from write_in_tasks(comm, folder / f"checkpoint-{step}", pieces, metadata)
    pruned = yield lambda: prune(folder, step, keep) if comm.rank == 0 else None
    on_all(comm, pruned)
    log.info("step %d: checkpoint written in %.2f s", step, time.monotonic() - started)


def read_metadata(folder: Path) -> Values:
    """Read a checkpoint's metadata alone, before anything is built or moved for it. Raises CheckpointError."""
    metadata, _ = check_files(folder)
    return metadata


def find_checkpoint(comm: MPI.Comm, where: Path | str) -> Path:
    """Find the checkpoint to resume, `where` itself or the newest in it, and verify it -> its path.

    Collective over comm. Raises CheckpointError on all ranks where there is none, or where it is not whole: then the
    line suggests another.
    """
    found = on_root(comm, lambda: choose_checkpoint(Path(where)))
    try:
        verify_pieces(comm, found)
    except CheckpointError as error:
        suggestion = on_root(comm, lambda: suggest_another(found))
        raise_or_return(None, CheckpointError(f"{error}; {suggestion}"))
    return found


def verify_pieces(comm: MPI.Comm, folder: Path) -> None:
    """Check that each file of a folder that write_pieces wrote is there, whole, unaltered and its own. Collective.

    Raises CheckpointError on all ranks: one line that names a file and what is wrong with it.
    """

    def check_own() -> None:
        for name in names[comm.rank :: comm.size]:
            check_checksum(folder / name, digest_of_name)
            check_pieces(folder / name, pieces[name])

    digest_of_name, names = on_root(comm, lambda: verify_master(folder))
    pieces = on_root(comm, lambda: find_pieces(folder / MASTER, dict.fromkeys(names, 0), OF_MASTER))
    on_all(comm, check_own)


def verify_master(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Check the list of checksums and the master -> (digest by name, names of the ranks' files, the largest first)."""
    digest_of_name = read_checksums(folder)
    check_checksum(folder / MASTER, digest_of_name)  # before HDF5 reads it
    _, bytes_of_file = check_files(folder)
    return digest_of_name, sorted(bytes_of_file, key=lambda name: bytes_of_file[name], reverse=True)


def suggest_another(path: Path) -> str:
    """Find a checkpoint to resume in place of a damaged one: the last before it, else the first after it."""
    own = step_of(path)
    folder = path.parent if CHECKPOINT_NAME.fullmatch(path.name) else path.resolve().parent
    others = list_checkpoints(folder)
    for step in sorted(others, key=lambda step: (step > own, abs(step - own))):
        with contextlib.suppress(CheckpointError):
            if step != own:
                verify_master(others[step])
                return f"the one {'before' if step < own else 'after'} it is there: --resume {others[step]}"
    return "there is no other that can be read"


def choose_checkpoint(where: Path) -> Path:
    """Choose a checkpoint's own path, or the newest in a run's folder."""
    with checkpoint_errors(where, "read"):
        if not where.is_dir():
            raise CheckpointError(f"{where}: no such folder, so no checkpoint to resume")
        found = where if CHECKPOINT_NAME.fullmatch(where.resolve().name) else newest_checkpoint(where)
    if found is None:
        raise CheckpointError(f"{where}: no checkpoint to resume")
    return found


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`, those of a course this run left, and what kills left behind."""
    found = list_checkpoints(folder)
    earlier = sorted(other for other in found if other <= step)
    later = [other for other in found if other > step]  # the run resumed from before them
    with checkpoint_errors(folder, "written"):
        for old in earlier[:-keep] + later:
            remove_folder(found[old])
        for stale in folder.glob("checkpoint-*.partial"):
            if _PARTIAL.fullmatch(stale.name):
                shutil.rmtree(stale)
