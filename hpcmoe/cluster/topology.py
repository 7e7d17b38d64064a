"""Where the ranks are: their nodes, racks, memory, cores, devices and links, each fact with its source."""

import logging
import os
import sys
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.given import take_links
from hpcmoe.cluster.machine import ask_scontrol, count_cuda_devices, read_memory_bytes
from hpcmoe.cluster.measure import find_slow_links, measure_links
from hpcmoe.cluster.nodes import Topology
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.wait import barrier, broadcast, gather_to_all

log = logging.getLogger(__name__)

MOST_NAMED = 5  # slow links in one line
NCCL_SHARES = "NCCL_MULTI_RANK_GPU_ENABLE"  # 1: NCCL 2.30 and later may run several ranks on one GPU
NCCL_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"  # 1: several communicators may be busy at once, in the order of the calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one rank sees of the node it sits on."""

    leader: int  # the node's lowest rank
    name: str
    address: str  # Slurm's path of switches down to the node, "" where there is none
    memory_bytes: int
    devices: frozenset[str]
    cores: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The nodes and racks that the ranks sit in, before anything is known of what joins them."""

    node_of_rank: np.ndarray  # [P] int64
    seats_of_node: list[list[Seat]]
    node_names: tuple[str, ...]  # [nodes]
    rack_of_node: np.ndarray  # [nodes] int64
    rack_names: tuple[str, ...]  # [racks]
    rack_source: str


def check_launcher(comm):
    """Refuse ranks that a launcher started as one job but whose MPI sees each alone: two MPIs are mixed."""
    if comm.size == 1:
        on_root(comm, lambda: refuse_mixed_mpi(os.environ))


def refuse_mixed_mpi(environ):
    """Raise ClusterError when a launcher's variables tell a process alone in its world of more processes."""
    key, size = find_launched(environ)
    if size > 1:
        name, version = MPI.get_vendor()
        library = f"{name} {'.'.join(map(str, version))}"
        raise ClusterError(
            f"two MPIs are mixed: the launcher says {key} = {size}, but mpi4py's MPI ({library}) sees 1 rank; "
            "start with the mpirun of that MPI (source .venv/bin/activate), or under Slurm with its srun --mpi type"
        )


def find_launched(environ):
    """Find how many processes a launcher has started as one job -> (the variable that tells, or "", their number)."""
    seen = {key: int(environ[key]) for key in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE") if key in environ}
    # SLURM_NTASKS is the whole job's, in a batch script too; only srun's own tasks have a step, and its count.
    if not seen and "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        seen = {"SLURM_STEP_NUM_TASKS": int(environ.get("SLURM_STEP_NUM_TASKS", 1))}
    return max(seen.items(), key=lambda told: told[1], default=("", 1))


def host_name():
    """Name the node this rank is on: as the launcher calls it, else as Slurm does, else as the machine does."""
    # mpirun's proxy sets its own for each node, so that it is right where Slurm's was only handed on.
    return os.environ.get("PMI_HOSTNAME") or os.environ.get("SLURMD_NODENAME") or MPI.Get_processor_name()


def read_topology(comm, cluster):
    """Read where the ranks are, from MPI, Slurm, the system and [cluster] -> Topology. Collective over comm.

    Raises ClusterError on all ranks when [cluster] or a links file does not fit the nodes.
    """
    seats = gather_to_all(comm, read_seat(comm))
    site = on_root(comm, lambda: make_site(seats, cluster))  # racks come first: they tell what shares an uplink
    measured = None
    if cluster.links == "measure":
        measured = measure_links(comm, site.node_of_rank, site.rack_of_node, cluster)
    topology = on_root(comm, lambda: make_topology(site, cluster, measured))
    if measured is not None:
        tell_slow_links(comm, topology)
    return topology


def tell_slow_links(comm, topology):
    """Log which links stayed far slower than others of their kind, by name."""
    slow = find_slow_links(topology.bytes_per_second, topology.rack_of_node)
    if slow and comm.rank == 0:
        names = topology.node_names
        told = [f"{names[i]} to {names[j]} ({share:.0%})" for i, j, share in slow[:MOST_NAMED]]
        more = f" and {len(slow) - MOST_NAMED} more" * (len(slow) > MOST_NAMED)
        log.warning("links far slower than the median of their kind, in a rack or between: %s%s", ", ".join(told), more)


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


def make_site(seats, cluster):
    """Gather the ranks' seats by node, and the nodes by rack -> Site. Raises ClusterError for racks that do not fit."""
    node_of_rank = np.unique([seat.leader for seat in seats], return_inverse=True)[1].astype(np.int64)
    seats_of_node = [[] for _ in range(max(node_of_rank) + 1)]
    for node, seat in zip(node_of_rank, seats, strict=True):
        seats_of_node[node].append(seat)
    names = distinct([group[0].name for group in seats_of_node])
    racks, source = find_racks(seats_of_node, names, cluster)
    rack_names = tuple(dict.fromkeys(racks))
    return Site(
        node_of_rank=node_of_rank,
        seats_of_node=seats_of_node,
        node_names=names,
        rack_of_node=np.array([rack_names.index(rack) for rack in racks], np.int64),
        rack_names=rack_names,
        rack_source=source,
    )


def make_topology(site, cluster, measured):
    """Join the site, the config and the measured Links, if any -> Topology. Raises ClusterError where they misfit."""
    if cluster.links == "measure":
        links, source = measured, dict.fromkeys(("links", "ports", "uplinks"), "measured")
    else:
        links, source = take_links(cluster, site.node_names, site.rack_names)
    seats_of_node = site.seats_of_node
    memory = [cluster.memory_bytes_per_node or min(seat.memory_bytes for seat in group) for group in seats_of_node]
    return Topology(
        node_of_rank=site.node_of_rank,
        node_names=site.node_names,
        rack_of_node=site.rack_of_node,
        rack_names=site.rack_names,
        bytes_per_second=links.bytes_per_second,
        latency_seconds=links.latency_seconds,
        egress_bytes_per_second=links.egress_bytes_per_second,
        ingress_bytes_per_second=links.ingress_bytes_per_second,
        uplink_bytes_per_second=links.uplink_bytes_per_second,
        memory_bytes=np.array(memory, np.int64),
        devices_of_node=count_of_node(seats_of_node, "devices"),
        cores_of_node=count_of_node(seats_of_node, "cores"),
        source={
            "nodes": "MPI split by shared memory",
            "racks": site.rack_source,
            **source,
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


def find_launcher():
    """Say who started this rank, from what it has left in the environment -> text."""
    slurm = f"Slurm, job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else "no Slurm"
    starters = {
        "SLURM_STEP_ID": "srun",
        "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
        "PMI_SIZE": "mpirun or srun by PMI",
    }
    seen = [starter for key, starter in starters.items() if key in os.environ]
    return f"{seen[-1] if seen else 'none: a process alone'}; {slurm}"


def may_share_gpus():
    """Whether NCCL has been told that several ranks may run on one GPU."""
    return os.environ.get(NCCL_SHARES) == "1"


def have_nccl_keep_order():
    """Have NCCL start what several communicators do in the order of the calls, unless the user has said otherwise."""
    os.environ.setdefault(NCCL_ORDER, "1")


def read_setting(name):
    """Read what a user, a module or a launcher has set for MPI, or for what is below it -> text, "" where nothing."""
    return os.environ.get(name, "")


def find_job() -> tuple[str, str]:
    """Find the Slurm job that this process is part of -> (its number, how often it was requeued), empty without one."""
    return os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")


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
