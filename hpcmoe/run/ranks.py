"""Where the ranks of a library's group are, and the threads that each of them may use."""

import contextlib
from collections.abc import Iterator

import torch
from mpi4py import MPI

from hpcmoe.cluster.discover import read_topology
from hpcmoe.cluster.launcher import reject_mixed_mpi
from hpcmoe.cluster.machine import count_own_cores
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.config import ClusterConfig
from hpcmoe.environment import read_environment
from hpcmoe.errors import ClusterError, ConfigError
from hpcmoe.run.job import choose_threads

OPEN = "hpcmoe.open"  # with which errors begin
_MEASURE = "measure"


def check_comm(comm: MPI.Intracomm | None) -> MPI.Intracomm:
    """Return the ranks of a group, by default all. Raises ConfigError, or ClusterError where two MPIs are mixed."""
    if comm is None:
        reject_mixed_mpi(read_environment(), MPI.COMM_WORLD.size)
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ConfigError(f"{OPEN}: comm = {comm!r}: must be an intracommunicator of mpi4py")
    return comm


def read_group_topology(comm: MPI.Intracomm, links: str | Topology) -> Topology:
    """Read where a group's ranks are, unless it is given. Collective over comm. Raises ClusterError on all ranks."""
    if not isinstance(links, Topology):
        return read_topology(comm, ClusterConfig(links=links or _MEASURE), assumes_links=not links)
    if len(links.node_of_rank) != comm.size:
        raise ClusterError(f"{OPEN}: links: a Topology of {len(links.node_of_rank)} ranks: must be of {comm.size}")
    return links


def choose_own_threads(topology: Topology, mesh: Mesh) -> int:
    """Return the threads of torch of this rank: its share of its node's cores, or of those it may use."""
    return min(choose_threads(topology, mesh.world.rank), count_own_cores())


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Set the number of torch's threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
