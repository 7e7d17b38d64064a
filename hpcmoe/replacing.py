"""A folder that appears whole, or not at all: it is filled under another name, and renamed when all is on the disk."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hpcmoe.errors import CheckpointError
from hpcmoe.paths import expand_path

PARTIAL = ".partial"  # after the name of a folder that is being filled
OLD = ".old.partial"  # after the name of one that is about to go


@contextlib.contextmanager
def system_errors(path: Path, verb: str) -> Iterator[None]:
    """Convert the system's errors inside the block to a CheckpointError: `path: cannot be {verb}: reason`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CheckpointError(f"{path}: cannot be {verb}: {reason}") from error


def choose_target(folder: Path | str, call: str, own_files: re.Pattern[str], marks: tuple[str, ...]) -> Path:
    """Choose the folder that a call is to write -> absolute. Raises CheckpointError where it must not be replaced.

    own_files: the names that such a folder may have; marks: of which a whole one has one.
    """
    path = Path(expand_path(str(folder), call)).resolve()
    with system_errors(path, "written"):
        if path.name == "" or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path}: is no folder that a checkpoint can replace")
        names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in names if not own_files.fullmatch(name)]
    if foreign or (names and not set(marks) & set(names)):
        found = (foreign or names)[0]
        raise CheckpointError(f"{path}: holds {found}, so it is no checkpoint and is not replaced; choose another name")
    return path


def make_empty(folder: Path) -> None:
    """Make an empty folder, in place of what a killed run may have left. Raises CheckpointError."""
    with system_errors(folder, "written"):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def name_partial(folder: Path) -> Path:
    """Return the name under which a folder is filled."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename a folder whose files are on the disk to its name, in place of one that has it. Raises CheckpointError.

    A kill between the two renames leaves the other as FOLDER.old.partial.
    """
    with system_errors(folder, "written"):
        sync(partial)
        old = rename_old(folder) if folder.exists() else None
        partial.rename(folder)
        sync(folder.parent)
        if old is not None:
            shutil.rmtree(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill midway leaves none of its name."""
    if folder.exists():
        shutil.rmtree(rename_old(folder))


def rename_old(folder: Path) -> Path:
    """Rename a folder that is to be replaced or removed -> its name then."""
    old = folder.with_name(f"{folder.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    return old


def sync(path: Path) -> None:
    """Wait until the bytes of a file or folder are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
