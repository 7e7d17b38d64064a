"""What carries a run's rows between its ranks: selected by what all ranks have, and opened."""

import contextlib
import logging
from collections.abc import Iterator
from typing import cast

from mpi4py import MPI

from hpcmoe.clock import Clock
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.all_to_all import AllToAll
from hpcmoe.comm.device import Device, HostDevice
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.nccl import NcclAllToAll, find_nccl, open_nccl
from hpcmoe.comm.select import (
    SelectedBackend,
    TransportSupport,
    describe_row_ops,
    open_all_to_all,
    read_transport_support,
    select_backend,
    select_mpi_backend,
)
from hpcmoe.comm.transport import Loopback, Transport
from hpcmoe.comm.window import open_window
from hpcmoe.config import CommConfig
from hpcmoe.dispatch.device import DeviceDispatcher
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.dispatch.host import HostDispatcher
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.sizes import AnySizes, DeviceSizes, HostSizes
from hpcmoe.errors import ClusterError, on_root, raise_or_return
from hpcmoe.wait import barrier, gather_to_all

log = logging.getLogger(__name__)


def select_row_backend(settings: CommConfig, schedule: str, world: MPI.Comm, device: Device) -> str:
    """Select what carries rows by [comm]: "window" on the host; "nccl", "direct" or "staged" between GPUs.

    Collective over world. Raises ClusterError on all ranks when only some have a GPU, or [comm] asks for what none has.
    """
    names = gather_to_all(world, device.name)
    without = ", ".join(str(rank) for rank, name in enumerate(names) if name == "host")
    error = ""
    if len(set(names)) > 1:
        error = f'[comm] device = "{settings.device}": ranks {without} have no GPU, others do'
    elif device.name == "host" and settings.transport == "nccl":
        error = '[comm] transport = "nccl": the ranks have no GPU; use "auto", or "mpi"'
    elif device.name != "host" and settings.once_per_node == "on":
        error = '[comm] once_per_node = "on": between GPUs each copy is sent; use "auto"'
    raise_or_return(None, ClusterError(error) if error else None)
    return "window" if device.name == "host" else select_device_backend(settings, schedule, world, device).kind


def select_device_backend(settings: CommConfig, schedule: str, world: MPI.Comm, device: Device) -> SelectedBackend:
    """Select what carries rows between the ranks' GPUs, and log it. Collective over world.

    Raises ClusterError on all ranks when [comm] asks for what is not there.
    """
    support_of_rank = gather_to_all(world, read_transport_support(world, device))
    selected = on_root(world, lambda: select_backend(settings, support_of_rank, schedule))
    if selected.kind == "nccl" and settings.transport == "auto":
        selected = try_nccl(settings.buffers, world, device, selected, support_of_rank)
    row_ops = [f"rows on a device: {name}" for name in describe_row_ops(world, device)]
    if world.rank == 0:
        log.info("rows between devices: %s, for: %s", selected.kind, selected.reason)
        for line in [*row_ops, *format_shared_gpus(support_of_rank)]:
            log.info("%s", line)
    return selected


def try_nccl(
    buffers: str, world: MPI.Comm, device: Device, selected: SelectedBackend, support_of_rank: list[TransportSupport]
) -> SelectedBackend:
    """Keep NCCL if it can be set up among all ranks, else select MPI by [comm] buffers. Collective over world."""
    try:
        with open_nccl(world, {"world": world}, device, find_nccl()[0]):
            return selected
    except ClusterError as error:
        reason = f"{error}; "
    return on_root(world, lambda: select_mpi_backend(buffers, support_of_rank, reason))


def format_shared_gpus(support_of_rank: list[TransportSupport]) -> Iterator[str]:
    """Format which ranks share a GPU, as is meant for tests -> lines."""
    gpus = [support.gpu for support in support_of_rank]
    for gpu in sorted({gpu for gpu in gpus if gpu is not None and gpus.count(gpu) > 1}):
        ranks = ", ".join(str(rank) for rank, other in enumerate(gpus) if other == gpu)
        yield f"ranks {ranks} share one GPU: good for tests, and no faster than one rank"


def find_communicators(mesh: Mesh, backend: str, trains: bool) -> dict[str, MPI.Comm]:
    """Return the communicators that NCCL is to mirror, by name; none where it does not carry rows.

    In training gradients are summed over "world" and "dp", where these have other ranks.
    """
    if backend != "nccl":
        return {}
    sums = {"world": mesh.world, "dp": mesh.dp} if trains else {}
    return {"rows": mesh.group} | {name: comm for name, comm in sums.items() if comm.size > 1}


def open_dispatcher(
    mesh: Mesh, device: Device, backend: str, sizes: AnySizes, routes: Routes, trains: bool
) -> contextlib.AbstractContextManager[TokenDispatcher]:
    """Open what carries rows between the ranks of mesh.group. Collective over mesh.world, both ends."""
    if isinstance(sizes, HostSizes):
        return open_host_dispatcher(mesh.group, cast(HostDevice, device), sizes, routes)
    return open_device_dispatcher(mesh, device, backend, sizes, routes, trains)


@contextlib.contextmanager
def open_host_dispatcher(
    comm: MPI.Comm, device: HostDevice, sizes: HostSizes, routes: Routes
) -> Iterator[HostDispatcher]:
    """Open what carries rows by memory that a node's ranks share, and by messages. Collective over comm, both ends."""
    barrier(comm)
    local_comm = cast(MPI.Intracomm, comm.Split(int(routes.local_peers[0]), comm.rank))
    one_node = len(routes.local_peers) == comm.size
    with (
        open_window(local_comm, sizes.window_sizes(routes)) as window,
        contextlib.nullcontext(Loopback(comm.rank, comm.size))
        if one_node
        else open_mpi_transport(comm, sizes.row_bytes) as transport,
    ):
        yield HostDispatcher(cast(Transport, transport), window, device, Clock(), sizes, routes)
    local_comm.Free()


@contextlib.contextmanager
def open_device_dispatcher(
    mesh: Mesh, device: Device, backend: str, sizes: DeviceSizes, routes: Routes, trains: bool
) -> Iterator[DeviceDispatcher]:
    """Open what carries rows between the GPUs of mesh.group. Collective over mesh.world, both ends."""
    with contextlib.ExitStack() as opened:
        transport = opened.enter_context(
            open_mpi_transport(mesh.group, sizes.row_bytes, bind_thread=device.bind_thread)
        )
        if backend == "nccl":  # which sums gradients too
            communicators = find_communicators(mesh, backend, trains)
            groups = opened.enter_context(open_nccl(mesh.world, communicators, device, find_nccl()[0]))
            all_to_all: AllToAll = NcclAllToAll(groups["rows"])
            sum_groups = {name: group for name, group in groups.items() if name != "rows"}
        else:
            sum_groups = None
            all_to_all = opened.enter_context(open_all_to_all(backend, mesh.group, device, sizes.row_bytes, transport))
        yield DeviceDispatcher(all_to_all, transport, device, Clock(), sizes, routes, sum_groups)
