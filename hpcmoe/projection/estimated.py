"""The costs of a step's ops without a measurement: floating-point operations and bytes over a processor's peaks.

An op takes as long as its products at some part of the peak, or its bytes at some part of the memory's rate, whichever
is longer; weights are read once an op. The parts are usual ones, so that the range is wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hpcmoe.config import NetworkSpec
from hpcmoe.experts.shapes import MATRICES, estimate_expert, make_expert_shape
from hpcmoe.projection.costs import STEP_OPS, CostConditions, Costs, OpCost
from hpcmoe.projection.model_file import ModelFile
from hpcmoe.projection.processors import Processor

LOW, HIGH = 0.6, 2.0  # of the seconds that are estimated
_PART_OF_PEAK, _PART_OF_RATE = 0.6, 0.75  # that large products and copies reach
_LAUNCH_SECONDS = {True: 20e-6, False: 50e-6}  # that an op takes at least, on a GPU or on a core
_OPTIMIZER_BYTES = 28  # of a parameter: it, its gradient and two moments read, three of them written, float32
_STEP_SECONDS = 300e-6  # of data, waiting and the rest
_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSizes:
    """The sizes of a network on which the work of its ops depends."""

    hidden: int
    row_width: int
    feed_forward: int  # of a shard, where experts are cut
    kind: str
    num_layers: int  # that have experts
    num_experts: int
    top_k: int
    sequence_length: int
    attention_width: int  # of all heads; 0: no attention
    expert_parameters: int  # of a shard of one
    layer_parameters: float  # of a layer without its experts, the mean
    vocabulary: int
    outer_parameters: int


def size_model(model: ModelFile, sequence_length: int, tensor: int = 1) -> NetworkSizes:
    """Return the sizes of a model of a config.json, whose layers without experts count with those that have some."""
    return NetworkSizes(
        hidden=model.hidden,
        row_width=model.row_width,
        feed_forward=model.feed_forward // tensor,
        kind="swiglu" if model.num_matrices == 3 else "relu",
        num_layers=len(model.moe_layers),
        num_experts=model.num_experts,
        top_k=model.top_k,
        sequence_length=sequence_length,
        attention_width=model.num_heads * model.head_width,
        expert_parameters=model.expert_parameters // tensor,
        layer_parameters=sum(model.layer_parameters) / len(model.moe_layers),
        vocabulary=model.vocabulary,
        outer_parameters=model.outer_parameters,
    )


def size_own_network(spec: NetworkSpec, vocabulary: int, tensor: int = 1) -> NetworkSizes:
    """Return the sizes of a run's own network (hpcmoe.model.language)."""
    model, shape = spec.model, make_expert_shape(spec)
    num_bytes, _ = estimate_expert(shape, trains=True)
    dense = (4 * model.hidden + 1) * model.hidden if model.attention else 0
    return NetworkSizes(
        hidden=model.hidden,
        row_width=model.hidden,
        feed_forward=model.feed_forward // tensor,
        kind=spec.experts.kind,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        sequence_length=model.sequence_length,
        attention_width=model.hidden if model.attention else 0,
        expert_parameters=num_bytes // 4 // tensor,
        layer_parameters=dense + model.hidden * (1 + model.num_experts),
        vocabulary=vocabulary,
        outer_parameters=(2 * vocabulary + model.sequence_length + 1) * model.hidden,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpWork:
    """What an op does: forward, or backward, on one rank."""

    flops_per_token: float = 0.0
    bytes_per_token: float = 0.0
    fixed_bytes: float = 0.0  # weights, read once


def list_work(sizes: NetworkSizes, experts_of_rank: float, itemsize: int, trains: bool) -> Mapping[str, OpWork]:
    """List the work of each op; experts_of_rank: that one rank holds, of a layer."""
    s, of_rows = sizes, sizes.top_k * sizes.row_width * itemsize
    num_matrices = len(MATRICES[s.kind])
    dense = OpWork(
        flops_per_token=2 * s.layer_parameters + 2 * s.sequence_length * s.attention_width,
        bytes_per_token=12 * s.hidden * itemsize,
        fixed_bytes=s.layer_parameters * itemsize,
    )
    compute = OpWork(
        flops_per_token=2 * s.top_k * s.expert_parameters,
        bytes_per_token=2 * of_rows + num_matrices * s.top_k * s.feed_forward * itemsize,
        fixed_bytes=experts_of_rank * s.expert_parameters * itemsize,
    )
    rows, results = OpWork(bytes_per_token=2 * of_rows), OpWork(bytes_per_token=of_rows + 8 * s.hidden)
    work = {
        "dense": dense, "route": OpWork(bytes_per_token=16 * (s.num_experts + s.top_k)), "dispatch": rows,
        "compute": compute, "combine": results,
    }  # fmt: skip
    if not trains:
        return work
    head = OpWork(
        flops_per_token=6 * s.vocabulary * s.hidden,
        bytes_per_token=16 * s.vocabulary,
        fixed_bytes=3 * s.outer_parameters * itemsize,
    )
    held = s.num_layers * (s.layer_parameters + experts_of_rank * s.expert_parameters) + s.outer_parameters
    return work | {
        "combine_backward": rows, "compute_backward": double(compute), "route_backward": results,
        "dense_backward": double(dense), "head": head, "optimizer": OpWork(fixed_bytes=_OPTIMIZER_BYTES * held),
    }  # fmt: skip


def double(work: OpWork) -> OpWork:
    """Return the work of an op's backward pass: gradients of inputs and of weights, each as much as forward."""
    return OpWork(
        flops_per_token=2 * work.flops_per_token,
        bytes_per_token=2 * work.bytes_per_token,
        fixed_bytes=2 * work.fixed_bytes,
    )


def estimate_costs(
    processor: Processor, sizes: NetworkSizes, experts_of_rank: float, dtype: str, trains: bool, micro_batches: int = 1
) -> Costs:
    """Estimate the costs of all ops from a processor's peaks -> Costs that say so, with a wide range."""
    flops = processor.peak(dtype) * _PART_OF_PEAK
    rate = processor.memory_bytes_per_second * _PART_OF_RATE

    def cost(work: OpWork) -> OpCost:
        """Return the seconds of some work."""
        fixed = work.fixed_bytes / rate + _LAUNCH_SECONDS[processor.is_gpu]
        per_token = max(work.flops_per_token / flops, work.bytes_per_token / rate)
        return OpCost(fixed_seconds=fixed, seconds_per_token=per_token, low=LOW, high=HIGH)

    ops = {op: cost(work) for op, work in list_work(sizes, experts_of_rank, _BYTES[dtype], trains).items()}
    steps = OpCost(fixed_seconds=_STEP_SECONDS, seconds_per_token=0.0, low=LOW, high=HIGH)
    conditions = CostConditions(
        hidden=sizes.hidden,
        feed_forward=sizes.feed_forward,
        kind=sizes.kind,
        num_layers=sizes.num_layers,
        num_experts=max(round(experts_of_rank), 1),
        top_k=sizes.top_k,
        sequence_length=sizes.sequence_length,
        attention=sizes.attention_width > 0,
        dtype=dtype,
        mode="train" if trains else "infer",
        micro_batches=micro_batches,
    )
    source = {
        "processor": processor.name,
        "figures": processor.source,
        "part_of_peak": f"{_PART_OF_PEAK:g}",
        "range": f"x {LOW:g} to x {HIGH:g}",
    }
    return Costs(
        conditions=conditions,
        ops=dict.fromkeys((op for op in STEP_OPS if op not in ops and op != "optimizer"), steps) | ops,
        source=source,
        is_measured=False,
    )
