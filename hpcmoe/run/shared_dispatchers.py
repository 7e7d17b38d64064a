"""What carries the rows of a library's layers: opened when the first of them needs it, shared by all alike."""

import contextlib
from collections.abc import Iterator

from mpi4py import MPI

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import Device
from hpcmoe.config import CommConfig
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.dispatch.sizes import AnySizes, Sizes, make_device_sizes, make_host_sizes
from hpcmoe.errors import on_all
from hpcmoe.prepare.sizes import find_routes
from hpcmoe.run.dispatchers import open_dispatcher
from hpcmoe.run.job import check_windows
from hpcmoe.wait import barrier


class SharedDispatchers:
    """The dispatchers of a group, by the sizes of what passes through them; a context manager closes them."""

    def __init__(
        self, mesh: Mesh, topology: Topology, device: Device, config: CommConfig, backend: str, deterministic: bool
    ) -> None:
        """backend: what carries rows, as select_row_backend() returns it."""
        self.mesh, self.topology, self.device, self.config = mesh, topology, device, config
        self.backend, self.deterministic = backend, deterministic
        self.opened: dict[tuple[Sizes, int, int | None], TokenDispatcher] = {}
        self.stack = contextlib.ExitStack()

    def find(self, sizes: Sizes, slots_per_rank: int, owner: int | None) -> tuple[TokenDispatcher, bool]:
        """Find or open the dispatcher of these sizes -> (it, whether it is new). Collective over the group.

        owner: the layer that shares it with none, if it does not.
        """
        key = sizes, slots_per_rank, owner
        is_new = key not in self.opened
        if is_new:
            self.opened[key] = self.stack.enter_context(self.open(sizes, slots_per_rank))
        return self.opened[key], is_new

    def open_comm(self) -> MPI.Comm:
        """Open a communicator of all ranks, freed with the dispatchers. Collective over the group."""
        barrier(self.mesh.world)
        comm = self.mesh.world.Dup()
        # Freeing is collective: after an error, which not all ranks may share, leave it to the end of the process.
        self.stack.push(lambda kind, *_: comm.Free() if kind is None else None)
        return comm

    @contextlib.contextmanager
    def open(self, sizes: Sizes, slots_per_rank: int) -> Iterator[TokenDispatcher]:
        """Open a dispatcher of these sizes. Collective over the group, both ends. Raises on all ranks."""
        mesh, top_k = self.mesh, sizes.top_k // self.mesh.tensor_parallel
        routes = find_routes(self.config, self.topology, mesh, slots_per_rank, top_k, same_order=False)
        own: AnySizes = make_device_sizes(sizes, self.config.buffer_factor)
        if self.backend == "window":
            rest = self.config, self.topology, routes, True, self.deterministic
            own = host_sizes = on_all(mesh.world, lambda: make_host_sizes(sizes, *rest))
            check_windows(mesh.world, self.topology, host_sizes, routes)
        with open_dispatcher(mesh, self.device, self.backend, own, routes, True) as dispatcher:
            yield dispatcher
