"""What could be run: shapes on numbers of nodes, each foretold, with the memory of its ranks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hpcmoe.cluster.topology import Topology
from hpcmoe.errors import ConfigError
from hpcmoe.messages import show_value
from hpcmoe.projection.cluster_file import DescribedCluster
from hpcmoe.projection.predict import Prediction, predict
from hpcmoe.projection.step import ITEM_BYTES, PlannedJob, Shape

_SERIES = re.compile(r"(\d+)(?::(\d+)(?::x(\d+))?)?")
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_CHANGE = re.compile(r"(\w+)=x(\d+(?:\.\d+)?)")
_MOST = 512  # candidates of one question
_MASTER_BYTES = 4  # of a parameter in training, as of its gradient and both moments
VARIED = ("nic", "uplink", "latency", "compute", "batch", "micro_batches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A shape foretold, and what its ranks need of memory."""

    what: str  # of a --vary; "" as described
    prediction: Prediction
    memory_bytes: float  # of a rank
    available_bytes: float  # that a rank has

    @property
    def fits(self) -> bool:
        """Return True if a rank's memory holds what it needs."""
        return self.memory_bytes <= self.available_bytes


def parse_nodes(word: str) -> list[int]:
    """Parse "4", "1:8" or "1:512:x2" -> numbers of nodes. Raises ConfigError."""
    match = _SERIES.fullmatch(word)
    first, last, factor = (int(part) if part else 0 for part in match.groups()) if match else (0, 0, 0)
    if first < 1 or (match and match[2] and last < first) or (match and match[3] and factor < 2):
        raise ConfigError(f"--nodes {show_value(word)}: must be a number, 1:8, or 1:512:x2")
    numbers, number = [first], first
    while len(numbers) < _MOST and (number := number * factor if factor else number + 1) <= last:
        numbers.append(number)
    return numbers


def parse_shapes(word: str, num_ranks: int, num_experts: int, feed_forward: int) -> list[Shape]:
    """Parse "all" or "8x32x1,4x64x1", data x expert x tensor -> shapes of so many ranks. Raises ConfigError."""
    if word == "all":
        return list_shapes(num_ranks, num_experts, feed_forward)
    shapes = []
    for part in word.split(","):
        match = _SHAPE.fullmatch(part.strip())
        if not match or 0 in map(int, match.groups()):
            raise ConfigError(f"--shapes {show_value(part)}: must be all, or data x expert x tensor as 8x32x1")
        data, expert, tensor = map(int, match.groups())
        if feed_forward % tensor:
            raise ConfigError(f"--shapes {part}: {tensor} must divide the feed_forward {feed_forward}")
        shapes.append(Shape(data=data, expert=expert, tensor=tensor))
    return shapes


def list_shapes(num_ranks: int, num_experts: int, feed_forward: int) -> list[Shape]:
    """List the shapes of so many ranks: no more ranks than experts share them, tensor-parallel up to 8."""
    shapes = []
    for tensor in (1, 2, 4, 8):
        if num_ranks % tensor or feed_forward % tensor:
            continue
        groups = num_ranks // tensor
        for expert in (size for size in range(1, min(groups, num_experts) + 1) if groups % size == 0):
            shapes.append(Shape(data=groups // expert, expert=expert, tensor=tensor))
    return shapes[:_MOST]


def choose_shape(num_ranks: int, num_experts: int) -> Shape:
    """Choose a shape where none is asked for: experts over as many ranks as they allow."""
    most = max(size for size in range(1, min(num_ranks, num_experts) + 1) if num_ranks % size == 0)
    return Shape(data=num_ranks // most, expert=most, tensor=1)


def vary(word: str, job: PlannedJob, cluster: DescribedCluster) -> tuple[PlannedJob, DescribedCluster]:
    """Scale one thing by a factor, as nic=x2 -> the job and the cluster with it. Raises ConfigError."""
    match = _CHANGE.fullmatch(word)
    if not match or match[1] not in VARIED or not float(match[2]) > 0:
        raise ConfigError(f"--vary {show_value(word)}: must be a factor of {', '.join(VARIED)}, as nic=x2")
    name, factor, topology = match[1], float(match[2]), cluster.topology
    match name:
        case "nic":
            return job, replace(cluster, topology=scale_ports(topology, factor))
        case "uplink":
            return job, replace(
                cluster, topology=replace(topology, uplink_bytes_per_second=topology.uplink_bytes_per_second * factor)
            )
        case "latency":
            return job, replace(cluster, topology=replace(topology, latency_seconds=topology.latency_seconds * factor))
        case "compute":
            return replace(job, faster=job.faster * factor), cluster
        case "batch":
            return replace(job, batch_sequences=max(round(job.batch_sequences * factor), 1)), cluster
        case _:
            number = min(max(round(job.micro_batches * factor), 1), job.batch_sequences)
            return replace(job, micro_batches=number, in_flight=max(job.in_flight, min(number, 2))), cluster


def scale_ports(topology: Topology, factor: float) -> Topology:
    """Return a topology whose ports and links between nodes are so many times as fast."""
    links = topology.bytes_per_second * factor
    np.fill_diagonal(links, np.diag(topology.bytes_per_second))
    return replace(
        topology,
        bytes_per_second=links,
        egress_bytes_per_second=topology.egress_bytes_per_second * factor,
        ingress_bytes_per_second=topology.ingress_bytes_per_second * factor,
    )


def estimate_rank_bytes(job: PlannedJob, shape: Shape, prediction: Prediction) -> float:
    """Estimate the bytes of the fullest rank: parameters with their state, activations, and rows in flight."""
    sizes, item = job.sizes, ITEM_BYTES[job.dtype]
    layers = len(job.loads)
    held = (-(-sizes.num_experts // shape.expert) + job.spare_slots) * sizes.expert_parameters / shape.tensor
    parameters = layers * (held + sizes.layer_parameters) + sizes.outer_parameters
    states = 4 * _MASTER_BYTES if job.trains else item
    casts = item if job.trains and item < _MASTER_BYTES else 0
    tokens, rows = prediction.rank_tokens, sizes.top_k * shape.tensor
    fullest = 1 + 3 * prediction.sigma  # of the rows of an even load
    of_token = 12 * sizes.hidden * _MASTER_BYTES + rows * fullest * item * (
        sizes.row_width + 2 * sizes.feed_forward / shape.tensor
    )
    kept = layers if job.trains else 1
    buffers = 2 * rows * (1 + fullest) * sizes.row_width * item
    head = tokens * sizes.vocabulary * _MASTER_BYTES if job.trains else 0
    return parameters * (states + casts) + prediction.in_flight * tokens * (kept * of_token + buffers) + head


def find_available_bytes(cluster: DescribedCluster) -> float:
    """Return the memory that a rank has, on the node that has least: its GPU's, else its part of the node's."""
    topology = cluster.topology
    ranks = np.maximum(np.bincount(topology.node_of_rank, minlength=topology.num_nodes), 1)
    device = topology.device_memory_bytes
    there = device if device.size and device.any() else topology.memory_bytes
    return float((there / ranks).min())


def foretell(
    job: PlannedJob,
    cluster: DescribedCluster,
    nodes: Sequence[int],
    shapes: str | None,
    changes: Sequence[str],
    given: Shape | None,
) -> list[Candidate]:
    """Predict every shape on every number of nodes, as described and with each change. Raises ConfigError."""
    candidates = []
    for number in nodes:
        sized = cluster.resize(number) if number != cluster.topology.num_nodes else cluster
        num_ranks = len(sized.topology.node_of_rank)
        asked = (
            parse_shapes(shapes, num_ranks, job.sizes.num_experts, job.sizes.feed_forward)
            if shapes
            else [given or choose_shape(num_ranks, job.sizes.num_experts)]
        )
        for word in ("", *changes):
            changed, there = vary(word, job, sized) if word else (job, sized)
            for shape in asked:
                candidates.append(make_candidate(word, changed, there, shape))
        if len(candidates) > _MOST:
            raise ConfigError(f"--nodes, --shapes, --vary: more than {_MOST} candidates")
    return candidates


def make_candidate(what: str, job: PlannedJob, cluster: DescribedCluster, shape: Shape) -> Candidate:
    """Predict one shape, and what its ranks need."""
    prediction = predict(job, cluster, shape)
    memory = estimate_rank_bytes(job, shape, prediction)
    return Candidate(
        what=what, prediction=prediction, memory_bytes=memory, available_bytes=find_available_bytes(cluster)
    )
