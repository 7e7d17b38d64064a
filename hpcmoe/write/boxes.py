"""Boxes of logical arrays, which ranks hold or want, and whether those held make each array whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcmoe.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceSpec:
    """A box of a logical array, which a rank holds or wants."""

    name: str  # HDF5 path of the array, at least one axis; not under metadata/ or files/
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]  # where the box begins
    extent: tuple[int, ...]  # its length along each axis
    dtype: str = ""  # NumPy's name; empty: any
    keys: tuple[str, ...] = ()  # of the config, axis by axis, to be named where the shape differs

    @property
    def box(self) -> tuple[slice, ...]:
        """Return the index of the box in the whole array."""
        return tuple(slice(first, first + count) for first, count in zip(self.start, self.extent, strict=True))

    @property
    def source(self) -> str:
        """Return the path of the box in the file of the rank that holds it."""
        return f"{self.name}/{'.'.join(map(str, self.start))}"


class HeldPiece(Protocol):
    """This rank's piece of a logical array, which may be brought to the host only as it is written."""

    @property
    def spec(self) -> PieceSpec:
        """Return the piece's box and dtype, without its data."""

    @property
    def array(self) -> np.ndarray:
        """Return the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece whose data are on the host."""

    name: str  # HDF5 path of the array
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]  # where the piece begins in it
    array: np.ndarray

    @property
    def spec(self) -> PieceSpec:
        """Return the piece's box and dtype, without its data."""
        extent, dtype = self.array.shape, self.array.dtype.name
        return PieceSpec(name=self.name, shape=self.shape, start=self.start, extent=extent, dtype=dtype)


def check_tiling(name: str, specs: Sequence[PieceSpec]) -> None:
    """Check that pieces make one array whole: one shape and dtype, within bounds, no two alike, none missing."""
    # Compare shapes and dtypes.
    kinds = sorted({(spec.shape, spec.dtype) for spec in specs})
    if len(kinds) > 1:
        seen = " and ".join(f"{dtype} {list(shape)}" for shape, dtype in kinds)
        raise CheckpointError(f"pieces of {name} disagree on the whole: {seen}")

    # Check the bounds, then count the elements: without two alike, as many as the array's are all of it.
    shape = kinds[0][0]
    for spec in specs:
        if not all(0 <= side.start <= side.stop <= size for side, size in zip(spec.box, shape, strict=True)):
            raise CheckpointError(f"piece of {name} {list(shape)} lies outside: {spec.extent} from {spec.start}")
    filled = [spec for spec in specs if math.prod(spec.extent) > 0]
    twice = len(filled) - len({spec.start for spec in filled})
    held, size = sum(math.prod(spec.extent) for spec in filled), math.prod(shape)
    if twice or held != size:
        raise CheckpointError(f"pieces of {name} {list(shape)} hold {held} of {size} elements, {twice} pieces twice")
