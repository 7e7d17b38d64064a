"""A run's folder: held by one run at a time and marked as this program's; what an earlier run left moves to NAME.1, ...

Nothing is deleted, and only what this program has written is moved: by name, in a folder that bears its mark or holds
files that can only be its own. A folder that is a link stays one; what is moved stays on the file system it points to.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time

import h5py

from hpcmoe.errors import WAIT_FOR_ROOT_SECONDS, CheckpointError, ConfigError, on_all, on_root
from hpcmoe.interrupts import stop_repeating
from hpcmoe.write.hdf5 import HDF5_ERRORS, describe_os_error
from hpcmoe.write.lock import acquire_lock, heartbeat, holds_lock, make_holder, release_lock
from hpcmoe.write.pieces import FILES, MASTER

MARK = "hpcmoe.json"
RESULTS = re.compile(r"run\.h5(\.\d+|\.previous)?|(checkpoint|activations)-\d+")
# What a kill leaves half done.
LEFTOVERS = re.compile(r"(run\.h5|(checkpoint|activations)-\d+(\.old)?)\.partial|topology\.json\.part")
OTHERS = re.compile(rf"topology\.json|{re.escape(MARK)}")
SWEEPS = 50  # tries, in a second, where another thread still writes
log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_folder(comm, output: str, name: str, resume: bool):
    """Open the run's folder output/name -> its path, which every rank sees. Collective over comm, both ends.

    A fresh run first moves what an earlier one left there to NAME.1 and so on. Raises ConfigError where another run
    holds it, or it cannot be written or is not shared by all nodes, CheckpointError where there is nothing to resume.
    """
    folder = pathlib.Path(output) / name
    own = on_root(comm, make_holder)
    try:
        on_root(comm, lambda: lock_folder(folder, output, name, resume, own))
        with heartbeat(folder, own) if comm.rank == 0 else contextlib.nullcontext():
            on_root(comm, lambda: prepare_folder(folder, output, name, resume))
            on_all(comm, lambda: check_shared_folder(folder, output))
            yield folder
    except BaseException as error:
        # An error of all ranks is rank 0's to tidy up after; one of this rank alone is about to take the others down.
        stop_repeating()
        if comm.rank > 0 and isinstance(error, KeyboardInterrupt):
            time.sleep(
                WAIT_FOR_ROOT_SECONDS
            )  # rank 0 may have had the signal too; else the others now wait, and write no more
        if (comm.rank == 0 or not getattr(error, "shared", False)) and holds_lock(folder, own):
            if (folder / MARK).exists():
                sweep(folder)
            release_lock(folder, own)
        raise
    if comm.rank == 0:
        release_lock(folder, own)


def lock_folder(folder, output, name, resume, own):
    """Make the folder, try to write there, and take its lock."""
    if name in ("", ".", "..") or "\0" in name or name != pathlib.PurePath(name).name:
        raise ConfigError(f"[run] name = {name!r}: must be the plain name of a folder")
    with raise_as_config_error(folder, output):
        if resume and not folder.is_dir():
            raise CheckpointError(f"{folder}: no run to resume")
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                raise ConfigError(
                    f"[run] output = {output!r}: {path} is a link to {os.readlink(path)}, which is not there"
                )
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        # Try it: root is let in by permissions that a read-only or full disk then belies.
        with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))
        acquire_lock(folder, own)


def prepare_folder(folder, output, name, resume):
    """Make room for a fresh run, and mark the folder."""
    with raise_as_config_error(folder, output):
        if not resume:
            move_earlier_results(folder, name)
        if not resume or not (folder / MARK).exists():
            mark = {"program": "hpcmoe", "run": name, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            (folder / MARK).write_text(json.dumps(mark) + "\n")


@contextlib.contextmanager
def raise_as_config_error(folder, output):
    """Turn the system's refusal inside the block into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"[run] output = {output!r}: {folder} cannot be written: {describe_os_error(error)}"
        ) from None


def move_earlier_results(folder, name):
    """Move the results of an earlier run to NAME.1, or the next free number; leave what is not a run's."""
    left = [path for path in folder.iterdir() if is_named_as_ours(path.name)]
    results = [path for path in left if RESULTS.fullmatch(path.name)]
    shown = [path for path in left if path in results or path.name == MARK] if results else left
    if left and not any(map(is_ours, shown)):  # measured links are given from run to run, and show nothing of results
        raise ConfigError(
            f"[run] name = {name!r}: {folder} holds {left[0].name}, and nothing shows that hpcmoe wrote it; "
            "take another name, or move it"
        )
    sweep(folder)
    if not results:
        return  # it failed early

    # The mark goes last: a kill midway leaves two folders that are both known as runs.
    kept = [path for path in left if not LEFTOVERS.fullmatch(path.name)]
    aside = move_all(sorted(kept, key=lambda path: path.name == MARK), folder)
    log.info("the run that was in %s is now in %s", folder, aside)


def move_all(paths, folder):
    """Move paths to a new folder NAME.N beside the real folder, or else inside it -> where they are."""
    real = folder.resolve()
    with contextlib.suppress(OSError):  # another's folder, or another file system: a mount, a quota of its own
        return move_to(paths, make_numbered(real))
    return move_to(paths, make_numbered(real / real.name))


def move_to(paths, aside):
    """Move paths into an empty folder -> the folder; OSError, and no folder, where the system refuses."""
    try:
        for path in paths:
            path.rename(aside / path.name)
    except OSError:
        with contextlib.suppress(OSError):
            aside.rmdir()
        raise
    return aside


def make_numbered(path):
    """Make the folder PATH.1, or of the number after the highest there is -> its path."""
    number = 1 + max(list_numbers(path), default=0)
    while True:
        numbered = path.with_name(f"{path.name}.{number}")
        try:
            numbered.mkdir()
            return numbered
        except FileExistsError:  # another run's, made meanwhile
            number += 1


def list_numbers(path):
    """List the N of all PATH.N that there are."""
    pattern = re.compile(rf"{re.escape(path.name)}\.(\d{{1,9}})")
    return [int(match[1]) for match in map(pattern.fullmatch, os.listdir(path.parent)) if match]


def is_named_as_ours(name):
    """Return True if a run's folder may hold such a file or folder."""
    return any(pattern.fullmatch(name) for pattern in (RESULTS, LEFTOVERS, OTHERS))


def is_ours(path):
    """Return True if a file or folder shows that a run wrote it: the mark, or as runs without one left them."""
    with contextlib.suppress(*HDF5_ERRORS, ValueError, TypeError, RecursionError):  # whatever another program wrote
        match path.name:
            case _ if not (path.is_file() or path.is_dir()):
                return False  # a pipe would be waited for
            case "hpcmoe.json":
                return dict(json.loads(path.read_text())).get("program") == "hpcmoe"
            case "topology.json":
                return "bytes_per_second" in dict(json.loads(path.read_text()))
            case "run.h5":
                with h5py.File(path) as file:
                    return len(file) == 0 or "config" in file.get("run", ())
        if path.is_dir():
            with h5py.File(path / MASTER) as master:
                return FILES in master
    return False


def sweep(folder):
    """Remove what a kill or an interrupt left half written, though a thread may still be at it."""
    for path in [path for path in folder.iterdir() if LEFTOVERS.fullmatch(path.name)]:
        for _ in range(SWEEPS):
            with contextlib.suppress(OSError):
                if not path.is_symlink() and path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
            if not path.exists():
                break
            time.sleep(1 / SWEEPS)


def check_shared_folder(folder, output):
    """Check that the folder rank 0 made is here too."""
    if not folder.is_dir():
        raise ConfigError(f"[run] output = {output!r}: {folder} is not on a file system that all nodes share")
