"""Where the ranks are: their nodes, racks, memory, cores, devices and links, each fact with its source."""

import dataclasses
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.given import read_links
from hpcmoe.cluster.machine import count_cuda_devices, read_memory_bytes, read_own_quotas, whole_cores
from hpcmoe.cluster.measure.cluster import find_slow_links, measure_links
from hpcmoe.cluster.racks import find_racks
from hpcmoe.cluster.topology import ClusterLinks, Topology
from hpcmoe.config import ClusterConfig
from hpcmoe.environment import is_set, read_counts, read_environment, read_memory, read_number, read_setting
from hpcmoe.errors import ClusterError, on_all, on_root
from hpcmoe.start import find_host
from hpcmoe.wait import barrier, broadcast, gather_to_all

log = logging.getLogger(__name__)

_MAX_NAMED = 5  # slow links in one line
_MAX_DEVICES = 4096  # of a node
_ASSUMED_BYTES_PER_SECOND, _ASSUMED_LATENCY_SECONDS = 1e10, 2e-6  # of a link between nodes that nobody has measured
_ASSUMED_MEMORY_BYTES_PER_SECOND = 1e11  # and within one


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """What one rank finds on its node."""

    leader: int  # the node's lowest rank
    name: str
    address: str  # Slurm's path of switches down to the node, "" where there is none
    memory_bytes: int
    devices: frozenset[str]
    cores: frozenset[int]  # that it may be scheduled on
    address_pattern: str = ""  # what the address's labels are, "" where Slurm has none
    cpu_quotas: tuple[tuple[str, float], ...] = ()  # (control group, CPUs) above this rank, outermost first


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLayout:
    """The nodes and racks that the ranks are on, before anything is known of what joins them."""

    node_of_rank: np.ndarray  # [P] int64
    infos_of_node: list[list[RankInfo]]
    node_names: tuple[str, ...]  # [nodes]
    rack_of_node: np.ndarray  # [nodes] int64
    rack_names: tuple[str, ...]  # [racks]
    rack_source: str


def read_host_name() -> str:
    """Return the name of this rank's node: as the launcher calls it, else as Slurm does, else as the machine does."""
    return find_host(read_environment()) or MPI.Get_processor_name()


def read_topology(comm: MPI.Comm, cluster: ClusterConfig, assumes_links: bool = False) -> Topology:
    """Read where the ranks are, from MPI, Slurm, the system and [cluster]. Collective over comm.

    assumes_links: all links are taken as alike, which takes no time. Raises ClusterError on all ranks when [cluster] or
    a links file does not fit the nodes.
    """
    infos = gather_to_all(comm, read_rank_info(comm))
    layout = on_root(comm, lambda: make_cluster_layout(infos, cluster))  # racks come first: they share an uplink
    measured, source = None, "measured"
    if assumes_links:
        measured, source = assume_links(len(layout.node_names), len(layout.rack_names)), "assumed"
    elif cluster.links == "measure":
        measured = measure_links(comm, layout.node_of_rank, layout.rack_of_node, cluster)
    topology = on_root(comm, lambda: make_topology(layout, cluster, measured, source))
    if source == "measured" and measured is not None and comm.rank == 0:
        log_slow_links(topology)
    return topology


def measure(comm: MPI.Intracomm | None = None, seconds: float = 2.0) -> Topology:
    """Measure what joins the nodes of a communicator's ranks -> Topology, the same on all. Collective over comm.

    comm: the world where it is None; any number of ranks, with or without Slurm. It takes about `seconds`, more where
    pairs of nodes are many. Raises ClusterError on all ranks.
    """
    world: MPI.Comm = MPI.COMM_WORLD if comm is None else comm
    if world.is_inter:
        raise ClusterError("measure: needs a communicator of one group, not one between two")
    seconds = on_root(world, lambda: _check_seconds(seconds))
    own = world.Dup()  # so that no message meets one of the caller's
    topology = read_topology(own, ClusterConfig(links="measure", measure_seconds=seconds))
    barrier(own)
    own.Free()  # collective: after an error, which not all ranks may share, it is left to the end of the process
    return topology


def _check_seconds(seconds: float) -> float:
    """Return the seconds that a measurement may take; ClusterError where that is no time."""
    if not 0 < seconds < np.inf:
        raise ClusterError(f"measure: seconds = {seconds}: must be finite and > 0")
    return seconds


def log_slow_links(topology: Topology) -> None:
    """Log which links stayed far slower than others of their kind, by name."""
    slow, names = find_slow_links(topology.bytes_per_second, topology.rack_of_node), topology.node_names
    if slow:
        named = ", ".join(f"{names[i]} to {names[j]} ({share:.0%})" for i, j, share in slow[:_MAX_NAMED])
        more = f" and {len(slow) - _MAX_NAMED} more" * (len(slow) > _MAX_NAMED)
        log.warning("links far slower than the median of their kind, in a rack or between: %s%s", named, more)


def read_rank_info(comm: MPI.Comm) -> RankInfo:
    """Read what this rank finds on its node. Collective over comm."""
    barrier(comm)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    leader = broadcast(node, comm.rank)
    node.Free()
    return on_all(comm, lambda: make_rank_info(leader))


def make_rank_info(leader: int) -> RankInfo:
    """Return this rank's RankInfo; ClusterError where a variable of it holds nonsense."""
    return RankInfo(
        leader=leader,
        name=read_host_name(),
        address=read_setting("SLURM_TOPOLOGY_ADDR"),
        memory_bytes=usable_memory_bytes(),
        devices=visible_devices(),
        cores=frozenset(os.sched_getaffinity(0)),
        address_pattern=read_setting("SLURM_TOPOLOGY_ADDR_PATTERN"),
        cpu_quotas=read_own_quotas(),
    )


def make_cluster_layout(infos: Sequence[RankInfo], cluster: ClusterConfig) -> ClusterLayout:
    """Group the ranks by node, and the nodes by rack. Raises ClusterError for racks that do not fit."""
    # Number nodes by their lowest rank.
    node_of_rank = np.unique([info.leader for info in infos], return_inverse=True)[1].astype(np.int64)
    infos_of_node: list[list[RankInfo]] = [[] for _ in range(max(node_of_rank) + 1)]
    for node, info in zip(node_of_rank, infos, strict=True):
        infos_of_node[node].append(info)

    # Name nodes and racks, and number racks by their first node.
    names = distinct([group[0].name for group in infos_of_node])
    racks, source = find_racks(infos_of_node, names, cluster.racks)
    rack_names = tuple(dict.fromkeys(racks))
    return ClusterLayout(
        node_of_rank=node_of_rank,
        infos_of_node=infos_of_node,
        node_names=names,
        rack_of_node=np.array([rack_names.index(rack) for rack in racks], np.int64),
        rack_names=rack_names,
        rack_source=source,
    )


def assume_links(num_nodes: int, num_racks: int) -> ClusterLinks:
    """Return links that are all alike: slower than a node's memory, as they are on nearly every cluster."""
    within = np.eye(num_nodes, dtype=bool)
    ports = np.full(num_nodes, _ASSUMED_BYTES_PER_SECOND)
    return ClusterLinks(
        bytes_per_second=np.where(within, _ASSUMED_MEMORY_BYTES_PER_SECOND, _ASSUMED_BYTES_PER_SECOND),
        latency_seconds=np.where(within, _ASSUMED_LATENCY_SECONDS / 10, _ASSUMED_LATENCY_SECONDS),
        egress_bytes_per_second=ports,
        ingress_bytes_per_second=ports,
        uplink_bytes_per_second=np.full(num_racks, np.inf),
    )


def make_topology(
    layout: ClusterLayout, cluster: ClusterConfig, measured: ClusterLinks | None, where_from: str = "measured"
) -> Topology:
    """Join the layout, the config and links found otherwise, if any. Raises ClusterError where they do not fit."""
    # Take the links, and each node's memory and devices.
    if cluster.links == "measure" and measured is not None:
        links, source = measured, dict.fromkeys(("links", "ports", "uplinks"), where_from)
    else:
        try:
            links, source = read_links(cluster.links, layout.node_names, layout.rack_names)
        except ClusterError as error:
            raise ClusterError(f"[cluster] links = {error}") from None
    given, infos_of_node = cluster.memory_bytes_per_node, layout.infos_of_node
    memory = [given or min(info.memory_bytes for info in group) for group in infos_of_node]
    devices = [frozenset().union(*(info.devices for info in group)) for group in infos_of_node]
    return Topology(
        node_of_rank=layout.node_of_rank,
        node_names=layout.node_names,
        rack_of_node=layout.rack_of_node,
        rack_names=layout.rack_names,
        memory_bytes=np.array(memory, np.int64),
        devices_of_node=np.array([len(names) for names in devices], np.int64),
        cores_of_node=np.array([count_cores(group) for group in infos_of_node], np.int64),
        source={"nodes": "MPI split by shared memory", "racks": layout.rack_source, **source}
        | {"memory": "config" if given else "system", "devices": "system", "cores": "system"},
        **{field.name: getattr(links, field.name) for field in dataclasses.fields(ClusterLinks)},
    )


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, numbered where they come again, so that all are different."""
    made: list[str] = []
    for name in names:
        candidates = [name, *(f"{name}.{k}" for k in range(1, len(names)))]
        made.append(next(candidate for candidate in candidates if candidate not in made))
    return tuple(made)


def count_cores(infos: Iterable[RankInfo]) -> int:
    """Count the cores that a node's ranks can keep busy together, by affinity and quotas."""
    return whole_cores(usable_cpus(list(infos), 0))


def usable_cpus(infos: list[RankInfo], depth: int) -> float:
    """Return the CPUs that the quotas below `depth` leave these ranks, and their affinity.

    The ranks in a control group share its quota; those in different groups, steps or containers, have each their own.
    """
    groups: dict[tuple[str, float], list[RankInfo]] = {}
    free = []
    for info in infos:
        if len(info.cpu_quotas) > depth:
            groups.setdefault(info.cpu_quotas[depth], []).append(info)
        else:
            free.append(info)
    cpus = sum(min(quota, usable_cpus(group, depth + 1)) for (_, quota), group in groups.items())
    return min(cpus + count_affine(free), count_affine(infos))


def count_affine(infos: Iterable[RankInfo]) -> int:
    """Count the cores that any of these ranks may be scheduled on."""
    return len(frozenset().union(*(info.cores for info in infos)))


def usable_memory_bytes() -> int:
    """Return how much memory this node's ranks may use: the system's limits, or Slurm's where that is less."""
    per_node, per_cpu, per_gpu = (read_memory(f"SLURM_MEM_PER_{what}") for what in ("NODE", "CPU", "GPU"))
    allotted = [per_node, per_cpu * count_allotted_cpus(), per_gpu * read_number("SLURM_GPUS_ON_NODE")]
    return min([read_memory_bytes(), *(num_bytes for num_bytes in allotted if num_bytes)])  # 0 is all there is


def count_allotted_cpus() -> int:
    """Count the CPUs that Slurm has given on this node, 0 where unknown: the least of the nodes' if unsure."""
    of_nodes, node = read_counts("SLURM_JOB_CPUS_PER_NODE"), read_number("SLURM_NODEID", default=sys.maxsize)
    of_job = of_nodes[node] if node < len(of_nodes) else min(of_nodes, default=0)
    return read_number("SLURM_CPUS_ON_NODE") or of_job


def visible_devices() -> frozenset[str]:
    """Return the names of the CUDA devices that this rank may use; two ranks' names of one device are equal."""
    present = frozenset(map(str, range(count_cuda_devices())))
    if not present or not is_set("CUDA_VISIBLE_DEVICES"):
        return present
    chosen = read_setting("CUDA_VISIBLE_DEVICES")
    # Slurm may show each of a node's tasks a device 0 of its own: then its count for the node is the truth.
    if chosen and read_setting("SLURM_GPUS_ON_NODE"):
        return frozenset(map(str, range(read_number("SLURM_GPUS_ON_NODE", most=_MAX_DEVICES))))
    return frozenset(chosen.split(",")) - {"", "-1", "NoDevFiles"}
