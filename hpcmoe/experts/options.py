"""What the library's groups and layers are built from: their arguments, checked before anything is built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from hpcmoe.errors import ConfigError
from hpcmoe.experts.shapes import ExpertShape
from hpcmoe.validate import STRICT, validate_arguments

Count = Annotated[int, Interval(ge=1, lt=2**31)]
CountOrZero = Annotated[int, Interval(ge=0, lt=2**31)]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """The arguments of hpcmoe.open, the same on all ranks."""

    __pydantic_config__: ClassVar = STRICT

    tensor_parallel: Count
    data_parallel: Count
    expert_parallel: CountOrZero  # 0: what the others leave
    device: Literal["auto", "host", "cuda"]
    links: str  # "" takes all links as alike, "measure" measures them, else a file
    schedule: Literal["serial", "overlap", "arrival"]
    deterministic: bool
    in_flight: Annotated[int, Interval(ge=1, le=64)]  # micro-batches under way at once
    max_tokens: Count  # of a rank in one exchange, where a layer says nothing else
    reject_more: bool  # more tokens are an error; else they go in several exchanges
    threads: Annotated[int, Interval(ge=0, le=4096)]  # of torch; 0: this rank's share of its node's cores
    hang_seconds: Annotated[float, Ge(0)]  # without a sign of a rank for which another waits; 0: for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOptions:
    """The arguments of an Experts, the same on all ranks of its group."""

    __pydantic_config__: ClassVar = STRICT

    hidden: Count
    feed_forward: Count
    num_experts: Count
    kind: Literal["gelu", "relu", "swiglu"]
    bias: bool
    top_k: Count
    dtype: Literal["float32", "bfloat16"]  # of the rows that travel, and in which experts compute
    max_tokens: Count  # of a rank in one exchange
    spare_slots_per_rank: Annotated[int, Interval(ge=0, le=1024)]
    replicate: bool
    placement: tuple[Annotated[int, Ge(-1)], ...]  # [S] the expert of each slot, -1 in an empty one; (): dealt evenly
    seed: Annotated[int, Interval(ge=0, lt=2**63)]

    @property
    def shape(self) -> ExpertShape:
        """Return what each expert is."""
        return ExpertShape(
            hidden=self.hidden, feed_forward=self.feed_forward, kind=self.kind, bias=self.bias, dtype=self.dtype
        )


def make_options(
    where: str, tensor_parallel: int, dtype: torch.dtype, placement: Sequence[int] | None, **arguments: Any
) -> ExpertsOptions:
    """Check the arguments of an Experts. Raises ConfigError with a line for each at fault, beginning with `where`."""
    if dtype not in DTYPES:
        raise ConfigError(f"{where}: dtype = {dtype}: must be torch.float32 or torch.bfloat16")
    slots = [] if placement is None else np.asarray(placement).ravel().tolist()
    options = validate_arguments(ExpertsOptions, arguments | {"dtype": DTYPES[dtype], "placement": slots}, where)
    if options.top_k > options.num_experts:
        raise ConfigError(f"{where}: top_k = {options.top_k}: must be at most num_experts = {options.num_experts}")
    if options.feed_forward % tensor_parallel:
        raise ConfigError(
            f"{where}: feed_forward = {options.feed_forward}: must be a multiple of the group's tensor_parallel = "
            f"{tensor_parallel}"
        )
    return options


def check_input(where: str, options: ExpertsOptions, x: Tensor) -> None:
    """Raise ConfigError where x is not [..., H] of floating-point numbers."""
    if x.dim() == 0 or x.shape[-1] != options.hidden or not x.is_floating_point():
        shape = f"{list(x.shape)} of {x.dtype}"
        raise ConfigError(f"{where}: x has shape {shape}: must be [..., {options.hidden}], floating-point")


def check_choices(where: str, options: ExpertsOptions, x: Tensor, experts: Tensor, gates: Tensor) -> None:
    """Raise ConfigError where x [..., H], experts [..., K] and gates [..., K] do not fit the layer."""
    check_input(where, options, x)
    shape, top_k = list(x.shape[:-1]), experts.shape[-1] if experts.dim() else 0
    for name, tensor in (("top_k_index", experts), ("top_k_weights", gates)):
        if list(tensor.shape) != [*shape, top_k] or not 1 <= top_k <= options.top_k:
            wanted = f"{shape} + [K], K 1 to {options.top_k}"
            raise ConfigError(f"{where}: {name} has shape {list(tensor.shape)}: must be {wanted}")
    if experts.is_floating_point() or not gates.is_floating_point():
        raise ConfigError(f"{where}: {experts.dtype} indices, {gates.dtype} weights: must be integers and floats")
    if experts.device.type == "cpu" and experts.numel():  # on a GPU it would wait for the device
        least, most = int(experts.min()), int(experts.max())
        if least < 0 or most >= options.num_experts:
            raise ConfigError(f"{where}: top_k_index is {least} to {most}: must be from 0 to {options.num_experts - 1}")
