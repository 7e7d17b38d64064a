"""What is known of the nodes and of what joins them, and the file that keeps it for the next run."""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcmoe.errors import ClusterError, ConfigError
from hpcmoe.reading import read_json

# What a file of an earlier version lacks.
PORTS_TAKEN = "not given, taken as the largest of bytes_per_second"
NO_UPLINKS = "not given, taken as without limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLinks:
    """What joins the nodes."""

    bytes_per_second: np.ndarray  # [nodes, nodes] float64, a pair alone; the diagonal is within the node
    latency_seconds: np.ndarray  # [nodes, nodes] float64, one way
    egress_bytes_per_second: np.ndarray  # [nodes] float64, what a node's port sends in all
    ingress_bytes_per_second: np.ndarray  # [nodes] float64, what a node's port receives in all
    uplink_bytes_per_second: np.ndarray  # [racks] float64, what leaves, and as much what enters; inf: no limit known


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology(ClusterLinks):
    """The cluster as this run sees it, the same on all ranks; nodes and racks are numbered by their lowest rank."""

    node_of_rank: np.ndarray  # [P] int64
    node_names: tuple[str, ...]  # [nodes], all different
    rack_of_node: np.ndarray  # [nodes] int64
    rack_names: tuple[str, ...]  # [racks]
    memory_bytes: np.ndarray  # [nodes] int64
    devices_of_node: np.ndarray  # [nodes] int64, CUDA devices
    cores_of_node: np.ndarray  # [nodes] int64, those that the node's ranks may use
    device_memory_bytes: np.ndarray = field(  # [nodes] int64, free on its ranks' GPUs when they were opened; [0] before
        default_factory=lambda: np.zeros(0, np.int64)
    )
    source: dict[str, str]  # fact -> where it came from

    @property
    def num_nodes(self) -> int:
        """Return the number of nodes."""
        return len(self.node_names)

    @property
    def num_racks(self) -> int:
        """Return the number of racks."""
        return len(self.rack_names)

    def __str__(self) -> str:
        """Return the numbers of ranks, nodes and racks in words."""
        counts = {"rank": len(self.node_of_rank), "node": self.num_nodes, "rack": self.num_racks}
        ranks, nodes, racks = (f"{number} {noun}{'s' * (number != 1)}" for noun, number in counts.items())
        return f"{ranks} on {nodes} in {racks}"

    def ranks_of_node(self, node: int) -> np.ndarray:
        """Return the ranks on a node -> [ranks] int64, ascending."""
        return np.flatnonzero(self.node_of_rank == node)


def find_port_maxima(bytes_per_second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each node's fastest link out and in, for its port where no more is known -> (egress, ingress), [nodes].

    A node alone has no link: its port is what it has within.
    """
    between = bytes_per_second.copy()
    if len(between) > 1:
        np.fill_diagonal(between, 0.0)
    return between.max(axis=1), between.max(axis=0)


def save_topology(topology: Topology, path: str | pathlib.Path) -> None:
    """Write a topology as JSON, keyed by the nodes' names: under a temporary name, renamed when whole."""
    # Key all facts by the nodes' and racks' names.
    names = topology.node_names
    nodes = {
        name: {
            "rack": topology.rack_names[topology.rack_of_node[node]],
            "ranks": topology.ranks_of_node(node).tolist(),
            "memory_bytes": int(topology.memory_bytes[node]),
            "devices": int(topology.devices_of_node[node]),
            "cores": int(topology.cores_of_node[node]),
            "egress_bytes_per_second": float(topology.egress_bytes_per_second[node]),
            "ingress_bytes_per_second": float(topology.ingress_bytes_per_second[node]),
        }
        for node, name in enumerate(names)
    }
    uplinks = [rate if math.isfinite(rate) else None for rate in topology.uplink_bytes_per_second.tolist()]
    tree: dict[str, dict] = {"nodes": nodes, "source": topology.source}
    tree["uplink_bytes_per_second"] = dict(zip(topology.rack_names, uplinks, strict=True))
    for key in ("bytes_per_second", "latency_seconds"):
        rows = getattr(topology, key).tolist()
        tree[key] = {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)}

    # Write and rename.
    try:
        part = pathlib.Path(f"{path}.part")
        part.write_text(_format_tree(tree), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written: {error.strerror}") from None


def _format_tree(tree: dict[str, dict]) -> str:
    """Format a tree as JSON with a line for each entry of its second level."""
    chapters = []
    for key, entries in tree.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        chapters.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(chapters) + "\n}\n"


def load_topology(path: str | pathlib.Path) -> Topology:
    """Read what save_topology wrote, in this version or an earlier one.

    Raises ClusterError that names what is wrong with the file.
    """
    tree = read_topology_tree(path)
    with naming_file(path):
        return make_saved_topology(tree)


def read_topology_tree(path: str | pathlib.Path) -> Any:
    """Read a file's JSON. Raises ClusterError that names what is wrong with the file."""
    try:
        return read_json(path)
    except ConfigError as error:
        raise ClusterError(str(error)) from None


@contextlib.contextmanager
def naming_file(path: str | pathlib.Path) -> Iterator[None]:
    """Raise what Python raises about a missing or strange entry of a file as a ClusterError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ClusterError(f"{path}: not a topology file: {type(error).__name__} {error}") from None


def make_saved_topology(tree: dict[str, Any]) -> Topology:
    """Return the Topology of a file's tree; a missing or strange entry raises what Python raises."""
    # Read links by pairs of names, ports and uplinks where the file has them.
    names, nodes = tuple(tree["nodes"]), list(tree["nodes"].values())
    rack_names = tuple(dict.fromkeys(node["rack"] for node in nodes))
    matrices = {
        key: np.array([[tree[key][a][b] for b in names] for a in names], np.float64)
        for key in ("bytes_per_second", "latency_seconds")
    }
    ports, guesses = read_ports(tree, nodes, rack_names, matrices["bytes_per_second"])

    # Number nodes and racks in the file's order.
    keys = {"memory_bytes": "memory_bytes", "devices_of_node": "devices", "cores_of_node": "cores"}
    return Topology(
        node_of_rank=number_ranks([node["ranks"] for node in nodes]),
        node_names=names,
        rack_of_node=np.array([rack_names.index(node["rack"]) for node in nodes], np.int64),
        rack_names=rack_names,
        source={str(fact): str(origin) for fact, origin in tree["source"].items()} | guesses,
        **{name: np.array([node[key] for node in nodes], np.int64) for name, key in keys.items()},
        **matrices,
        **ports,
    )


def number_ranks(ranks_of_node: Sequence[Sequence[int]]) -> np.ndarray:
    """Return node_of_rank [P] from each node's ranks; ValueError unless they are 0 to P - 1, once each."""
    ranks = [rank for of_node in ranks_of_node for rank in of_node]
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"the ranks are not 0 to {len(ranks) - 1}, once each")
    nodes = np.repeat(np.arange(len(ranks_of_node)), [len(of_node) for of_node in ranks_of_node])
    return nodes[np.argsort(ranks)]


def read_ports(
    tree: dict[str, Any], nodes: list[dict], rack_names: tuple[str, ...], bytes_per_second: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read ports and uplinks, or what stands for them in an older file -> (arrays by name, source)."""
    # Read ports, or take the fastest links.
    source: dict[str, str] = {}
    egress, ingress = find_port_maxima(bytes_per_second)
    ports = {"egress_bytes_per_second": egress, "ingress_bytes_per_second": ingress}
    if "egress_bytes_per_second" in nodes[0]:
        ports = {key: np.array([float(node[key]) for node in nodes]) for key in ports}
    else:
        source["ports"] = PORTS_TAKEN

    # Read uplinks, of which null has no limit.
    ports["uplink_bytes_per_second"] = np.full(len(rack_names), np.inf)
    if "uplink_bytes_per_second" in tree:
        rates = [tree["uplink_bytes_per_second"][rack] for rack in rack_names]
        ports["uplink_bytes_per_second"] = np.array([np.inf if rate is None else rate for rate in rates], np.float64)
    else:
        source["uplinks"] = NO_UPLINKS
    return ports, source
