"""The time of a step on a described cluster, what binds it, and where it goes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.topology import Topology
from hpcmoe.errors import ConfigError
from hpcmoe.projection.classes import EACH_RANK, GroupedRanks, RankClasses, class_each, class_kinds, make_fabric
from hpcmoe.projection.cluster_file import DescribedCluster
from hpcmoe.projection.costs import LAYER_OPS, STEP_OPS, Costs, OpCost
from hpcmoe.projection.estimated import NetworkSizes, estimate_costs
from hpcmoe.projection.flows import Fabric
from hpcmoe.projection.processors import Processor
from hpcmoe.projection.simulate import Bar, Outcome, Work, simulate
from hpcmoe.projection.spread import sample_layers, spread_experts
from hpcmoe.projection.turns import order_lanes

_EXPERT_OPS = ("compute", "compute_backward")
_SAMPLED_LAYERS = 4  # that stand for all where there are more than twice as many
_SIMULATED_BATCHES = 2  # times those in flight, at most
_LINK_RANGE = {True: (0.95, 1.1), False: (0.85, 1.5)}  # of seconds on links: measured, or as described
_UNKNOWN = Processor(
    name="core", flops={"float32": 40e9}, memory_bytes_per_second=4e9, memory_bytes=4 * 2.0**30,
    link_bytes_per_second=2e9, is_gpu=False, source="not given, taken",
)  # fmt: skip
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
class Job:
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
class Prediction:
    """A step foretold."""

    shape: Shape
    num_nodes: int
    micro_batches: int
    in_flight: int
    tokens: int  # of a step, all ranks
    seconds: float
    seconds_range: tuple[float, float]
    parts: Mapping[str, float]  # seconds of the mean rank by what they were spent on; they sum to the step's
    demands: Mapping[str, float]  # seconds that each resource is busy at least, the longest first
    node_bytes: tuple[float, float]  # that the busiest node sends to others, that leave its rack, a step
    sigma: float  # standard deviation / mean of the rows of ranks, mean of layers
    hidden_seconds: float  # of rows on their way while the rank worked
    bars: Sequence[Bar]
    sources: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens of all ranks in a second."""
        return self.tokens / self.seconds

    @property
    def binds(self) -> tuple[str, float]:
        """Return what takes longest, and its part of the step."""
        name = next(iter(self.demands))
        return name, self.demands[name] / self.seconds

    @property
    def binds_next(self) -> tuple[str, float]:
        """Return what takes longest but for one, and its part of the step."""
        name = list(self.demands)[min(1, len(self.demands) - 1)]
        return name, self.demands[name] / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A shape on its nodes, with classes for the layers that are simulated."""

    grouped: GroupedRanks
    topology: Topology
    classes: RankClasses
    fabric: Fabric
    kind_of_node: np.ndarray
    sigma: float


def predict(job: Job, cluster: DescribedCluster, shape: Shape, ranks_of_node: int = 0) -> Prediction:
    """Foretell one step of a shape; ranks_of_node 0: as many as the cluster has. Raises ConfigError."""
    node_of_rank = choose_ranks(cluster, shape, ranks_of_node)
    sequences = math.ceil(math.ceil(job.batch_sequences / job.micro_batches) / shape.num_ranks)
    tokens = sequences * job.sizes.sequence_length
    stage = set_stage(job, cluster, shape, node_of_rank, tokens)
    costs = [find_costs(job, cluster, shape, int(node)) for node in stage.classes.node]
    run = StepRun(job=job, shape=shape, stage=stage, costs=costs, tokens=tokens)
    seconds, parts, outcome = run.find_parts()
    low, high = (run.compare_edge(edge, outcome) for edge in ("low", "high"))
    demands = find_demands(job, shape, stage, costs, tokens, parts)
    sent = stage.classes.far.mean(axis=0) * count_exchanges(job) * job.sizes.row_width * ITEM_BYTES[job.dtype]
    of_node = sent.sum(axis=1) / stage.classes.ranks * np.bincount(node_of_rank).max()
    across = (sent * stage.classes.crossing).sum(axis=1) / stage.classes.ranks * np.bincount(node_of_rank).max()
    return Prediction(
        shape=shape,
        num_nodes=len(np.unique(node_of_rank)),
        micro_batches=job.micro_batches,
        in_flight=1 if job.schedule == "serial" else min(job.in_flight, job.micro_batches),
        tokens=job.batch_sequences * job.sizes.sequence_length,
        seconds=seconds,
        seconds_range=(seconds * min(low, 1.0), seconds * max(high, 1.0)),
        parts=parts,
        demands=demands,
        node_bytes=(float(of_node.max()), float(across.max())),
        sigma=stage.sigma,
        hidden_seconds=max(
            max((s for name, s in demands.items() if name != "compute"), default=0.0) - parts["waiting"], 0.0
        ),
        bars=outcome.bars,
        sources=tuple(dict.fromkeys([of_class.describe() for of_class in costs])),
    )


def choose_ranks(cluster: DescribedCluster, shape: Shape, ranks_of_node: int) -> np.ndarray:
    """Choose the nodes of a shape's ranks, in their order -> [P]. Raises ConfigError where there are too few."""
    node_of_rank = cluster.topology.node_of_rank
    if ranks_of_node:
        node_of_rank = np.repeat(np.unique(node_of_rank), ranks_of_node)
    if shape.num_ranks > len(node_of_rank):
        raise ConfigError(f"{shape}: {shape.num_ranks} ranks: the cluster has {len(node_of_rank)}")
    return node_of_rank[: shape.num_ranks]


def find_kinds(cluster: DescribedCluster) -> np.ndarray:
    """Number the kinds of nodes, by what they compute and send with -> [nodes]."""
    topology = cluster.topology
    facts = [
        (processor and (processor.name, processor.source), ranks, out, into)
        for processor, ranks, out, into in zip(
            cluster.processors,
            np.bincount(topology.node_of_rank, minlength=topology.num_nodes).tolist(),
            topology.egress_bytes_per_second.tolist(),
            topology.ingress_bytes_per_second.tolist(),
            strict=True,
        )
    ]
    known: dict[tuple, int] = {}
    return np.array([known.setdefault(fact, len(known)) for fact in facts])


def set_stage(job: Job, cluster: DescribedCluster, shape: Shape, node_of_rank: np.ndarray, tokens: int) -> Stage:
    """Place the experts, and find which classes of ranks send each other what."""
    size, topology = shape.expert * shape.tensor, cluster.topology
    grouped = GroupedRanks(node_of_rank=node_of_rank, of_group=size)
    kind_of_node = find_kinds(cluster)
    total = job.loads.sum(axis=1)
    _, num_layers = job.with_batches(job.micro_batches, len(total))
    layers = sample_layers(total, num_layers)
    experts = total.shape[1]
    slots = math.ceil(experts / shape.expert) + job.spare_slots
    shares = spread_experts(total[layers], shape.expert, slots, job.by_load, job.replicate)
    shares = np.repeat(shares / shape.tensor, shape.tensor, axis=1)  # [L, ranks of a group]; a row goes to all shards
    rows = float(tokens * job.sizes.top_k * shape.tensor)
    if len(node_of_rank) <= EACH_RANK:
        classes = class_each(grouped, topology, shares[:, None], rows)
    else:
        classes = class_kinds(grouped, topology, shares, rows, kind_of_node)
    pairs = len(node_of_rank) <= EACH_RANK
    return Stage(
        grouped=grouped,
        topology=topology,
        classes=classes,
        fabric=make_fabric(classes, topology, kind_of_node, node_of_rank, pairs),
        kind_of_node=kind_of_node,
        sigma=float((shares.std(axis=1) / shares.mean(axis=1)).mean()),
    )


def find_costs(job: Job, cluster: DescribedCluster, shape: Shape, node: int) -> Costs:
    """Return the costs of ops on a node: those measured, else estimated from its processor."""
    if job.costs is not None:
        return job.costs
    experts = job.sizes.num_experts / shape.expert + job.spare_slots
    processor = cluster.processors[node] or _UNKNOWN
    return estimate_costs(processor, job.sizes, experts, job.dtype, job.trains, job.micro_batches)


def list_seconds(
    job: Job, shape: Shape, stage: Stage, costs: Sequence[Costs], tokens: int, edge: str
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

    job: Job
    shape: Shape
    stage: Stage
    costs: Sequence[Costs]  # of each class
    tokens: int  # of a micro-batch on a rank

    def simulate_part(self, layers: int, batches: int, edge: str = "middle") -> Outcome:
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

    def compare_edge(self, edge: str, middle: Outcome) -> float:
        """Return the time at an end of the range over that in the middle."""
        return self.simulate_part(*self.part, edge).seconds / max(middle.seconds, 1e-300)

    def find_parts(self) -> tuple[float, dict[str, float], Outcome]:
        """Simulate a step -> its seconds, their parts, and the outcome of the least part."""
        whole, outcome = extend(self.simulate_part, self.job, self.stage.classes.ranks, len(self.stage.classes.served))
        once = add_once(self.job, self.shape, self.stage, self.costs, self.tokens, float(self.crowded.max()), whole)
        parts = whole | {name: whole.get(name, 0.0) + seconds for name, seconds in once.items()}
        return sum(parts.values()), parts, outcome


def extend(
    simulate_part: Callable[[int, int], Outcome], job: Job, ranks: np.ndarray, sampled: int
) -> tuple[dict[str, float], Outcome]:
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


def mean_parts(outcome: Outcome, ranks: np.ndarray) -> dict[str, float]:
    """Return the seconds of the mean rank by stage; ranks [C] of each class."""
    return {name: float(np.average(of_class, weights=ranks)) for name, of_class in outcome.spent.items()}


def add_once(
    job: Job, shape: Shape, stage: Stage, costs: Sequence[Costs], tokens: int, crowded: float,
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


def sum_seconds(job: Job, shape: Shape, stage: Stage) -> float:
    """Return the seconds of all-reduces of gradients by rings: dense parts over all ranks, experts over data-parallel."""
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


def count_exchanges(job: Job) -> int:
    """Count how often rows go one way or back in a step, over all layers and micro-batches."""
    return len(job.loads) * job.micro_batches * (4 if job.trains else 2)


def find_demands(
    job: Job, shape: Shape, stage: Stage, costs: Sequence[Costs], tokens: int, parts: Mapping[str, float]
) -> dict[str, float]:
    """Find how long the busiest rank, and each resource of the fabric, is busy in a step at least, the longest first."""
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
