"""A run's folder: held by one run at a time and marked as this program's; earlier results move to NAME.1, NAME.2, ...

Nothing is deleted, and only what this program has written is moved: by name, in a folder that bears its mark or holds
files that can only be its own. A folder that is a link stays one; what is moved stays on the file system it points to.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import h5py
from mpi4py import MPI

from hpcmoe.errors import WAIT_FOR_ROOT_SECONDS, CheckpointError, ConfigError, on_all, on_root
from hpcmoe.interrupts import stop_repeating
from hpcmoe.reading import read_json
from hpcmoe.write.hdf5 import HDF5_ERRORS, describe_os_error, list_numbered
from hpcmoe.write.lock import Holder, acquire_lock, heartbeat, holds_lock, make_holder, release_lock
from hpcmoe.write.pieces import FILES, MASTER

MARK = "hpcmoe.json"
_RESULTS = re.compile(r"run\.h5(\.\d+|\.previous)?|(checkpoint|activations)-\d+")
_PARTIAL = re.compile(r"(run\.h5|(checkpoint|activations)-\d+(\.old)?)\.partial|topology\.json\.part")  # after a kill
_OTHERS = re.compile(
    rf"topology\.json|hf|report\.html|report-csv|log\.jsonl|tensorboard|trace\.json\.gz|{re.escape(MARK)}"
)
_FIRST_BYTES = 2000  # of a report, which name the program
_NUM_REMOVALS = 50  # tries, in a second, where another thread still writes
log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_folder(comm: MPI.Comm, output: str, name: str, resume: bool) -> Iterator[Path]:
    """Open the run's folder output/name -> its path, which every rank sees. Collective over comm, both ends.

    A fresh run first moves earlier results to NAME.1 and so on. Raises ConfigError where another run holds the folder,
    or it cannot be written or is not shared by all nodes, CheckpointError where there is nothing to resume.
    """
    folder = Path(output) / name
    own = on_root(comm, make_holder)
    try:
        on_root(comm, lambda: lock_folder(folder, output, name, resume, own))
        with heartbeat(folder, own) if comm.rank == 0 else contextlib.nullcontext():
            on_root(comm, lambda: prepare_folder(folder, output, name, resume))
            on_all(comm, lambda: check_shared_folder(folder, output))
            yield folder
    except BaseException as error:
        # Clean up on rank 0 after an error of all ranks, else on the rank that is about to abort the others.
        stop_repeating()
        if comm.rank > 0 and isinstance(error, KeyboardInterrupt):
            time.sleep(WAIT_FOR_ROOT_SECONDS)  # rank 0 may have had the signal too; else the others wait by then
        if (comm.rank == 0 or not getattr(error, "shared", False)) and holds_lock(folder, own):
            if (folder / MARK).exists():
                remove_partial(folder)
            release_lock(folder, own)
        raise
    if comm.rank == 0:
        release_lock(folder, own)


def lock_folder(folder: Path, output: str, name: str, resume: bool, own: Holder) -> None:
    """Make the folder, try to write there, and acquire its lock."""
    if name in ("", ".", "..") or "\0" in name or name != PurePath(name).name:
        raise ConfigError(f"[run] name = {name!r}: must be the plain name of a folder")
    with config_errors(folder, output):
        if resume and not folder.is_dir():
            raise CheckpointError(f"{folder}: no run to resume")

        # Make the folder, but not behind a link that leads nowhere.
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                link = f"{path} is a link to {os.readlink(path)}, which is not there"
                raise ConfigError(f"[run] output = {output!r}: {link}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)

        # Write a file: root has the permission, but a read-only or full disk still fails.
        with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))
        acquire_lock(folder, own)


def prepare_folder(folder: Path, output: str, name: str, resume: bool) -> None:
    """Move earlier results out of a fresh run's way, and mark the folder."""
    with config_errors(folder, output):
        if not resume:
            move_earlier_results(folder, name)
        if not resume or not (folder / MARK).exists():
            mark = {"program": "hpcmoe", "run": name, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            (folder / MARK).write_text(json.dumps(mark) + "\n")


@contextlib.contextmanager
def config_errors(folder: Path, output: str) -> Iterator[None]:
    """Convert the system's errors inside the block to a ConfigError."""
    try:
        yield
    except OSError as error:
        reason = describe_os_error(error)
        raise ConfigError(f"[run] output = {output!r}: {folder} cannot be written: {reason}") from None


def move_earlier_results(folder: Path, name: str) -> None:
    """Move the results of an earlier run to NAME.1, or the next free number; leave what is not a run's."""
    # Check that this program wrote them; a topology.json is copied from run to run, and proves nothing of results.
    left = [path for path in folder.iterdir() if has_run_name(path.name)]
    results = [path for path in left if _RESULTS.fullmatch(path.name)]
    proofs = [path for path in left if path in results or path.name == MARK] if results else left
    if left and not any(map(is_written_by_run, proofs)):
        raise ConfigError(
            f"[run] name = {name!r}: {folder} holds {left[0].name}, and nothing shows that hpcmoe wrote it; "
            "take another name, or move it"
        )
    remove_partial(folder)
    if not results:
        return  # it failed early

    # Move the mark last: a kill midway leaves two folders that are both known as runs.
    kept = [path for path in left if not _PARTIAL.fullmatch(path.name)]
    moved_to = move_all(sorted(kept, key=lambda path: path.name == MARK), folder)
    log.info("the run that was in %s is now in %s", folder, moved_to)


def move_all(paths: Sequence[Path], folder: Path) -> Path:
    """Move paths to a new folder NAME.N beside the real folder, or else inside it -> where they are."""
    real = folder.resolve()
    with contextlib.suppress(OSError):  # another's folder, or another file system: a mount, a quota of its own
        return move_to_numbered(paths, real)
    return move_to_numbered(paths, real / real.name)


def move_to_numbered(paths: Sequence[Path], path: Path) -> Path:
    """Move paths into a new folder PATH.N -> that; OSError, and no folder, where the system fails."""
    for numbered in list_numbered(path):
        with contextlib.suppress(FileExistsError):  # another run's, made meanwhile
            numbered.mkdir()
            break
    try:
        for each in paths:
            each.rename(numbered / each.name)
    except OSError:
        with contextlib.suppress(OSError):
            numbered.rmdir()
        raise
    return numbered


def has_run_name(name: str) -> bool:
    """Return True if a run's folder may hold a file or folder of that name."""
    return any(pattern.fullmatch(name) for pattern in (_RESULTS, _PARTIAL, _OTHERS))


def is_written_by_run(path: Path) -> bool:
    """Return True if a file or folder can only be a run's: the mark, or a result of runs before there was one."""
    with contextlib.suppress(*HDF5_ERRORS, ConfigError, ValueError, TypeError):  # whatever another program wrote
        match path.name:
            case _ if not (path.is_file() or path.is_dir()):
                return False  # reading a pipe would block
            case "hpcmoe.json":
                return dict(read_json(path)).get("program") == "hpcmoe"
            case "report.html":
                with path.open("rb") as page:
                    return b'content="hpcmoe ' in page.read(_FIRST_BYTES)
            case "topology.json":
                return "bytes_per_second" in dict(read_json(path))
            case "run.h5":
                with h5py.File(path) as file:
                    return len(file) == 0 or "config" in file.get("run", ())
        if path.is_dir():
            with h5py.File(path / MASTER) as master:
                return FILES in master
    return False


def remove_partial(folder: Path) -> None:
    """Remove what a kill or an interrupt left half written, though a thread may still write it."""
    for path in [path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name)]:
        for _ in range(_NUM_REMOVALS):
            with contextlib.suppress(OSError):
                if not path.is_symlink() and path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
            if not path.exists():
                break
            time.sleep(1 / _NUM_REMOVALS)


def check_shared_folder(folder: Path, output: str) -> None:
    """Check that the folder rank 0 made is here too."""
    if not folder.is_dir():
        raise ConfigError(f"[run] output = {output!r}: {folder} is not on a file system that all nodes share")
