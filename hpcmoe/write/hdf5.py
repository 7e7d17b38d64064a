"""HDF5 on this program's terms: values come back as they were, files are replaced whole, errors take one line."""

import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError

# h5py raises RuntimeError where closing fails, KeyError where an entry is damaged.
HDF5_ERRORS = (OSError, RuntimeError, KeyError)
_LOCKED = "another process, a viewer or another run, has it open"

Value = np.ndarray | str | int | float | bool | list | dict[str, str]
Values = Mapping[str, Any]  # such values by name


@contextlib.contextmanager
def checkpoint_errors(path: Path | str, verb: str) -> Iterator[None]:
    """Convert the system's errors inside the block to a CheckpointError: `path: cannot be {verb}: reason`."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be {verb}: {describe_os_error(error)}") from error


def describe_os_error(error: Exception) -> str:
    """Return the system's reason for an error in a few words, with the remedy where it is HDF5's lock on a file."""
    number = find_errno(error)
    if number is None:
        return str(error).partition("\n")[0]
    if "unable to lock file" not in str(error):
        return os.strerror(number)
    if number == errno.EAGAIN:
        return f"{_LOCKED}: close it, or start with HDF5_USE_FILE_LOCKING=FALSE where nobody has it open"
    return f"{os.strerror(number)}: the file system refuses HDF5's lock; start with HDF5_USE_FILE_LOCKING=FALSE"


def find_errno(error: BaseException | None) -> int | None:
    """Return the system's number of an error, which HDF5 hides in its text; None where the file's content is wrong."""
    hidden = re.search(r"errno = (\d+)", str(error))
    return getattr(error, "errno", None) or (int(hidden[1]) if hidden else None)


def check_exists(path: Path) -> None:
    """Raise CheckpointError where a file is missing."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")


def check_regular(path: Path | str) -> None:
    """Raise CheckpointError where a path leads to a folder, a pipe or a device, OSError where it leads nowhere."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path}: is no regular file")


def open_unbuffered(path: Path, create: bool) -> h5py.File:
    """Open an HDF5 file to write -> File, whose data goes to the system at once.

    With HDF5's own buffers a full disk shows only as a dataset is released: there h5py loses the error, and the
    process then crashes (seen with h5py 3.16, HDF5 2.0).
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_sieve_buf_size(0)
    access.set_cache(0, 0, 0, 0.0)  # of chunks; metadata stays cached, and is written as the file closes
    name = os.fsencode(path)
    if create:
        return h5py.File(h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, fapl=access))
    return h5py.File(h5py.h5f.open(name, h5py.h5f.ACC_RDWR, fapl=access))


@contextlib.contextmanager
def open_replacement(path: Path) -> Iterator[h5py.File]:
    """Open a copy of an HDF5 file, or a new one; it replaces the file when the block ends without an error.

    A concurrent reader, and whoever comes after a crash or on a full disk, finds the file as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    with checkpoint_errors(path, "written"):
        try:
            create = not path.exists()
            if not create:
                shutil.copyfile(path, partial)
            with open_unbuffered(partial, create) as file:
                yield file
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def list_numbered(path: Path) -> Iterator[Path]:
    """Yield the free names PATH.N, N from the number after the highest that there is."""
    pattern = re.compile(rf"{re.escape(path.name)}\.(\d{{1,9}})")
    used = [int(match[1]) for match in map(pattern.fullmatch, os.listdir(path.parent)) if match]
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1 + max(used, default=0)))
    return (name for name in numbered if not os.path.lexists(name))


def write_entry(group: h5py.Group, name: str, value: Value, unit: str | None = None) -> None:
    """Write an array, number, string, list of strings or dict of strings (as rows of key and value)."""
    rows = np.array([*value.items()], dtype=str).reshape(-1, 2) if isinstance(value, dict) else np.asarray(value)
    dtype = h5py.string_dtype() if rows.dtype.kind == "U" else rows.dtype
    dataset = group.create_dataset(name, data=rows.astype(dtype), dtype=dtype)
    if unit is not None:
        dataset.attrs["unit"] = unit


def read_entry(dataset: h5py.Dataset) -> Any:
    """Read what write_entry wrote -> str, int, float or bool where it is one value, else an array."""
    value = dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()]
    return value.item() if isinstance(value, np.generic) else value
