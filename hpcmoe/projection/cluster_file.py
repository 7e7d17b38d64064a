"""A cluster read from cluster.toml, which describes it in ten lines, or from the topology.json of a run."""

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval, MinLen
from pydantic import BeforeValidator

from hpcmoe.cluster.topology import NO_UPLINKS, ClusterLinks, Topology, load_topology
from hpcmoe.errors import ConfigError
from hpcmoe.messages import join_lines, one_line, show_value
from hpcmoe.projection.processors import Processor, find_gpu
from hpcmoe.projection.units import parse_quantity
from hpcmoe.reading import read_toml
from hpcmoe.sections import section
from hpcmoe.validate import validate_table

_Count = Annotated[int, Interval(ge=1, le=2**20)]
_Rate = Annotated[float, BeforeValidator(partial(parse_quantity, kind="bytes_per_second"))]
_Bytes = Annotated[float, BeforeValidator(partial(parse_quantity, kind="bytes"))]
_Flops = Annotated[float, BeforeValidator(partial(parse_quantity, kind="flops"))]
_Seconds = Annotated[float, BeforeValidator(partial(parse_quantity, kind="seconds"))]
_RATIO = re.compile(r"([0-9]+(?:\.[0-9]+)?) *: *1")
_MOST_NODES = 4096  # of a cluster: what joins each pair of them is an entry of a matrix
_MOST_RANKS = 2**20
# What is taken where a file does not say.
_LATENCY_SECONDS = 5e-6
_FLOPS_OF_CORE, _RATE_OF_CORE, _BYTES_OF_CORE = 40e9, 4e9, 4 * 2**30
_HOST_BYTES_OF_GPU = 2.0  # times a GPU's own


@section
class NetworkTable:
    """The keys of cluster.toml besides its nodes."""

    racks: _Count = 1  # nodes fill them in order, as evenly as they can
    uplink: str | float | None = None  # of a rack, each way, or "2:1", the rack's NICs to its uplink; None: no limit
    latency: _Seconds | None = None  # one way, between nodes
    latency_between_racks: _Seconds | None = None  # one way; None: as within one


@section
class NodesTable:
    """The keys of [nodes], or of each [[nodes]] where nodes differ: nodes of one kind."""

    count: _Count
    nic: _Rate | None = None  # of a node in all, each way; None: a node alone
    gpus: _Count | None = None  # of a node, a rank each
    cores: _Count | None = None  # of a node without GPUs, a rank each
    gpu: Annotated[str, MinLen(1)] | None = None  # a name of the sheet
    flops: _Flops | None = None  # of a GPU or core, at most, in the precision that is computed in
    memory_rate: _Rate | None = None  # of a GPU, or of a node without GPUs
    memory: _Bytes | None = None  # of a GPU, or of a node without GPUs
    host_memory: _Bytes | None = None  # of a node with GPUs
    within: _Rate | None = None  # of a GPU or core, one way, to the others of its node


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedCluster:
    """A cluster to foretell steps on, described or real."""

    topology: Topology  # a rank for each GPU, or core where there are none; in a real one the ranks of its run
    processors: tuple[Processor | None, ...]  # [nodes], of each of its ranks; None: not known
    network: NetworkTable | None  # None where it is real
    kinds: tuple[NodesTable, ...] = ()

    def resize(self, num_nodes: int) -> "DescribedCluster":
        """Return the same cluster with other nodes: kinds in the same proportions, racks as full as they are.

        Of a real one its first nodes. Raises ConfigError where it cannot have as many.
        """
        if num_nodes < 1:
            raise ConfigError(f"{num_nodes} nodes: must be at least 1")
        if self.network is None:
            return self._cut(num_nodes)
        whole = sum(kind.count for kind in self.kinds)
        ends = [
            round(sum(kind.count for kind in self.kinds[: i + 1]) * num_nodes / whole) for i in range(len(self.kinds))
        ]
        counts = np.diff([0, *ends[:-1], num_nodes]).tolist()
        kinds = tuple(replace(kind, count=count) for kind, count in zip(self.kinds, counts, strict=True) if count)
        of_rack = -(-whole // self.network.racks)
        return make_cluster(replace(self.network, racks=-(-num_nodes // of_rack)), kinds, "the cluster")

    def _cut(self, num_nodes: int) -> "DescribedCluster":
        """Return a real cluster's first nodes."""
        topology = self.topology
        if num_nodes > topology.num_nodes:
            raise ConfigError(
                f"{num_nodes} nodes: the topology.json of a run has {topology.num_nodes}; a cluster.toml can have more"
            )
        racks = int(topology.rack_of_node[:num_nodes].max()) + 1
        arrays = ("egress_bytes_per_second", "ingress_bytes_per_second", "rack_of_node", "memory_bytes",
                  "devices_of_node", "cores_of_node", "node_names")  # fmt: skip
        cut = replace(
            topology,
            bytes_per_second=topology.bytes_per_second[:num_nodes, :num_nodes],
            latency_seconds=topology.latency_seconds[:num_nodes, :num_nodes],
            uplink_bytes_per_second=topology.uplink_bytes_per_second[:racks],
            rack_names=topology.rack_names[:racks],
            node_of_rank=topology.node_of_rank[topology.node_of_rank < num_nodes],
            **{name: getattr(topology, name)[:num_nodes] for name in arrays},
        )
        return replace(self, topology=cut, processors=self.processors[:num_nodes])


def read_cluster(path: str | os.PathLike) -> DescribedCluster:
    """Read a cluster.toml, or a topology.json of a run. Raises ConfigError or ClusterError, one line an error."""
    if os.fspath(path).lower().endswith(".json"):
        topology = load_topology(os.fspath(path))
        return DescribedCluster(topology=topology, processors=(None,) * topology.num_nodes, network=None)
    tree, _ = read_toml(path)
    where = f"{one_line(path)}: "
    tables = tree.pop("nodes", None)
    tables = [tables] if isinstance(tables, dict) else tables
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise ConfigError(f"{where}nodes = {show_value(tables)}: must be a table [nodes], or [[nodes]] for each kind")

    # Check each table by itself, then the whole.
    lines: list[str] = []

    def collect(cls: type, table: dict[str, Any], place: str) -> Any:
        """Return a table's dataclass, or keep its errors."""
        try:
            return validate_table(cls, table, place)
        except ConfigError as error:
            lines.extend(str(error).splitlines())

    network = collect(NetworkTable, tree, where)
    names = [f"{where}[nodes] " if len(tables) == 1 else f"{where}[[nodes]] {i + 1}: " for i in range(len(tables))]
    kinds = [collect(NodesTable, table, name) for table, name in zip(tables, names, strict=True)]
    lines += [f"{name}{line}" for kind, name in zip(kinds, names, strict=True) if kind for line in find_wrong(kind)]
    if lines:
        raise ConfigError(join_lines(lines))
    return make_cluster(network, tuple(kinds), one_line(path))


def find_wrong(kind: NodesTable) -> list[str]:
    """Find what of a kind of nodes does not go together -> lines."""
    lines = []
    if (kind.gpus is None) == (kind.cores is None):
        lines.append("gpus or cores: must have one of them, of a node")
    if kind.cores is not None and kind.gpus is None:
        given = [key for key in ("gpu", "host_memory") if getattr(kind, key) is not None]
        lines += [f"{key} = {show_value(getattr(kind, key))}: needs gpus, not cores" for key in given]
    if kind.gpus is not None and kind.gpu is None:
        missing = [key for key in ("flops", "memory_rate", "memory") if getattr(kind, key) is None]
        lines += [
            f'gpu: missing; a name such as "H100", or flops, memory_rate and memory ({", ".join(missing)})'
        ] * bool(missing)
    return lines


def make_cluster(network: NetworkTable, kinds: tuple[NodesTable, ...], path: str) -> DescribedCluster:
    """Make a cluster of checked tables. Raises ConfigError in one line."""
    check_counts(network, kinds, path)
    kind_of_node = np.repeat(np.arange(len(kinds)), [kind.count for kind in kinds])
    num_nodes, of_node = len(kind_of_node), np.array([kind.gpus or kind.cores for kind in kinds])[kind_of_node]
    processors = [make_processor(kind, f"{path}: gpu") for kind in kinds]
    pairs = list(zip(kinds, processors, strict=True))
    links = make_described_links(network, kinds, processors, kind_of_node, path)
    topology = Topology(
        **{name: getattr(links, name) for name in ClusterLinks.__dataclass_fields__},
        node_of_rank=np.repeat(np.arange(num_nodes), of_node),
        node_names=tuple(f"n{node:0{len(str(num_nodes - 1))}}" for node in range(num_nodes)),
        rack_of_node=find_rack_of_node(num_nodes, network.racks),
        rack_names=tuple(f"rack{rack}" for rack in range(network.racks)),
        memory_bytes=np.array([find_host_bytes(kind, processor) for kind, processor in pairs])[kind_of_node],
        devices_of_node=np.array([kind.gpus or 0 for kind in kinds])[kind_of_node],
        cores_of_node=of_node.copy(),
        device_memory_bytes=np.array([int(p.memory_bytes) * (kind.gpus or 0) for kind, p in pairs])[kind_of_node],
        source=describe_source(network, path),
    )
    of_nodes = tuple(processors[kind] for kind in kind_of_node)
    return DescribedCluster(topology=topology, processors=of_nodes, network=network, kinds=kinds)


def check_counts(network: NetworkTable, kinds: tuple[NodesTable, ...], path: str) -> None:
    """Raise ConfigError where a cluster is too large, or has more racks than nodes, or nodes that nothing joins."""
    num_nodes = sum(kind.count for kind in kinds)
    num_ranks = sum(kind.count * (kind.gpus or kind.cores or 0) for kind in kinds)
    for has, most, what in ((num_nodes, _MOST_NODES, "nodes"), (num_ranks, _MOST_RANKS, "ranks")):
        if has > most:
            raise ConfigError(f"{path}: {has} {what}: must be at most {most}")
    if network.racks > num_nodes:
        raise ConfigError(f"{path}: racks = {network.racks}: must be at most the {num_nodes} nodes")
    for number, kind in enumerate(kinds):
        if kind.nic is None and num_nodes > 1:
            raise ConfigError(f"{path}: [[nodes]] {number + 1}: nic: missing; what a node sends and receives in all")


def find_rack_of_node(num_nodes: int, num_racks: int) -> np.ndarray:
    """Return the rack of each node, filled in order as evenly as they can -> [nodes] int64."""
    return np.arange(num_nodes) * num_racks // num_nodes


def make_described_links(
    network: NetworkTable,
    kinds: tuple[NodesTable, ...],
    processors: list[Processor],
    kind_of_node: np.ndarray,
    path: str,
) -> ClusterLinks:
    """Make what joins the nodes; a node alone has its own memory as its port. Raises ConfigError in one line."""
    within = np.array([processor.link_bytes_per_second for processor in processors])[kind_of_node]
    given = np.array([kind.nic or np.inf for kind in kinds])[kind_of_node]
    ports = np.where(np.isfinite(given), given, within)
    rack_of_node = find_rack_of_node(len(kind_of_node), network.racks)
    uplinks = find_uplinks(network, ports, rack_of_node, path)

    # A pair of nodes alone has what the slower port lets through, and between racks the slower uplink.
    rates = np.minimum.outer(ports, ports)
    crosses, through = np.not_equal.outer(rack_of_node, rack_of_node), uplinks[rack_of_node]
    rates[crosses] = np.minimum(rates, np.minimum.outer(through, through))[crosses]
    np.fill_diagonal(rates, within)
    near = _LATENCY_SECONDS if network.latency is None else network.latency
    far = near if network.latency_between_racks is None else network.latency_between_racks
    latency = np.where(crosses, far, near)
    np.fill_diagonal(latency, 0.0)
    return ClusterLinks(
        bytes_per_second=rates,
        latency_seconds=latency,
        egress_bytes_per_second=ports,
        ingress_bytes_per_second=ports.copy(),
        uplink_bytes_per_second=uplinks,
    )


def make_processor(kind: NodesTable, where: str) -> Processor:
    """Make the processor of a rank on a kind of nodes; figures given replace those of the sheet. Raises ConfigError."""
    if kind.cores is None:
        sheet = None if kind.gpu is None else find_gpu(kind.gpu, where)
        rate = kind.memory_rate or (sheet.memory_bytes_per_second if sheet else 0.0)
        given = [key for key in ("flops", "memory_rate", "memory", "within") if getattr(kind, key) is not None]
        return Processor(
            name=sheet.name if sheet else "GPU",
            flops={"float32": kind.flops} if kind.flops else sheet.flops if sheet else {},
            memory_bytes_per_second=rate,
            memory_bytes=kind.memory or (sheet.memory_bytes if sheet else 0.0),
            link_bytes_per_second=kind.within or (sheet.link_bytes_per_second if sheet else rate / 8),
            is_gpu=True,
            source=", ".join(
                filter(None, [sheet.source if sheet else "", f"{', '.join(given)} as given" if given else ""])
            ),
        )

    # A core has its part of the node's memory; what is not given is taken.
    missing = [key for key in ("flops", "memory_rate", "memory") if getattr(kind, key) is None]
    rate = kind.memory_rate / kind.cores if kind.memory_rate else _RATE_OF_CORE
    return Processor(
        name="core",
        flops={"float32": kind.flops or _FLOPS_OF_CORE},
        memory_bytes_per_second=rate,
        memory_bytes=kind.memory / kind.cores if kind.memory else _BYTES_OF_CORE,
        link_bytes_per_second=kind.within or rate / 2,  # read here and written there
        is_gpu=False,
        source="as given" + f", {', '.join(missing)} not given and taken" * bool(missing),
    )


def find_host_bytes(kind: NodesTable, processor: Processor) -> int:
    """Return the bytes of a node's own memory; not given, twice its GPUs'."""
    own = processor.memory_bytes * (kind.gpus or kind.cores or 1)
    return int(kind.host_memory or own * (_HOST_BYTES_OF_GPU if kind.gpus else 1.0))


def find_uplinks(network: NetworkTable, ports: np.ndarray, rack_of_node: np.ndarray, path: str) -> np.ndarray:
    """Find what leaves each rack -> bytes/s [racks], inf: no limit. Raises ConfigError in one line."""
    given, num_racks = network.uplink, network.racks
    if given is None:
        return np.full(num_racks, np.inf)
    match = _RATIO.fullmatch(given.strip()) if isinstance(given, str) else None
    if match:
        ratio = float(match[1])
        if not ratio > 0:
            raise ConfigError(f"{path}: uplink = {show_value(given)}: must be above 0")
        return np.bincount(rack_of_node, ports, minlength=num_racks) / ratio
    try:
        return np.full(num_racks, parse_quantity(given, "bytes_per_second"))
    except ValueError as error:
        raise ConfigError(f'{path}: uplink = {show_value(given)}: {error}, or a ratio such as "2:1"') from None


def describe_source(network: NetworkTable, path: str) -> dict[str, str]:
    """Describe where each fact of a described cluster came from."""
    taken = "" if network.latency is not None else f"; latency not given, taken as {_LATENCY_SECONDS * 1e6:g} us"
    uplinks = f"described in {path}" if network.uplink is not None else NO_UPLINKS
    return {"links": f"described in {path}{taken}", "ports": f"described in {path}", "uplinks": uplinks}
