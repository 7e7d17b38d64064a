"""Slices of logical arrays: which part of an array, named without ranks, this rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.experts.shapes import ShardView

_AnyTensor = TypeVar("_AnyTensor", bound=Tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySlice:
    """Part of a logical array."""

    name: str
    shape: tuple[int, ...]  # of the whole array
    start: tuple[int, ...]
    extent: tuple[int, ...]
    keys: tuple[str, ...] = ()  # of the config, axis by axis
    owned: bool = False  # this rank, and no other, saves it


def slice_of_whole(name: str, shape: Sequence[int], owned: bool) -> ArraySlice:
    """Return the slice of an array that every rank holds whole; one of no axis gets one of length 1."""
    shape = tuple(shape) or (1,)
    return ArraySlice(name=name, shape=shape, start=(0,) * len(shape), extent=shape, owned=owned)


def slice_of_weight(name: str, view: ShardView, mesh: Mesh, expert: int, num_experts: int) -> ArraySlice:
    """Return the slice of one expert's weight, of which this rank has the whole or a shard."""
    start, whole = [0] * len(view.shape), list(view.shape)
    if view.axis is not None:
        size = view.shape[view.axis]
        start[view.axis], whole[view.axis] = mesh.tensor_index * size, mesh.tensor_parallel * size
    return ArraySlice(
        name=name,
        shape=(num_experts, *whole),
        start=(expert, *start),
        extent=(1, *view.shape),
        keys=("num_experts", *view.keys),
    )


def cut_slice(part: ArraySlice, first: int, num_rows: int) -> ArraySlice:
    """Return the slice of some rows of an array's slice, of which no other rank holds any."""
    return replace(part, start=(first, *part.start[1:]), extent=(num_rows, *part.extent[1:]), owned=True)


def cut_rows(arrays: Sequence[_AnyTensor], index: int, num_shares: int) -> list[tuple[_AnyTensor, int, int]]:
    """Cut the rows of arrays into nearly equal shares -> (array, first row, end) of one share."""
    total, before, rows = sum(array.numel() for array in arrays), 0, []
    for array in arrays:
        width = array[0].numel()
        edges = (total * edge // num_shares - before for edge in (index, index + 1))
        first, end = (min(max(-(-edge // width), 0), len(array)) for edge in edges)
        if first < end:
            rows.append((array, first, end))
        before += array.numel()
    return rows
