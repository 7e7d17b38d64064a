"""The shapes of an expert's weights, known before anything is imported that takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpcmoe.config import NetworkSpec

MATRICES = {"gelu": ("up", "down"), "relu": ("up", "down"), "swiglu": ("gate", "up", "down")}  # by kind of expert


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What an expert is: all that its weights, its memory and its time depend on."""

    hidden: int  # H
    feed_forward: int  # F, whole
    kind: str  # one of MATRICES
    bias: bool
    dtype: str  # of the rows that it computes on: "float32" or "bfloat16"


def make_expert_shape(spec: NetworkSpec) -> ExpertShape:
    """Return what the experts of a network are."""
    model, experts = spec.model, spec.experts
    return ExpertShape(
        hidden=model.hidden,
        feed_forward=model.feed_forward,
        kind=experts.kind,
        bias=experts.bias,
        dtype=model.dtype,
    )


def weight_shape(shape: ExpertShape, name: str, inner: int = 0) -> tuple[int, int]:
    """Return the shape of a matrix, [out, in], whole or a shard that is `inner` wide."""
    inner = inner or shape.feed_forward
    return (shape.hidden, inner) if name == "down" else (inner, shape.hidden)


def split_axis(name: str) -> int:
    """Return the axis over which a tensor-parallel group shares a matrix: down by input, the others by output."""
    return 1 if name == "down" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """One expert's weight, or a tensor-parallel shard of it, as a checkpoint keeps it."""

    shape: tuple[int, ...]
    axis: int | None  # over which a group shares it; None: one rank has it whole
    keys: tuple[str, ...] = ()  # of the config, axis by axis


def view_own_weight(name: str, shape: Sequence[int]) -> ShardView:
    """Return the view of a matrix or bias of an expert of ours: as it is."""
    sizes = ("hidden", "feed_forward") if name.startswith("down") else ("feed_forward", "hidden")
    axis = None if name == "down_bias" else split_axis(name.removesuffix("_bias"))
    return ShardView(shape=tuple(shape), axis=axis, keys=sizes)


def estimate_expert(shape: ExpertShape, trains: bool) -> tuple[int, int]:
    """Compute the bytes of one logical expert's parameters, and how many arrays of that size it has -> (bytes, arrays).

    Training keeps float32 parameters, gradients and two moments; inference the parameters in the rows' precision.
    """
    num_matrices = len(MATRICES[shape.kind])
    biases = (num_matrices - 1) * shape.feed_forward + shape.hidden if shape.bias else 0
    itemsize = 2 if shape.dtype == "bfloat16" and not trains else 4
    return (num_matrices * shape.hidden * shape.feed_forward + biases) * itemsize, 4 if trains else 1
