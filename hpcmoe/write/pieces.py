"""Arrays that many ranks hold in pieces: one file a rank under a master that shows each whole, or nothing at all."""

import contextlib
import math
import os
import shutil
from dataclasses import dataclass

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError, on_all, on_root
from hpcmoe.wait import barrier
from hpcmoe.write.checksums import compute_digest, write_checksums
from hpcmoe.write.hdf5 import open_unbuffered, raise_as_checkpoint_error, read_value, sync, write_value

MASTER = "master.h5"  # holds a virtual dataset for each array, and besides them:
FACTS = "facts"  # one value each
FILES = "files"  # name and bytes of each rank's file: a lost one would read as zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceSpec:
    """A box of a logical array, which a rank holds or wants."""

    name: str  # HDF5 path of the array, at least one axis; not under facts/ or files/
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]  # where the box begins
    extent: tuple[int, ...]  # how far it goes along each axis
    dtype: str = ""  # NumPy's name; empty: any
    keys: tuple[str, ...] = ()  # of the config, axis by axis, to be named where the shape differs

    @property
    def box(self):
        """The index of this part in the whole array."""
        return tuple(slice(first, first + count) for first, count in zip(self.start, self.extent, strict=True))

    @property
    def source(self):
        """The path of this part in the file of the rank that holds it."""
        return f"{self.name}/{'.'.join(map(str, self.start))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """This rank's piece of a logical array."""

    name: str  # HDF5 path of the array
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]  # where the piece begins in it
    array: np.ndarray

    @property
    def part(self):
        """Where the piece lies, without its data."""
        extent = self.array.shape
        return PieceSpec(name=self.name, shape=self.shape, start=self.start, extent=extent, dtype=self.array.dtype.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """What one rank has written."""

    num_bytes: int  # 0 where it has no piece and needs no file
    digest: str
    parts: list[PieceSpec]


def write_pieces(comm, folder, pieces, facts):
    """Write this rank's pieces and the facts; the folder appears when all is on disk. Collective over comm.

    The pieces of all ranks must tile each array. facts is a flat dict of strings, numbers and small arrays, as
    rank 0 has them. Where one rank fails all raise its CheckpointError, and no folder appears.
    """
    run_tasks(write_in_tasks(comm, folder, pieces, facts))


def run_tasks(turns):
    """Go through the turns of some writing on the spot. Collective as they are."""
    work = None
    with contextlib.suppress(StopIteration):
        while True:
            work = turns.send(work)


def write_in_tasks(comm, folder, pieces, facts):
    """Write as write_pieces does, and yield as functions what needs no MPI: a thread may do it. Collective over comm.

    What tells how a function ended is to be sent back: the function itself, which then does its work, or its future's
    result.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    held = [piece for piece in pieces if piece.array.size > 0]
    try:
        on_root(comm, lambda: make_empty(partial))
        written = yield lambda: write_rank_file(partial / name_file(comm.rank), held)
        num_bytes, digest = on_all(comm, written)
        barrier(comm)
        own = RankFile(num_bytes=num_bytes, digest=digest, parts=[piece.part for piece in pieces])
        files = comm.gather(own)
        finished = yield lambda: finish(folder, partial, files, facts) if comm.rank == 0 else None
        on_all(comm, finished)
    except CheckpointError:
        on_root(comm, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise


def read_pieces(comm, folder, wanted):
    """Read the parts this rank wants, whoever wrote them -> ({(name, start): array}, facts). Collective over comm.

    Raises CheckpointError where a file is missing or cut short, or an array is unknown or of another shape;
    verify_pieces finds what is altered.
    """
    facts, _ = on_root(comm, lambda: check_files(folder))
    return on_all(comm, lambda: read_specs(folder, wanted)), facts


def name_file(rank):
    """Name the file of a rank."""
    return f"rank{rank:04d}.h5"


def make_empty(folder):
    """Make an empty folder, in place of what a killed run may have left."""
    with raise_as_checkpoint_error(folder, "written"):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def write_rank_file(path, pieces):
    """Write one rank's pieces -> (bytes, digest) of its file; without pieces it writes none."""
    if not pieces:
        return 0, ""
    with raise_as_checkpoint_error(path, "written"):
        with open_unbuffered(path, create=True) as file:
            for piece in pieces:
                file.create_dataset(piece.part.source, data=piece.array)
        sync(path)
        return path.stat().st_size, compute_digest(path)


def finish(folder, partial, files, facts):
    """Write the master over the files [ranks] and the list of checksums, then give the folder its name."""
    parts_of_name = group_by_name(files)
    for name, parts in parts_of_name.items():
        check_tiling(name, [part for _, part in parts])

    with raise_as_checkpoint_error(partial / MASTER, "written"):
        with open_unbuffered(partial / MASTER, create=True) as master:
            for name, parts in parts_of_name.items():
                write_virtual(master, name, parts)
            for name, value in facts.items():
                write_value(master.require_group(FACTS), name, value)
            write_files(master.create_group(FILES), files)
        sync(partial / MASTER)
    digests = {name_file(rank): file.digest for rank, file in enumerate(files) if file.num_bytes > 0}
    write_checksums(partial, {MASTER: compute_digest(partial / MASTER)} | digests)

    # A folder of that name is of an earlier course of the run: it goes at the last moment.
    with raise_as_checkpoint_error(folder, "written"):
        sync(partial)
        discard(folder)
        partial.rename(folder)
        sync(folder.parent)


def discard(folder):
    """Remove a folder so that a kill midway leaves none of its name."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.old.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def group_by_name(files):
    """Sort all ranks' parts by array -> {name: [(rank, part), ...]}."""
    parts_of_name = {}
    for rank, file in enumerate(files):
        for part in file.parts:
            parts_of_name.setdefault(part.name, []).append((rank, part))
    return parts_of_name


def check_tiling(name, parts):
    """Check that parts make one array whole: one shape and dtype, within bounds, no two alike, none missing."""
    kinds = sorted({(part.shape, part.dtype) for part in parts})
    if len(kinds) > 1:
        seen = " and ".join(f"{dtype} {list(shape)}" for shape, dtype in kinds)
        raise CheckpointError(f"pieces of {name} disagree on the whole: {seen}")

    shape = kinds[0][0]
    for part in parts:
        if not all(0 <= side.start <= side.stop <= size for side, size in zip(part.box, shape, strict=True)):
            raise CheckpointError(f"piece of {name} {list(shape)} lies outside: {part.extent} from {part.start}")
    filled = [part for part in parts if math.prod(part.extent) > 0]
    twice = len(filled) - len({part.start for part in filled})
    held, size = sum(math.prod(part.extent) for part in filled), math.prod(shape)
    if twice or held != size:
        raise CheckpointError(f"pieces of {name} {list(shape)} hold {held} of {size} elements, {twice} pieces twice")


def write_virtual(master, name, parts):
    """Write the dataset that shows the parts [(rank, part), ...] of an array as a whole."""
    _, whole = parts[0]
    if math.prod(whole.shape) == 0:
        master.create_dataset(name, whole.shape, whole.dtype)
        return
    layout = h5py.VirtualLayout(whole.shape, whole.dtype)
    for rank, part in parts:
        if math.prod(part.extent) > 0:
            layout[part.box] = h5py.VirtualSource(name_file(rank), part.source, part.extent, part.dtype)
    master.create_virtual_dataset(name, layout)


def write_files(group, files):
    """Record each rank's file and its size."""
    bytes_of_file = {name_file(rank): file.num_bytes for rank, file in enumerate(files) if file.num_bytes > 0}
    write_value(group, "name", np.array([*bytes_of_file], dtype=str))
    write_value(group, "bytes", np.array([*bytes_of_file.values()], dtype=np.int64))


def check_files(folder):
    """Check that each rank's file is there with all its bytes -> (the facts, {name: bytes} of the ranks' files)."""
    path = folder / MASTER
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    with raise_as_checkpoint_error(path, "read"), h5py.File(path) as master:
        if FILES not in master:
            raise CheckpointError(f"{path} is not one of this program's masters")
        names, sizes = (read_value(master[FILES][what]).tolist() for what in ("name", "bytes"))
        for name, num_bytes in zip(names, sizes, strict=True):
            check_size(folder / name, num_bytes)
        facts = {name: read_value(dataset) for name, dataset in master.get(FACTS, {}).items()}
        return facts, dict(zip(names, sizes, strict=True))


def check_size(path, num_bytes):
    """Check that a file is there with all its bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if os.path.getsize(path) != num_bytes:
        raise CheckpointError(f"{path} is {os.path.getsize(path)} bytes, {num_bytes} were written")


def read_specs(folder, wanted):
    """Read parts from the master -> {(name, start): array}."""
    path = folder / MASTER
    with raise_as_checkpoint_error(path, "read"), h5py.File(path) as master:
        for part in wanted:
            check_spec(master, path, part)
        return {(part.name, part.start): master[part.name][part.box] for part in wanted}


def check_spec(master, path, part):
    """Check that the master's array is the one wanted."""
    if not isinstance(master.get(part.name), h5py.Dataset):
        raise CheckpointError(f"{path}: checkpoint has no {part.name}, this model wants it {list(part.shape)}")
    dataset = master[part.name]
    if dataset.shape != part.shape:
        sizes = zip(part.keys, dataset.shape, part.shape, strict=False)
        keys = [key for key, has, wants in sizes if has != wants]
        raise CheckpointError(
            f"{path}: checkpoint has {part.name} {list(dataset.shape)}, this model wants {list(part.shape)}"
            + (f": {', '.join(keys)}" if keys else "")
        )
    if part.dtype and dataset.dtype.name != part.dtype:
        raise CheckpointError(
            f"{path}: checkpoint has {part.name} as {dataset.dtype.name}, this model wants {part.dtype}"
        )
