"""HDF5 on this program's terms: facts that come back as they were, files replaced whole, refusals in one line."""

import contextlib
import errno
import itertools
import os
import re
import shutil

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError

HDF5_ERRORS = (
    OSError,
    RuntimeError,
    KeyError,
)  # h5py: RuntimeError where closing fails, KeyError where an entry is damaged

LOCKED = "another process, a viewer or another run, has it open"


@contextlib.contextmanager
def raise_as_checkpoint_error(path, verb):
    """Turn the system's refusal inside the block into a CheckpointError: `path: cannot be {verb}: reason`."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be {verb}: {describe_os_error(error)}") from error


def describe_os_error(error):
    """Name the system's reason for an error in a few words, and the cure where it is HDF5's lock on a file."""
    number = find_errno(error)
    if number is None:
        return str(error).partition("\n")[0]
    if "unable to lock file" not in str(error):
        return os.strerror(number)
    if number == errno.EAGAIN:
        return f"{LOCKED}: close it, or start with HDF5_USE_FILE_LOCKING=FALSE where nobody has it open"
    return f"{os.strerror(number)}: the file system refuses HDF5's lock; start with HDF5_USE_FILE_LOCKING=FALSE"


def is_system_error(error):
    """Return True if the system refused, not the file's content."""
    return find_errno(error) is not None


def find_errno(error):
    """Return the system's number of an error, or None; HDF5 hides it in its text."""
    hidden = re.search(r"errno = (\d+)", str(error))
    return getattr(error, "errno", None) or (int(hidden[1]) if hidden else None)


def open_unbuffered(path, create):
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
def open_replacement(path):
    """Open a copy of an HDF5 file, or a new one; it takes the file's place when the block ends well.

    Whoever reads meanwhile, and whoever comes after a crash or on a full disk, finds the file as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    with raise_as_checkpoint_error(path, "written"):
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


def free_name(path):
    """Find the first name of PATH.1, PATH.2, ... that is free."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in numbered if not name.exists())


def write_value(group, name, value, unit=None):
    """Store an array, number, string, list of strings or dict of strings (as rows of key and value)."""
    rows = np.array([*value.items()], dtype=str).reshape(-1, 2) if isinstance(value, dict) else np.asarray(value)
    dtype = h5py.string_dtype() if rows.dtype.kind == "U" else rows.dtype
    dataset = group.create_dataset(name, data=rows.astype(dtype), dtype=dtype)
    if unit is not None:
        dataset.attrs["unit"] = unit


def read_value(dataset):
    """Read back a fact -> str, int, float or bool where it is one value, else an array."""
    value = dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()]
    return value.item() if isinstance(value, np.generic) else value


def sync(path):
    """Have a file's or a folder's bytes on the disk itself before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
