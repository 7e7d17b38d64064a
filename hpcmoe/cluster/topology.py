"""Where the ranks are: their nodes, racks, memory, cores, devices and links, each fact with its source."""

import json
import os
import pathlib
import sys
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.links import find_links, measure_links
from hpcmoe.cluster.machine import ask_scontrol, count_cuda_devices, read_memory_bytes
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.wait import barrier, broadcast, gather_to_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The cluster as this run sees it, the same on all ranks; nodes and racks are numbered by their lowest rank."""

    node_of_rank: np.ndarray  # [P] int64
    node_names: tuple[str, ...]  # [nodes], all different
    rack_of_node: np.ndarray  # [nodes] int64
    rack_names: tuple[str, ...]  # [racks]
    bytes_per_second: np.ndarray  # [nodes, nodes] float64; the diagonal is within the node
    latency_seconds: np.ndarray  # [nodes, nodes] float64, one way
    memory_bytes: np.ndarray  # [nodes] int64
    devices_of_node: np.ndarray  # [nodes] int64, CUDA devices
    cores_of_node: np.ndarray  # [nodes] int64, those that the node's ranks may use
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one rank sees of the node it sits on."""

    leader: int  # the node's lowest rank
    name: str
    address: str  # Slurm's path of switches down to the node, "" where there is none
    memory_bytes: int
    devices: frozenset[str]
    cores: frozenset[int]


def check_launcher(comm):
    """Refuse ranks that a launcher started as one job but whose MPI sees each alone: two MPIs are mixed."""
    if comm.size == 1:
        on_root(comm, lambda: refuse_mixed_mpi(os.environ))


def refuse_mixed_mpi(environ):
    """Raise ClusterError when a launcher's variables tell a process alone in its world of more processes."""
    seen = {key: int(environ[key]) for key in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE") if key in environ}
    # SLURM_NTASKS is the whole job's, in a batch script too; only srun's own tasks have a step, and its count.
    if not seen and "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        seen = {"SLURM_STEP_NUM_TASKS": int(environ.get("SLURM_STEP_NUM_TASKS", 1))}
    for key, size in seen.items():
        if size > 1:
            name, version = MPI.get_vendor()
            library = f"{name} {'.'.join(map(str, version))}"
            raise ClusterError(
                f"two MPIs are mixed: the launcher says {key} = {size}, but mpi4py's MPI ({library}) sees 1 rank; "
                "start with the mpirun of that MPI (source .venv/bin/activate), or under Slurm with its srun --mpi type"
            )


def host_name():
    """Name the node this rank is on: as the launcher calls it, else as Slurm does, else as the machine does."""
    # mpirun's proxy sets its own for each node, so that it is right where Slurm's was only handed on.
    return os.environ.get("PMI_HOSTNAME") or os.environ.get("SLURMD_NODENAME") or MPI.Get_processor_name()


def read_topology(comm, cluster):
    """Read where the ranks are, from MPI, Slurm, the system and [cluster] -> Topology. Collective over comm.

    Raises ClusterError on all ranks when [cluster] or a links file does not fit the nodes.
    """
    seats = gather_to_all(comm, read_seat(comm))
    node_of_rank = np.unique([seat.leader for seat in seats], return_inverse=True)[1].astype(np.int64)
    measured = None
    if cluster.links == "measure":
        measured = measure_links(comm, node_of_rank, cluster.measure_seconds)
    return on_root(comm, lambda: make_topology(seats, node_of_rank, cluster, measured))


def read_seat(comm):
    """Look around on this rank's node -> Seat. Collective over comm."""
    barrier(comm)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    leader = broadcast(node, comm.rank)
    node.Free()
    return Seat(
        leader=leader,
        name=host_name(),
        address=os.environ.get("SLURM_TOPOLOGY_ADDR", ""),
        memory_bytes=usable_memory_bytes(),
        devices=visible_devices(),
        cores=frozenset(os.sched_getaffinity(0)),
    )


def make_topology(seats, node_of_rank, cluster, measured):
    """Join all ranks' seats, the config and the measured links, if any -> Topology."""
    seats_of_node = [[] for _ in range(max(node_of_rank) + 1)]
    for node, seat in zip(node_of_rank, seats, strict=True):
        seats_of_node[node].append(seat)
    names = distinct([group[0].name for group in seats_of_node])

    racks, rack_source = find_racks(seats_of_node, names, cluster)
    rack_names = tuple(dict.fromkeys(racks))
    saved = load_topology(cluster.links_file) if cluster.links == "file" else None
    bytes_per_second, latency_seconds, link_source = find_links(cluster, names, measured, saved)
    memory = [cluster.memory_bytes_per_node or min(seat.memory_bytes for seat in group) for group in seats_of_node]
    return Topology(
        node_of_rank=node_of_rank,
        node_names=names,
        rack_of_node=np.array([rack_names.index(rack) for rack in racks], np.int64),
        rack_names=rack_names,
        bytes_per_second=bytes_per_second,
        latency_seconds=latency_seconds,
        memory_bytes=np.array(memory, np.int64),
        devices_of_node=count_of_node(seats_of_node, "devices"),
        cores_of_node=count_of_node(seats_of_node, "cores"),
        source={
            "nodes": "MPI split by shared memory",
            "racks": rack_source,
            "links": link_source,
            "memory": "config" if cluster.memory_bytes_per_node else "system",
            "devices": "system",
            "cores": "system",
        },
    )


def distinct(names):
    """Number the names that come again -> tuple of names, all different."""
    made = []
    for name in names:
        candidates = [name, *(f"{name}.{k}" for k in range(1, len(names)))]
        made.append(next(candidate for candidate in candidates if candidate not in made))
    return tuple(made)


def count_of_node(seats_of_node, fact):
    """Count what a node's ranks see together -> [nodes] int64."""
    return np.array([len(frozenset.union(*(getattr(s, fact) for s in group))) for group in seats_of_node], np.int64)


def usable_memory_bytes():
    """Find how much memory this node's ranks may use: the system's limits, or Slurm's where that is less."""
    allotted_megabytes = int(os.environ.get("SLURM_MEM_PER_NODE", 0))  # 0 is all there is
    return min(read_memory_bytes(), allotted_megabytes * 2**20 or sys.maxsize)


def visible_devices():
    """Name the CUDA devices that this rank may use; two ranks' names of one device are equal."""
    present = frozenset(map(str, range(count_cuda_devices())))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    # Slurm may show each of a node's tasks a device 0 of its own: then its count for the node is the truth.
    if chosen and "SLURM_GPUS_ON_NODE" in os.environ:
        return frozenset(map(str, range(int(os.environ["SLURM_GPUS_ON_NODE"]))))
    return frozenset(chosen.split(",")) - {"", "-1", "NoDevFiles"}


def find_racks(seats_of_node, names, cluster):
    """Name each node's rack: by the config, else by Slurm, else one for all -> (names [nodes], source)."""
    racks = cluster.rack_of_node
    if racks:
        if len(racks) != len(names):
            raise ClusterError(f"[cluster] rack_of_node has {len(racks)} entries, the run has {len(names)} nodes")
        return racks, "config"

    # An address that two nodes share was handed on from where the job began: believe none of them.
    addresses = [{seat.address for seat in group} for group in seats_of_node]
    if all(len(of_node) == 1 for of_node in addresses) and len(set.union(*addresses)) == len(names):
        paths = [of_node.pop().split(".") for of_node in addresses]
        if all(len(path) > 1 for path in paths):
            return [path[-2] for path in paths], "SLURM_TOPOLOGY_ADDR"

    rack_of_name = ask_scontrol() if "SLURM_JOB_ID" in os.environ else {}
    if all(name in rack_of_name for name in names):
        return [rack_of_name[name] for name in names], "scontrol show topology"
    return ["rack0"] * len(names), "no word of racks: one for all"


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
        }
        for node, name in enumerate(names)
    }
    tree = {"nodes": nodes, "source": topology.source}
    for key in ("bytes_per_second", "latency_seconds"):
        tree[key] = {
            name: dict(zip(names, row.tolist(), strict=True))
            for name, row in zip(names, getattr(topology, key), strict=True)
        }

    try:
        part = pathlib.Path(f"{path}.part")
        part.write_text(lay_out(tree), encoding="utf-8")
        part.replace(path)
    except OSError as fault:
        raise ClusterError(f"{path}: cannot be written: {fault.strerror}") from None


def load_topology(path):
    """Read back what save_topology wrote -> Topology; ClusterError says what is wrong with the file."""
    try:
        tree = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return make_saved_topology(tree)
    except OSError as fault:
        raise ClusterError(f"{path}: cannot be read: {fault.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as fault:
        raise ClusterError(f"{path}: not a topology file: {type(fault).__name__} {fault}") from None


def make_saved_topology(tree):
    """Make a Topology of a file's tree; a missing or strange entry raises what Python raises."""
    nodes = list(tree["nodes"].values())
    names = tuple(tree["nodes"])
    rack_names = tuple(dict.fromkeys(node["rack"] for node in nodes))
    node_of_rank = np.empty(sum(len(node["ranks"]) for node in nodes), np.int64)
    for number, node in enumerate(nodes):
        node_of_rank[node["ranks"]] = number
    return Topology(
        node_of_rank=node_of_rank,
        node_names=names,
        rack_of_node=np.array([rack_names.index(node["rack"]) for node in nodes], np.int64),
        rack_names=rack_names,
        bytes_per_second=np.array([[tree["bytes_per_second"][a][b] for b in names] for a in names], np.float64),
        latency_seconds=np.array([[tree["latency_seconds"][a][b] for b in names] for a in names], np.float64),
        memory_bytes=np.array([node["memory_bytes"] for node in nodes], np.int64),
        devices_of_node=np.array([node["devices"] for node in nodes], np.int64),
        cores_of_node=np.array([node["cores"] for node in nodes], np.int64),
        source=dict(tree["source"]),
    )


def lay_out(tree):
    """Write a tree as JSON with a line for each entry of its second level."""
    chapters = []
    for key, entries in tree.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        chapters.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(chapters) + "\n}\n"
