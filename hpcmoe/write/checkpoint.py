"""The whole state by logical array, so that any number of ranks can go on: replaced whole, the last few kept."""

import contextlib
import logging
import os
import pathlib
import re
import shutil
import time

from hpcmoe.errors import CheckpointError, on_all, on_root, raise_or_return
from hpcmoe.write.hdf5 import raise_as_checkpoint_error
from hpcmoe.write.pieces import check_files, discard, read_pieces, run_tasks, write_in_tasks
from hpcmoe.write.verify import verify_master, verify_pieces

log = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = re.compile(r"checkpoint-\d+(\.old)?\.partial")


def save_checkpoint(comm, folder, step, pieces, facts, keep):
    """Write folder/checkpoint-STEP, then remove all but the last `keep`. Collective over comm.

    pieces: this rank's, which with the other ranks' tile each logical array; facts: a flat dict of strings, numbers
    and small arrays, as rank 0 has them. Raises CheckpointError on all ranks; earlier checkpoints then stay.
    """
    run_tasks(save_in_tasks(comm, folder, step, pieces, facts, keep))


def save_in_tasks(comm, folder, step, pieces, facts, keep):
    """Save as save_checkpoint does, by turns as write_in_tasks. Collective over comm."""
    started = time.monotonic()
    yield from write_in_tasks(comm, folder / f"checkpoint-{step}", pieces, facts)
    pruned = yield lambda: prune(folder, step, keep) if comm.rank == 0 else None
    on_all(comm, pruned)
    log.info("step %d: checkpoint written in %.2f s", step, time.monotonic() - started)


def load_checkpoint(comm, folder, wanted):
    """Read the parts this rank wants -> ({(name, start): array}, facts). Collective over comm.

    Any number of ranks may have written them. Raises CheckpointError on all ranks.
    """
    return read_pieces(comm, folder, wanted)


def read_metadata(folder: pathlib.Path) -> dict:
    """Read a checkpoint's facts alone, before anything is built or moved for it. Raises CheckpointError."""
    facts, _ = check_files(folder)
    return facts


def find_checkpoint(comm, where):
    """Find the checkpoint to resume, `where` itself or the newest in it, and verify it -> its path.

    Collective over comm. Raises CheckpointError on all ranks where there is none, or where it is not whole: then the
    line offers another.
    """

    def choose():
        with raise_as_checkpoint_error(where, "read"):
            return choose_checkpoint(pathlib.Path(where))

    found = on_root(comm, choose)
    try:
        verify_pieces(comm, found)
    except CheckpointError as error:
        offer = on_root(comm, lambda: suggest_another(found))
        raise_or_return(None, CheckpointError(f"{error}; {offer}"))
    return found


def suggest_another(path):
    """Say which checkpoint to resume in place of a damaged one: the last before it, else the first after it."""
    own = step_of(path)
    folder = path.parent if NAME.fullmatch(path.name) else path.resolve().parent
    others = list_checkpoints(folder)
    for step in sorted(others, key=lambda step: (step > own, abs(step - own))):
        with contextlib.suppress(CheckpointError):
            if step != own:
                verify_master(others[step])
                return f"the one {'before' if step < own else 'after'} it is there: --resume {others[step]}"
    return "there is no other that can be read"


def step_of(checkpoint):
    """Read the step in a checkpoint's name."""
    return int(NAME.fullmatch(checkpoint.resolve().name)[1])


def is_in_folder(checkpoint, folder):
    """Return True if a checkpoint is one of this folder's, whatever the links on the way."""
    with contextlib.suppress(ValueError):  # a name that no file can have
        return os.path.dirname(os.path.realpath(checkpoint)) == os.path.realpath(folder)
    return False


def choose_checkpoint(where):
    """Take a checkpoint's own path, or the newest in a run's folder."""
    if not where.is_dir():
        raise CheckpointError(f"{where}: no such folder, so no checkpoint to resume")
    found = where if NAME.fullmatch(where.resolve().name) else newest_checkpoint(where)
    if found is None:
        raise CheckpointError(f"{where}: no checkpoint to resume")
    return found


def newest_checkpoint(folder):
    """Find the finished checkpoint of the highest step -> its path, or None."""
    found = list_checkpoints(folder)
    return found[max(found)] if found else None


def list_checkpoints(folder):
    """List the finished checkpoints of a run's folder -> {step: path}."""
    paths = ((NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in paths if match}


def prune(folder, step, keep):
    """Remove the oldest checkpoints beyond `keep`, those of a course this run left, and what kills left behind."""
    found = list_checkpoints(folder)
    earlier = sorted(other for other in found if other <= step)
    later = [other for other in found if other > step]  # the run resumed from before them
    with raise_as_checkpoint_error(folder, "written"):
        for old in earlier[:-keep] + later:
            discard(found[old])
        for stale in folder.glob("checkpoint-*.partial"):
            if PARTIAL.fullmatch(stale.name):
                shutil.rmtree(stale)
