"""A step of a shape simulated, in parts that stand for all its layers and micro-batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.topology import Topology
from hpcmoe.projection.classes import GroupedRanks, RankClasses
from hpcmoe.projection.costs import LAYER_OPS, STEP_OPS, Costs, OpCost
from hpcmoe.projection.estimated import NetworkSizes
from hpcmoe.projection.flows import Fabric
from hpcmoe.projection.simulate import SimulatedStep, Work, simulate
from hpcmoe.projection.turns import order_lanes

_EXPERT_OPS = ("compute", "compute_backward")
_SAMPLED_LAYERS = 4  # that stand for all where there are more than twice as many
_SIMULATED_BATCHES = 2  # times those in flight, at most
_LINK_RANGE = {True: (0.95, 1.1), False: (0.85, 1.5)}  # of seconds on links: measured, or as described
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many ranks do what."""

    data: int
    expert: int
    tensor: int

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks."""
        return self.data * self.expert * self.tensor

    def __str__(self) -> str:
        return f"{self.data}x{self.expert}x{self.tensor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """What is to be done in a step, whatever it runs on."""

    sizes: NetworkSizes  # of whole experts
    loads: np.ndarray  # [L, nodes or 1, E] tokens by home
    node_names: tuple[str, ...]  # of the homes
    dtype: str
    trains: bool
    batch_sequences: int
    micro_batches: int
    in_flight: int
    schedule: str
    by_load: bool  # experts are placed by their loads
    spare_slots: int
    replicate: bool
    faster: float = 1.0  # times what computes
    costs: Costs | None = None  # measured; None: estimated from each node's processor

    def with_batches(self, micro_batches: int, num_layers: int) -> tuple[int, int]:
        """Return how many micro-batches and layers are simulated; longer steps go on alike."""
        layers = num_layers if num_layers <= 2 * _SAMPLED_LAYERS else _SAMPLED_LAYERS
        return min(micro_batches, _SIMULATED_BATCHES * self.in_flight), layers


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedShape:
    """A shape on its nodes, with classes for the layers that are simulated."""

    grouped: GroupedRanks
    topology: Topology
    classes: RankClasses
    fabric: Fabric
    kind_of_node: np.ndarray
    sigma: float


def list_seconds(
    job: PlannedJob, shape: Shape, stage: PlacedShape, costs: Sequence[Costs], tokens: int, edge: str
) -> dict[str, np.ndarray]:
    """List the processor seconds of each op of a layer -> [C, L], of the head [C, 1]."""
    served, num_layers = stage.classes.served, stage.classes.served.shape[0]
    held = max(job.sizes.num_experts / shape.expert, 1.0)
    seconds = {}
    for op in (*LAYER_OPS, "head"):
        of_class = []
        for number, of_rank in enumerate(costs):
            cost = of_rank.ops.get(op, OpCost(fixed_seconds=0.0, seconds_per_token=0.0))
            scale = {"middle": 1.0, "low": cost.low, "high": cost.high}[edge]
            if op in _EXPERT_OPS:  # what is fixed is the experts'; an expert's row on a shard is a part of one
                fixed = (
                    cost.fixed_seconds * held / of_rank.conditions.num_experts
                    if of_rank.is_measured
                    else cost.fixed_seconds
                )
                each = fixed + cost.seconds_per_token / job.sizes.top_k / shape.tensor * served[:, number]
            else:
                each = np.full(num_layers, cost.seconds(tokens))
            of_class.append(each * scale / job.faster)
        seconds[op] = np.array(of_class)
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """A step that is simulated, whole or in part, at the middle of its costs' range or at an end."""

    job: PlannedJob
    shape: Shape
    stage: PlacedShape
    costs: Sequence[Costs]  # of each class
    tokens: int  # of a micro-batch on a rank

    def simulate_part(self, layers: int, batches: int, edge: str = "middle") -> SimulatedStep:
        """Simulate some layers, those that stand for all as often as needed."""
        classes, topology, job = self.stage.classes, self.stage.topology, self.job
        is_measured = all("measured" in source for source in topology.source.values())
        slower = {"middle": 1.0, "low": _LINK_RANGE[is_measured][0], "high": _LINK_RANGE[is_measured][1]}[edge]
        num_bytes = job.sizes.row_width * ITEM_BYTES[job.dtype] * slower
        chosen = np.arange(layers) % len(classes.served)
        seconds = list_seconds(job, self.shape, self.stage, self.costs, self.tokens, edge)
        return simulate(
            Work(
                lanes=order_lanes(job.schedule, layers, batches, job.in_flight, job.trains),
                seconds={op: of_op[:, chosen] for op, of_op in seconds.items()},
                near=classes.near[chosen],
                far=classes.far[chosen] * num_bytes,
                far_rows=classes.far[chosen] / classes.ranks,
                ranks_per_core=self.crowded,
            ),
            self.stage.fabric,
        )

    @property
    def crowded(self) -> np.ndarray:
        """Return how many ranks share a core, where each class is -> [C]."""
        topology = self.stage.topology
        of_node = np.bincount(self.stage.grouped.node_of_rank, minlength=topology.num_nodes)
        crowded = np.where(topology.devices_of_node > 0, 1.0, of_node / np.maximum(topology.cores_of_node, 1))
        return crowded[self.stage.classes.node]

    @property
    def part(self) -> tuple[int, int]:
        """Return the layers and micro-batches of the least part that is simulated."""
        return len(self.stage.classes.served), self.job.with_batches(self.job.micro_batches, len(self.job.loads))[0]

    def compare_edge(self, edge: str, middle: SimulatedStep) -> float:
        """Return the time at an end of the range over that in the middle."""
        return self.simulate_part(*self.part, edge).seconds / max(middle.seconds, 1e-300)

    def find_parts(self) -> tuple[float, dict[str, float], SimulatedStep]:
        """Simulate a step -> its seconds, their parts, and the outcome of the least part."""
        whole, outcome = extend(self.simulate_part, self.job, self.stage.classes.ranks, len(self.stage.classes.served))
        once = add_once(self.job, self.shape, self.stage, self.costs, self.tokens, float(self.crowded.max()), whole)
        parts = whole | {name: whole.get(name, 0.0) + seconds for name, seconds in once.items()}
        return sum(parts.values()), parts, outcome


def extend(
    simulate_part: Callable[[int, int], SimulatedStep], job: PlannedJob, ranks: np.ndarray, sampled: int
) -> tuple[dict[str, float], SimulatedStep]:
    """Simulate a part of a step's layers and micro-batches, and go on alike -> seconds of the mean rank by stage."""
    layers, batches = len(job.loads), job.micro_batches
    few, short = sampled, job.with_batches(batches, layers)[0]
    first = simulate_part(few, short)
    parts = mean_parts(first, ranks)
    long = min(2 * short, batches)
    more_layers, more_batches = (layers - few) / few, (batches - short) / max(long - short, 1)
    if more_layers:
        deeper = mean_parts(simulate_part(2 * few, short), ranks)
        steps = {name: deeper.get(name, 0.0) - parts.get(name, 0.0) for name in deeper}
    else:
        steps = {}
    longer = mean_parts(simulate_part(few, long), ranks) if more_batches else parts
    both = {name: longer.get(name, 0.0) - parts.get(name, 0.0) for name in longer}
    found = {}
    for name in parts:
        of_layers, of_batches = steps.get(name, 0.0), both.get(name, 0.0)
        # What a layer adds, it adds in each further micro-batch too.
        found[name] = parts[name] + more_layers * of_layers + more_batches * of_batches * (1 + more_layers)
    return found, first


def mean_parts(outcome: SimulatedStep, ranks: np.ndarray) -> dict[str, float]:
    """Return the seconds of the mean rank by stage; ranks [C] of each class."""
    return {name: float(np.average(of_class, weights=ranks)) for name, of_class in outcome.spent.items()}


def add_once(
    job: PlannedJob, shape: Shape, stage: PlacedShape, costs: Sequence[Costs], tokens: int, crowded: float,
    parts: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """Return the seconds of what is done once a step: data, optimizer, the rest, and sums of gradients not hidden."""
    once: dict[str, float] = {}
    for name in STEP_OPS:
        cost = costs[0].ops.get(name, OpCost(fixed_seconds=0.0, seconds_per_token=0.0))
        part = "optimizer" if name == "optimizer" else "once"
        once[part] = once.get(part, 0.0) + cost.seconds(tokens * job.micro_batches) * max(crowded, 1.0)
    if job.trains:
        sums, backward = sum_seconds(job, shape, stage), sum(parts.get(op, 0.0) for op in LAYER_OPS if "backward" in op)
        hides = backward / max(job.micro_batches, 1) * (1 - 1 / max(len(job.loads), 1))
        once["sums"] = max(sums - hides, sums / max(len(job.loads), 1))
    return once


def sum_seconds(job: PlannedJob, shape: Shape, stage: PlacedShape) -> float:
    """Return the seconds of ring all-reduces of gradients: dense parts over all ranks, experts over data-parallel."""
    dense = (job.sizes.layer_parameters * len(job.loads) + job.sizes.outer_parameters) * 4.0
    held = (job.sizes.num_experts / shape.expert + job.spare_slots) * job.sizes.expert_parameters / shape.tensor
    experts = held * len(job.loads) * 4.0
    nodes = np.unique(stage.grouped.node_of_rank)
    topology, of_node = stage.topology, np.bincount(stage.grouped.node_of_rank).max()
    if len(nodes) == 1:
        rate = topology.bytes_per_second[nodes[0], nodes[0]]
        dense_rate = expert_rate = rate
    else:
        dense_rate = topology.egress_bytes_per_second[nodes].min()
        expert_rate = dense_rate / of_node
    seconds = 0.0
    for size, over, rate in ((dense, shape.num_ranks, dense_rate), (experts, shape.data, expert_rate)):
        if over > 1:
            seconds += 2 * size * (over - 1) / over / rate
    return float(seconds)


def count_exchanges(job: PlannedJob) -> int:
    """Count how often rows go one way or back in a step, over all layers and micro-batches."""
    return len(job.loads) * job.micro_batches * (4 if job.trains else 2)


def find_demands(
    job: PlannedJob, shape: Shape, stage: PlacedShape, costs: Sequence[Costs], tokens: int, parts: Mapping[str, float]
) -> dict[str, float]:
    """Find how long the busiest rank and each resource are busy in a step at least, the longest first."""
    seconds = list_seconds(job, shape, stage, costs, tokens, "middle")
    scale = len(job.loads) / stage.classes.served.shape[0] * job.micro_batches
    of_ranks = sum(
        of_op[:, 0] * job.micro_batches if op == "head" else of_op.sum(axis=1) * scale for op, of_op in seconds.items()
    )
    demands = {"compute": float(np.max(of_ranks)) + parts.get("optimizer", 0.0)}
    per_row = job.sizes.row_width * ITEM_BYTES[job.dtype] * count_exchanges(job) / 2
    flows = stage.classes.far.mean(axis=0)
    load = np.zeros(len(stage.fabric.rates))
    for (own, peer), uses in stage.fabric.uses.items():
        for resource, part in uses:  # there, and as many bytes back
            load[resource] += (flows[own, peer] + flows[peer, own]) * part * per_row
    for name, rate, num_bytes in zip(stage.fabric.names, stage.fabric.rates, load, strict=True):
        if np.isfinite(rate) and num_bytes:
            kind = name.split()[0]
            demands[kind] = max(demands.get(kind, 0.0), float(num_bytes / rate))
    if job.trains and (sums := sum_seconds(job, shape, stage)):
        demands["sums"] = sums
    return dict(sorted(demands.items(), key=lambda item: -item[1]))
