"""How the ranks divide the work: the world split into data-, expert- and tensor-parallel groups."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mpi4py import MPI

from hpcmoe.config import ParallelConfig
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.wait import barrier


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The run's communicators and this rank's place in them.

    rank = (data_index * ep + expert_index) * tp + tensor_index: tensor parallelism is innermost, so that its group,
    which talks most, lies within a node where it can.
    """

    world: MPI.Comm  # all ranks of the run
    sums: MPI.Comm  # all ranks again: gradients are summed here, beside whatever goes on in world
    group: MPI.Comm  # the ranks that hold the network once: its tokens travel among them
    ep: MPI.Comm  # of these, the ranks among which the same shard of all experts is spread
    dp: MPI.Comm  # the ranks that hold the same shard of the same experts
    data_index: int
    expert_index: int
    tensor_index: int
    tensor_parallel: int  # number of ranks that share an expert's matrices

    @property
    def comms(self) -> tuple[MPI.Comm, ...]:
        """Return its communicators."""
        return self.dp, self.ep, self.group, self.sums, self.world

    @property
    def data_parallel(self) -> int:
        """Return the number of data-parallel replicas."""
        return self.dp.size

    @property
    def expert_parallel(self) -> int:
        """Return the number of ranks among which the experts are spread."""
        return self.ep.size

    @property
    def ep_ranks(self) -> list[int]:
        """Return the ranks of ep, as world numbers them."""
        first = self.world.rank - self.expert_index * self.tensor_parallel
        return [first + index * self.tensor_parallel for index in range(self.ep.size)]

    @property
    def token_index(self) -> int:
        """Return the index of this rank's share of a batch: every rank has tokens of its own."""
        return self.world.rank

    @property
    def num_token_shares(self) -> int:
        """Return the number of ranks that read different tokens."""
        return self.world.size


@contextlib.contextmanager
def open_mesh(comm: MPI.Comm, parallel: ParallelConfig) -> Iterator[Mesh]:
    """Open the groups of ranks that [parallel] asks for. Collective over comm, on entry and on exit.

    Raises ClusterError on all ranks when the sizes do not fit the ranks.
    """
    dp, ep, tp = on_root(comm, lambda: mesh_shape(comm.size, parallel.data, parallel.expert, parallel.tensor))
    data_index, expert_index, tensor_index = mesh_coordinates(comm.rank, ep, tp)

    # Each group is named by the coordinates that its ranks share and ordered by the others.
    barrier(comm)
    mesh = Mesh(
        world=comm.Dup(),
        sums=comm.Dup(),
        group=comm.Split(data_index, expert_index * tp + tensor_index),
        ep=comm.Split(data_index * tp + tensor_index, expert_index),
        dp=comm.Split(expert_index * tp + tensor_index, data_index),
        data_index=data_index,
        expert_index=expert_index,
        tensor_index=tensor_index,
        tensor_parallel=tp,
    )
    yield mesh

    # Freeing is collective: after an error, which not all ranks may share, leave it to the end of the process.
    barrier(mesh.world)
    for group in mesh.comms:
        group.Free()


def mesh_shape(num_ranks: int, data_parallel: int, expert_parallel: int, tensor_parallel: int) -> tuple[int, int, int]:
    """Check the parallel sizes against the ranks -> (data, expert, tensor).

    expert_parallel 0 takes what is left; tensor_parallel 0, where nobody has chosen it, is 1.
    """
    # Each size must divide the ranks that the one before leaves.
    tensor_parallel = tensor_parallel or 1
    if num_ranks % tensor_parallel:
        raise ClusterError(f"[parallel] tensor = {tensor_parallel} must divide the {num_ranks} ranks")
    tensor_groups = num_ranks // tensor_parallel
    ranks = f"the {num_ranks} ranks / tensor {tensor_parallel} = {tensor_groups}"
    for key, size in (("data", data_parallel), ("expert", expert_parallel)):
        if size and tensor_groups % size:
            raise ClusterError(f"[parallel] {key} = {size} must divide {ranks}")

    # What is left open takes the rest.
    expert_parallel = expert_parallel or tensor_groups // data_parallel
    product = data_parallel * expert_parallel * tensor_parallel
    if product != num_ranks:
        raise ClusterError(
            f"[parallel] data {data_parallel} x expert {expert_parallel} x tensor {tensor_parallel} = {product} must "
            f"equal the {num_ranks} ranks"
        )
    return data_parallel, expert_parallel, tensor_parallel


def fit_parallel(parallel: ParallelConfig, num_ranks: int) -> ParallelConfig:
    """Return the shape next to a given one that fewer ranks have: the given one itself where it fits.

    tensor stays where it divides them, else it is chosen by memory; data takes the largest divisor of the rest up to
    what it was, expert what is left.
    """
    try:
        mesh_shape(num_ranks, parallel.data, parallel.expert, parallel.tensor)
    except ClusterError:
        tensor = parallel.tensor if num_ranks % (parallel.tensor or 1) == 0 else 0
        groups = num_ranks // (tensor or 1)
        data = max(number for number in range(1, parallel.data + 1) if groups % number == 0)
        return dataclasses.replace(parallel, data=data, expert=0, tensor=tensor)
    return parallel


def mesh_coordinates(rank: int, expert_parallel: int, tensor_parallel: int) -> tuple[int, int, int]:
    """Return a rank's place in the mesh -> (data_index, expert_index, tensor_index)."""
    group, tensor_index = divmod(rank, tensor_parallel)
    data_index, expert_index = divmod(group, expert_parallel)
    return data_index, expert_index, tensor_index
