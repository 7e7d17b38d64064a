"""The time of a step on a described cluster, what binds it, and where it goes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.errors import ConfigError
from hpcmoe.projection.classes import EACH_RANK, GroupedRanks, class_each, class_kinds, make_fabric
from hpcmoe.projection.cluster_file import DescribedCluster
from hpcmoe.projection.costs import Costs
from hpcmoe.projection.estimated import estimate_costs
from hpcmoe.projection.processors import Processor
from hpcmoe.projection.simulate import Bar
from hpcmoe.projection.spread import sample_layers, spread_experts
from hpcmoe.projection.step import ITEM_BYTES, PlacedShape, PlannedJob, Shape, StepRun, count_exchanges, find_demands

_UNKNOWN = Processor(
    name="core", flops={"float32": 40e9}, memory_bytes_per_second=4e9, memory_bytes=4 * 2.0**30,
    link_bytes_per_second=2e9, is_gpu=False, source="not given, taken",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A step foretold."""

    shape: Shape
    num_nodes: int
    micro_batches: int
    in_flight: int
    tokens: int  # of a step, all ranks
    rank_tokens: int  # of a micro-batch on a rank
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


def predict(job: PlannedJob, cluster: DescribedCluster, shape: Shape, ranks_of_node: int = 0) -> Prediction:
    """Predict one step of a shape; ranks_of_node 0: as many as the cluster has. Raises ConfigError."""
    node_of_rank = assign_nodes(cluster, shape, ranks_of_node)
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
        rank_tokens=tokens,
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


def assign_nodes(cluster: DescribedCluster, shape: Shape, ranks_of_node: int) -> np.ndarray:
    """Choose the nodes of a shape's ranks, in their order -> [P]. Raises ConfigError where there are too few."""
    node_of_rank = cluster.topology.node_of_rank
    if ranks_of_node:
        node_of_rank = np.repeat(np.unique(node_of_rank), ranks_of_node)
    if shape.num_ranks > len(node_of_rank):
        raise ConfigError(f"{shape}: {shape.num_ranks} ranks: the cluster has {len(node_of_rank)}")
    return node_of_rank[: shape.num_ranks]


def find_kinds(cluster: DescribedCluster) -> np.ndarray:
    """Find the kinds of nodes, by what they compute and send with -> [nodes]."""
    topology = cluster.topology
    features = [
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
    return np.array([known.setdefault(feature, len(known)) for feature in features])


def set_stage(
    job: PlannedJob, cluster: DescribedCluster, shape: Shape, node_of_rank: np.ndarray, tokens: int
) -> PlacedShape:
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
    return PlacedShape(
        grouped=grouped,
        topology=topology,
        classes=classes,
        fabric=make_fabric(classes, topology, kind_of_node, node_of_rank, pairs),
        kind_of_node=kind_of_node,
        sigma=float((shares.std(axis=1) / shares.mean(axis=1)).mean()),
    )


def find_costs(job: PlannedJob, cluster: DescribedCluster, shape: Shape, node: int) -> Costs:
    """Return the costs of ops on a node: those measured, else estimated from its processor."""
    if job.costs is not None:
        return job.costs
    experts = job.sizes.num_experts / shape.expert + job.spare_slots
    processor = cluster.processors[node] or _UNKNOWN
    return estimate_costs(processor, job.sizes, experts, job.dtype, job.trains, job.micro_batches)
