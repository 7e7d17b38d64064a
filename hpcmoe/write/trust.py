"""What an HDF5 file of ours may hold: its own numbers, in its own folder. Checksums tell what was written, not by whom.

HDF5 follows links into other files, reads arrays from any file that they name, fills in what was never written, and
loads filters by plug-ins. Nothing of that is read here, and nothing larger than the file is allocated. The object
references that tie the scales of run.h5 to its axes are attributes: no reader follows one, and a dataset of them is
refused, as all that holds neither numbers nor texts.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError
from hpcmoe.messages import one_line
from hpcmoe.write.boxes import PieceSpec, check_tiling
from hpcmoe.write.hdf5 import HDF5_ERRORS, check_regular, checkpoint_errors

_RANK_FILE = re.compile(r"rank\d{4,}\.h5")
_NUMBERS = "fiub"  # NumPy's kinds
_MOST_LEVELS = 64  # of groups
# What h5py raises besides HDF5's own errors where a file is not what it says.
_DAMAGES = (*HDF5_ERRORS, ValueError, TypeError, AttributeError, IndexError, OverflowError, MemoryError, RecursionError)


@contextlib.contextmanager
def damage_errors(path: Path | str) -> Iterator[None]:
    """Convert whatever reading a damaged file raises inside the block to a CheckpointError of one line.

    Raises it at once where something else than a file is there: HDF5 would wait for a pipe for ever.
    """
    with checkpoint_errors(path, "read"):
        check_regular(path)
        try:
            yield
        except HDF5_ERRORS:
            raise
        except _DAMAGES as error:
            raise CheckpointError(f"{path}: is damaged: {one_line(error)}") from error


def list_datasets(group: h5py.Group, path: Path, level: int = 0) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield (path within the file, dataset) of all that a file holds. Raises CheckpointError for a link."""
    if level > _MOST_LEVELS:
        raise CheckpointError(f"{path}: {one_line(group.name)}: groups lie in each other without end")
    for name in group:
        where = f"{group.name.rstrip('/')}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise CheckpointError(f"{path}: {one_line(where)} is a link to elsewhere, which is not followed")
        entry = group[name]
        if isinstance(entry, h5py.Group):
            yield from list_datasets(entry, path, level + 1)
        elif isinstance(entry, h5py.Dataset):
            yield where.lstrip("/"), entry
        else:
            raise CheckpointError(f"{path}: {one_line(where)} is no array")


def check_stored(name: str, dataset: h5py.Dataset, path: Path) -> None:
    """Check that a dataset's numbers or texts are all in its own file, as they are. Raises CheckpointError."""
    what, plist = f"{path}: {one_line(name)}", dataset.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise CheckpointError(f"{what} has its numbers in another file, which is not read")
    if plist.get_nfilters():
        raise CheckpointError(f"{what} is filtered, which no file of this program is")
    if dataset.dtype.kind not in _NUMBERS and h5py.check_string_dtype(dataset.dtype) is None:
        raise CheckpointError(f"{what} is of dtype {one_line(dataset.dtype)}: must be numbers or texts")
    if dataset.shape is None:
        raise CheckpointError(f"{what} is empty")
    num_bytes = math.prod(dataset.shape) * dataset.dtype.itemsize
    if num_bytes > path.stat().st_size or dataset.id.get_storage_size() < num_bytes:
        raise CheckpointError(f"{what} {list(dataset.shape)}: {num_bytes} bytes, more than its file holds of it")


def find_own(file: h5py.Group, name: str, path: Path | str) -> h5py.Dataset | None:
    """Find a dataset that is in a file itself, None where there is none. Raises CheckpointError for a link."""
    entry: h5py.Group | h5py.Dataset = file
    for part in name.split("/"):
        if not isinstance(entry, h5py.Group) or part not in entry:
            return None
        if not isinstance(entry.get(part, getlink=True), h5py.HardLink):
            raise CheckpointError(f"{path}: {name} is a link to elsewhere, which is not followed")
        entry = entry[part]
    if not isinstance(entry, h5py.Dataset):
        return None
    check_stored(name, entry, Path(path))
    return entry


def check_file_names(names: Mapping[str, int], path: Path) -> None:
    """Check that the names of the ranks' files are such, so that none lies in another folder."""
    for name in names:
        if not _RANK_FILE.fullmatch(name):
            raise CheckpointError(f"{path}: {one_line(repr(name))} is no name of a rank's file")


def list_sources_of(dataset: h5py.Dataset, name: str, path: Path) -> Iterator[tuple[str, PieceSpec]]:
    """Yield (file, piece) of a dataset that is put together from ranks' files."""
    what, plist = f"{path}: {one_line(name)}", dataset.id.get_create_plist()
    if plist.get_external_count() or plist.get_nfilters() or dataset.dtype.kind not in _NUMBERS:
        raise CheckpointError(f"{what} is no array of ranks' numbers")
    if plist.get_layout() != h5py.h5d.VIRTUAL:
        if math.prod(dataset.shape):
            raise CheckpointError(f"{what} is not in the ranks' files")
        return
    for number in range(plist.get_virtual_count()):
        space = plist.get_virtual_vspace(number)
        low, high = space.get_select_bounds()
        extent = tuple(int(last - first + 1) for first, last in zip(low, high, strict=True))
        spec = PieceSpec(
            name=name, shape=dataset.shape, start=tuple(map(int, low)), extent=extent, dtype=dataset.dtype.name
        )
        source = plist.get_virtual_dsetname(number).lstrip("/")
        if space.get_select_npoints() != math.prod(extent) or source != spec.source:
            raise CheckpointError(f"{what}: its piece {number} is none that a rank writes")
        yield plist.get_virtual_filename(number), spec


def find_pieces(path: Path, bytes_of_file: Mapping[str, int], kept: tuple[str, ...]) -> dict[str, list[PieceSpec]]:
    """Find the pieces of a master's arrays, all but those below `kept` -> by file. They make each array whole.

    Raises CheckpointError in one line.
    """
    pieces: dict[str, list[PieceSpec]] = {name: [] for name in bytes_of_file}
    with damage_errors(path), h5py.File(path) as master:
        for name, dataset in list_datasets(master, path):
            if name.startswith(kept):
                continue
            sources = [*list_sources_of(dataset, name, path)]
            for file, spec in sources:
                if file not in pieces:
                    raise CheckpointError(
                        f"{path}: {name} points to {one_line(repr(file))}, which is none of its files"
                    )
                pieces[file].append(spec)
            if sources:
                check_tiling(name, [spec for _, spec in sources])
            elif math.prod(dataset.shape):
                raise CheckpointError(f"{path}: {name} has no piece")
    return pieces


def check_pieces(path: Path, specs: list[PieceSpec]) -> None:
    """Check that a rank's file holds the pieces that the master shows, each whole. Raises CheckpointError."""
    with damage_errors(path), h5py.File(path) as file:
        found = {}
        for name, dataset in list_datasets(file, path):
            check_stored(name, dataset, path)
            found[name] = (dataset.shape, dataset.dtype.name)
    for spec in specs:
        if spec.source not in found:
            raise CheckpointError(f"{path}: has no {one_line(spec.source)}, which {path.parent.name} shows")
        if found[spec.source] != (spec.extent, spec.dtype):
            shape, dtype = found[spec.source]
            raise CheckpointError(
                f"{path}: {one_line(spec.source)} is {dtype} {list(shape)}, the master shows {spec.dtype} "
                f"{list(spec.extent)}"
            )


def find_not_finite(array: np.ndarray) -> bool:
    """Return True if any number of an array is not finite."""
    return array.dtype.kind == "f" and not bool(np.isfinite(array).all())
