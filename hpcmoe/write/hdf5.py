"""HDF5 on this program's terms: facts that come back as they were, files replaced whole, refusals in one line."""

import contextlib
import os
import re
import shutil

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError

FAULTS = (OSError, RuntimeError, KeyError)  # h5py: RuntimeError where closing fails, KeyError where an entry is damaged


@contextlib.contextmanager
def one_line_faults(path, verb):
    """Turn the system's refusal inside the block into a CheckpointError: `path: cannot be {verb}: reason`."""
    try:
        yield
    except FAULTS as fault:
        raise CheckpointError(f"{path}: cannot be {verb}: {reason(fault)}") from fault


def reason(fault):
    """Name the system's reason for a fault in a few words; HDF5 hides the number in its text."""
    hidden = re.search(r"errno = (\d+)", str(fault))
    number = getattr(fault, "errno", None) or (hidden and int(hidden[1]))
    return os.strerror(number) if number else str(fault).partition("\n")[0]


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
def replaced(path):
    """Open a copy of an HDF5 file, or a new one; it takes the file's place when the block ends well.

    Whoever reads meanwhile, and whoever comes after a crash or on a full disk, finds the file as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    with one_line_faults(path, "written"):
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


def write_fact(group, name, value, unit=None):
    """Store an array, number, string, list of strings or dict of strings (as rows of key and value)."""
    rows = np.array([*value.items()], dtype=str).reshape(-1, 2) if isinstance(value, dict) else np.asarray(value)
    dtype = h5py.string_dtype() if rows.dtype.kind == "U" else rows.dtype
    dataset = group.create_dataset(name, data=rows.astype(dtype), dtype=dtype)
    if unit is not None:
        dataset.attrs["unit"] = unit


def read_fact(dataset):
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
