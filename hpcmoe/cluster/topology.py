"""What is known of the nodes and of what joins them, and the file that keeps it for the next run."""

import contextlib
import json
import math
import pathlib
from dataclasses import dataclass, field

import numpy as np

from hpcmoe.errors import ClusterError

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
class Topology:
    """The cluster as this run sees it, the same on all ranks; nodes and racks are numbered by their lowest rank."""

    node_of_rank: np.ndarray  # [P] int64
    node_names: tuple[str, ...]  # [nodes], all different
    rack_of_node: np.ndarray  # [nodes] int64
    rack_names: tuple[str, ...]  # [racks]
    bytes_per_second: np.ndarray  # [nodes, nodes] float64; the diagonal is within the node
    latency_seconds: np.ndarray  # [nodes, nodes] float64, one way
    egress_bytes_per_second: np.ndarray  # [nodes] float64, what a node's port sends in all
    ingress_bytes_per_second: np.ndarray  # [nodes] float64, what a node's port receives in all
    uplink_bytes_per_second: np.ndarray  # [racks] float64, what leaves, and as much what enters; inf: no limit known
    memory_bytes: np.ndarray  # [nodes] int64
    devices_of_node: np.ndarray  # [nodes] int64, CUDA devices
    cores_of_node: np.ndarray  # [nodes] int64, those that the node's ranks may use
    device_memory_bytes: np.ndarray = field(  # [nodes] int64, free on its ranks' GPUs when they were opened; [0] before
        default_factory=lambda: np.zeros(0, np.int64)
    )
    source: dict[str, str]  # fact -> where it came from

    @property
    def num_nodes(self):
        """Number of nodes."""
        return len(self.node_names)

    @property
    def num_racks(self):
        """Number of racks."""
        return len(self.rack_names)

    def __str__(self):
        """Count the ranks, nodes and racks in words."""
        counts = {"rank": len(self.node_of_rank), "node": self.num_nodes, "rack": self.num_racks}
        ranks, nodes, racks = (f"{number} {noun}{'s' * (number != 1)}" for noun, number in counts.items())
        return f"{ranks} on {nodes} in {racks}"

    def ranks_of_node(self, node):
        """List the ranks on a node -> [ranks] int64, ascending."""
        return np.flatnonzero(self.node_of_rank == node)


def port_maxima(bytes_per_second):
    """Take each node's fastest link out and in for its port, where no more is known -> (egress, ingress), [nodes] each.

    A node alone has no link: its port is what it has within.
    """
    between = bytes_per_second.copy()
    if len(between) > 1:
        np.fill_diagonal(between, 0.0)
    return between.max(axis=1), between.max(axis=0)


def save_topology(topology, path):
    """Write a topology as JSON, keyed by the nodes' names: under a temporary name, renamed when whole."""
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
    tree = {"nodes": nodes, "source": topology.source}
    tree["uplink_bytes_per_second"] = dict(zip(topology.rack_names, uplinks, strict=True))
    for key in ("bytes_per_second", "latency_seconds"):
        tree[key] = {
            name: dict(zip(names, row.tolist(), strict=True))
            for name, row in zip(names, getattr(topology, key), strict=True)
        }

    try:
        part = pathlib.Path(f"{path}.part")
        part.write_text(lay_out(tree), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be written: {error.strerror}") from None


def lay_out(tree):
    """Write a tree as JSON with a line for each entry of its second level."""
    chapters = []
    for key, entries in tree.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        chapters.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(chapters) + "\n}\n"


def load_topology(path):
    """Read back what save_topology wrote, in this version or an earlier one -> Topology.

    Raises ClusterError that says what is wrong with the file.
    """
    tree = read_tree(path)
    with naming_file(path):
        return make_saved_topology(tree)


def read_tree(path):
    """Read a file's JSON -> its tree. Raises ClusterError that says what is wrong with the file."""
    with naming_file(path):
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def naming_file(path):
    """Turn what Python raises about a file, or about a missing or strange entry of it, into a ClusterError."""
    try:
        yield
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ClusterError(f"{path}: not a topology file: {type(error).__name__} {error}") from None


def make_saved_topology(tree):
    """Make a Topology of a file's tree; a missing or strange entry raises what Python raises."""
    nodes = list(tree["nodes"].values())
    names = tuple(tree["nodes"])
    rack_names = tuple(dict.fromkeys(node["rack"] for node in nodes))
    bytes_per_second = np.array([[tree["bytes_per_second"][a][b] for b in names] for a in names], np.float64)
    egress, ingress, uplink, guesses = read_ports(tree, nodes, rack_names, bytes_per_second)
    return Topology(
        node_of_rank=number_ranks([node["ranks"] for node in nodes]),
        node_names=names,
        rack_of_node=np.array([rack_names.index(node["rack"]) for node in nodes], np.int64),
        rack_names=rack_names,
        bytes_per_second=bytes_per_second,
        latency_seconds=np.array([[tree["latency_seconds"][a][b] for b in names] for a in names], np.float64),
        egress_bytes_per_second=egress,
        ingress_bytes_per_second=ingress,
        uplink_bytes_per_second=uplink,
        memory_bytes=np.array([node["memory_bytes"] for node in nodes], np.int64),
        devices_of_node=np.array([node["devices"] for node in nodes], np.int64),
        cores_of_node=np.array([node["cores"] for node in nodes], np.int64),
        source={str(fact): str(origin) for fact, origin in tree["source"].items()} | guesses,
    )


def number_ranks(ranks_of_node):
    """Turn each node's list of ranks around -> node_of_rank [P]; ValueError unless they are 0 to P - 1, once each."""
    ranks = [rank for of_node in ranks_of_node for rank in of_node]
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"the ranks are not 0 to {len(ranks) - 1}, once each")
    nodes = np.repeat(np.arange(len(ranks_of_node)), [len(of_node) for of_node in ranks_of_node])
    return nodes[np.argsort(ranks)]


def read_ports(tree, nodes, rack_names, bytes_per_second):
    """Read ports and uplinks, or take what stands for them in an older file -> (egress, ingress, uplink, source)."""
    source = {}
    egress, ingress = port_maxima(bytes_per_second)
    if "egress_bytes_per_second" in nodes[0]:
        egress = np.array([float(node["egress_bytes_per_second"]) for node in nodes])
        ingress = np.array([float(node["ingress_bytes_per_second"]) for node in nodes])
    else:
        source["ports"] = PORTS_TAKEN

    uplink = np.full(len(rack_names), np.inf)
    if "uplink_bytes_per_second" in tree:
        rates = [tree["uplink_bytes_per_second"][rack] for rack in rack_names]
        uplink = np.array([np.inf if rate is None else rate for rate in rates], np.float64)
    else:
        source["uplinks"] = NO_UPLINKS
    return egress, ingress, uplink, source
