"""Arrays that many ranks hold in pieces: one file per rank under a master that shows each array whole, or nothing."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI

from hpcmoe.errors import CheckpointError, on_all, on_root
from hpcmoe.replacing import make_empty, name_partial, publish_folder, sync
from hpcmoe.wait import barrier
from hpcmoe.write.boxes import HeldPiece, PieceSpec, check_tiling
from hpcmoe.write.checksums import compute_digest, write_checksums
from hpcmoe.write.hdf5 import Values, check_exists, checkpoint_errors, open_unbuffered, read_entry, write_entry
from hpcmoe.write.trust import check_file_names, check_stored, damage_errors, find_not_finite, list_datasets

log = logging.getLogger(__name__)
MASTER = "master.h5"  # holds a virtual dataset for each array, and besides them:
METADATA = "metadata"  # one value each
FILES = "files"  # name and bytes of each rank's file: a lost one would read as zeros
_METADATA_BEFORE = "facts"  # the group of 0.2 and earlier
OF_MASTER = tuple(f"{group}/" for group in (METADATA, _METADATA_BEFORE, FILES))  # all else is in the ranks' files

WriteTask = Callable[[], Any]  # needs no MPI: a thread may run it
WriteTasks = Generator[WriteTask, Any, None]  # yields tasks; is sent what returns a task's result, or raises its error
Arrays = dict[tuple[str, tuple[int, ...]], np.ndarray]  # by name and start


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """What one rank has written."""

    num_bytes: int  # 0 where it has no piece and needs no file
    digest: str
    specs: list[PieceSpec]


def write_pieces(comm: MPI.Comm, folder: Path, pieces: Sequence[HeldPiece], metadata: Values) -> None:
    """Write this rank's pieces and the metadata; the folder appears when all is on disk. Collective over comm.

    The pieces of all ranks must tile each array. metadata is a flat dict of strings, numbers and small arrays, as
    rank 0 has them. Where one rank fails all raise its CheckpointError, and no folder appears.
    """
    run_tasks(write_in_tasks(comm, folder, pieces, metadata))


def run_tasks(tasks: WriteTasks) -> None:
    """Run the tasks of write_in_tasks at once, in this thread. Collective over their comm."""
    task = None
    with contextlib.suppress(StopIteration):
        while True:
            task = tasks.send(task)


def write_in_tasks(comm: MPI.Comm, folder: Path, pieces: Sequence[HeldPiece], metadata: Values) -> WriteTasks:
    """Write as write_pieces does, and yield what needs no MPI as tasks. Collective over comm.

    Send back either the task itself, which then runs here, or the `result` of its future.
    """
    partial = name_partial(folder)
    held = list_filled(pieces)
    try:
        # Write one file per rank.
        on_root(comm, lambda: make_empty(partial))
        written = yield lambda: write_rank_file(partial / name_rank_file(comm.rank), held)
        num_bytes, digest = on_all(comm, written)
        barrier(comm)

        # Write the master on rank 0, and give the folder its name.
        own = RankFile(num_bytes=num_bytes, digest=digest, specs=[piece.spec for piece in pieces])
        files = comm.gather(own)
        published = yield lambda: publish(folder, partial, files, metadata) if files is not None else None
        on_all(comm, published)
    except CheckpointError:
        on_root(comm, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise


def read_pieces(comm: MPI.Comm, folder: Path, wanted: Sequence[PieceSpec]) -> tuple[Arrays, Values]:
    """Read the boxes this rank wants -> ({(name, start): array}, metadata). Collective over comm.

    Any number of ranks may have written them. Raises CheckpointError on all ranks where a file is missing or cut
    short, or an array is unknown or of another shape; verify_pieces finds what is altered.
    """
    arrays: Arrays = {}

    def keep(spec: PieceSpec, array: np.ndarray) -> None:
        """Keep one box."""
        arrays[spec.name, spec.start] = array

    metadata, _ = on_root(comm, lambda: check_files(folder))
    read_each(comm, folder, wanted, keep)
    return arrays, metadata


def read_each(
    comm: MPI.Comm, folder: Path, wanted: Sequence[PieceSpec], take: Callable[[PieceSpec, np.ndarray], None]
) -> None:
    """Read the boxes this rank wants, and hand each to take(spec, array) before the next. Collective over comm.

    Nothing is taken on any rank before each rank's boxes have been found with their shapes. Raises as read_pieces.
    """
    on_all(comm, lambda: check_wanted(folder, wanted))
    on_all(comm, lambda: read_boxes(folder, wanted, take))


def list_filled(pieces: Sequence[HeldPiece]) -> list[HeldPiece]:
    """List the pieces that hold anything."""
    return [piece for piece in pieces if math.prod(piece.spec.extent) > 0]


def name_rank_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank{rank:04d}.h5"


def write_rank_file(path: Path, pieces: Sequence[HeldPiece]) -> tuple[int, str]:
    """Write one rank's pieces -> (bytes, digest) of its file; without pieces it writes none."""
    if not pieces:
        return 0, ""
    with checkpoint_errors(path, "written"):
        with open_unbuffered(path, create=True) as file:
            for piece in pieces:
                file.create_dataset(piece.spec.source, data=piece.array)
        sync(path)
        return path.stat().st_size, compute_digest(path)


def publish(folder: Path, partial: Path, files: Sequence[RankFile], metadata: Values) -> None:
    """Write the master over the ranks' files and the list of checksums, then give the folder its name.

    It is renamed at the last moment: a folder of that name is of a course that this run left.
    """
    write_master(partial, files, metadata)
    publish_folder(partial, folder)


def write_master(folder: Path, files: Sequence[RankFile], metadata: Values) -> None:
    """Write the master over the ranks' files of a folder, and the list of checksums."""
    # Group the pieces by array, and check that they tile it.
    specs_of_name: dict[str, list[tuple[int, PieceSpec]]] = {}
    for rank, file in enumerate(files):
        for spec in file.specs:
            specs_of_name.setdefault(spec.name, []).append((rank, spec))
    for name, specs in specs_of_name.items():
        check_tiling(name, [spec for _, spec in specs])

    # Write the master, then the list of checksums.
    written = {name_rank_file(rank): file for rank, file in enumerate(files) if file.num_bytes > 0}
    with checkpoint_errors(folder / MASTER, "written"):
        with open_unbuffered(folder / MASTER, create=True) as master:
            for name, specs in specs_of_name.items():
                write_virtual(master, name, specs)
            for name, value in metadata.items():
                write_entry(master.require_group(METADATA), name, value)
            group = master.create_group(FILES)
            write_entry(group, "name", np.array([*written], dtype=str))
            write_entry(group, "bytes", np.array([file.num_bytes for file in written.values()], dtype=np.int64))
        sync(folder / MASTER)
    digests = {name: file.digest for name, file in written.items()}
    write_checksums(folder, {MASTER: compute_digest(folder / MASTER)} | digests)


def write_virtual(master: h5py.File, name: str, specs: Sequence[tuple[int, PieceSpec]]) -> None:
    """Write the dataset that shows the pieces [(rank, spec), ...] of an array as a whole."""
    _, whole = specs[0]
    if math.prod(whole.shape) == 0:
        master.create_dataset(name, whole.shape, whole.dtype)
        return
    layout = h5py.VirtualLayout(whole.shape, whole.dtype)
    for rank, spec in specs:
        if math.prod(spec.extent) > 0:
            layout[spec.box] = h5py.VirtualSource(name_rank_file(rank), spec.source, spec.extent, spec.dtype)
    master.create_virtual_dataset(name, layout)


def check_files(folder: Path) -> tuple[Values, dict[str, int]]:
    """Check that each rank's file is there with all its bytes -> (metadata, {name: bytes} of the ranks' files)."""
    path = folder / MASTER
    check_exists(path)
    with damage_errors(path), h5py.File(path) as master:
        if FILES not in master:
            raise CheckpointError(f"{path} is not one of this program's masters")
        values = {}
        for name, dataset in list_datasets(master, path):
            if name.startswith(OF_MASTER):
                check_stored(name, dataset, path)
                values[name] = dataset[()] if name == f"{FILES}/bytes" else read_entry(dataset)
    missing = [name for name in (f"{FILES}/name", f"{FILES}/bytes") if not isinstance(values.get(name), np.ndarray)]
    if missing or len(values[f"{FILES}/name"]) != len(values[f"{FILES}/bytes"]):
        raise CheckpointError(f"{path} is not one of this program's masters: its list of files is damaged")
    bytes_of_file = dict(zip(values[f"{FILES}/name"].tolist(), values[f"{FILES}/bytes"].tolist(), strict=True))
    check_file_names(bytes_of_file, path)
    for name, num_bytes in bytes_of_file.items():
        check_exists(folder / name)
        if (found := os.path.getsize(folder / name)) != num_bytes:
            raise CheckpointError(f"{folder / name} is {found} bytes, {num_bytes} were written")
    metadata = {name.partition("/")[2]: value for name, value in values.items() if not name.startswith(f"{FILES}/")}
    return metadata, bytes_of_file


def check_wanted(folder: Path, wanted: Sequence[PieceSpec]) -> None:
    """Check that the master has the arrays that are wanted."""
    path = folder / MASTER
    with damage_errors(path), h5py.File(path) as master:
        for spec in wanted:
            check_array(master, path, spec)


def read_boxes(folder: Path, wanted: Sequence[PieceSpec], take: Callable[[PieceSpec, np.ndarray], None]) -> None:
    """Read boxes from the master, each handed to take(spec, array)."""
    path = folder / MASTER
    with checkpoint_errors(path, "read"), h5py.File(path) as master:
        for spec in wanted:
            array = master[spec.name][spec.box]
            if find_not_finite(array):
                log.warning("%s: %s holds numbers that are not finite", path, spec.name)
            take(spec, array)


def check_array(master: h5py.File, path: Path, spec: PieceSpec) -> None:
    """Check that the master's array is the one wanted."""
    dataset = master.get(spec.name)
    if not isinstance(dataset, h5py.Dataset):
        raise CheckpointError(f"{path}: checkpoint has no {spec.name}, this model wants it {list(spec.shape)}")
    found = f"{path}: checkpoint has {spec.name}"
    if dataset.shape != spec.shape:
        sizes = zip(spec.keys, dataset.shape, spec.shape, strict=False)
        keys = ", ".join(key for key, has, wants in sizes if has != wants)
        wants = f"{list(dataset.shape)}, this model wants {list(spec.shape)}"
        raise CheckpointError(f"{found} {wants}" + (f": {keys}" if keys else ""))
    if spec.dtype and dataset.dtype.name != spec.dtype:
        raise CheckpointError(f"{found} as {dataset.dtype.name}, this model wants {spec.dtype}")
