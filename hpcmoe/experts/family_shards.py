"""How a family's expert is cut for tensor parallelism: each rank of a group has a part of its feed-forward dimension F.

Gate and up are one parameter, 2F wide: first all of gate, then all of up, or interleaved number by number. Both are cut
alike: in a view of the parameter in which F is an axis of its own a shard is one box. The bias of down is added once,
by the group's first rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ADDED_ONCE = "down_proj_bias"  # whole, on the first rank of a tensor-parallel group alone


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightView:
    """A parameter [n, ...] of n experts, or of their shards, with F an axis of its own."""

    shape: tuple[int, ...]
    axis: int | None  # of F in it; None: the parameter has none
    flat_axis: int | None  # of F, 2F where gate and up share it, in the parameter itself


def view_weight(family: nn.Module, name: str, shape: Sequence[int]) -> WeightView:
    """Find F in a parameter of a family's fused module, by its name and the module's own description of itself."""
    shape, axis = tuple(shape), find_axis(family, name, len(shape))
    if axis is None or not name.startswith("gate_up_proj"):
        return WeightView(shape=shape, axis=axis, flat_axis=axis)
    gate_first = getattr(family, "is_concatenated", True)
    width = shape[axis] // 2
    pair = (2, width) if gate_first else (width, 2)
    return WeightView(
        shape=(*shape[:axis], *pair, *shape[axis + 1 :]), axis=axis + 1 if gate_first else axis, flat_axis=axis
    )


def find_axis(family: nn.Module, name: str, num_axes: int) -> int | None:
    """Find the axis of F, or 2F, of a parameter [n, ...]; None where it has none, or its layout is not known."""
    kind, last = name.removesuffix("_bias"), num_axes - 1
    if name == ADDED_ONCE or kind not in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
        return None
    own: int | None = getattr(family, "feed_forward_axis", None)  # of all matrices, where an adapter says so
    if own is not None or kind != name:
        return own or last
    return last if (kind == "down_proj") != bool(family.is_transposed) else 1


def cut_shard(family: nn.Module, name: str, weight: Tensor, index: int, count: int) -> Tensor:
    """Cut a parameter [n, ...] of whole experts to the shard of one of `count` tensor-parallel ranks, a view of it.

    What has no F is returned whole.
    """
    view = view_weight(family, name, weight.shape)
    if view.axis is None or view.flat_axis is None:
        return weight
    shape = list(weight.shape)
    shape[view.flat_axis] //= count
    return weight.reshape(view.shape).chunk(count, dim=view.axis)[index].reshape(shape)


def join_shards(family: nn.Module, name: str, shards: Sequence[Tensor]) -> Tensor:
    """Join the shards of a parameter that cut_shard made, in their order -> the whole."""
    view = view_weight(family, name, shards[0].shape)
    if len(shards) == 1 or view.axis is None or view.flat_axis is None:
        return shards[0]
    shape = list(shards[0].shape)
    shape[view.flat_axis] *= len(shards)
    return torch.cat([shard.reshape(view.shape) for shard in shards], dim=view.axis).reshape(shape)


def list_uncut(family: nn.Module) -> list[str]:
    """List the parameters of a fused module, and of modules within, that no tensor-parallel group can share."""
    return [
        name
        for name, weight in family.named_parameters()
        if name != ADDED_ONCE and find_axis(family, name, weight.dim()) is None
    ]


def count_feed_forward(family: nn.Module) -> int:
    """Return F of a fused module of whole experts."""
    down = family.get_parameter("down_proj")
    return down.shape[find_axis(family, "down_proj", down.dim()) or 1]
