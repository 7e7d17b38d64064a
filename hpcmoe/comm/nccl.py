"""NCCL between GPUs: rows in groups of sends and receives on the send stream, and the calls that sums are made of.

NCCL matches by order of issue, so all ranks start the same transfers, and the same sums, in the same order. At every
poke it is asked for errors: NCCL itself only stops.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from hpcmoe.comm.all_to_all import Transfer, copy_own, list_peers
from hpcmoe.comm.transport import Request
from hpcmoe.environment import keep_nccl_order
from hpcmoe.errors import ClusterError, on_all
from hpcmoe.wait import broadcast

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpcmoe.comm.device import Device, Event

IN_ORDER_VERSION = (
    22600  # of NCCL: from 2.26 on it keeps the order of calls among communicators, where the environment asks for it
)
_ERRORS = RuntimeError, KeyError  # of CuPy's calls, which has no name for NCCL's newest errors

Parts = Iterable[tuple[int, torch.Tensor]]  # (rank, contiguous tensor)


def find_nccl() -> tuple[Any, str | None]:
    """Return NCCL as CuPy offers it -> (its module, None), or (None, why not)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # CuPy's, of eight lines a rank, where there is no library
            from cupy.cuda import nccl
    except (ImportError, OSError) as error:
        return None, f"CuPy cannot be imported: {error}"
    if not getattr(nccl, "available", False):
        return None, "libnccl.so.2 is not found: pip install nvidia-nccl-cu13 (cu12 with CUDA 12)"
    return nccl, None


@contextlib.contextmanager
def open_nccl(world: MPI.Comm, comms: dict[str, MPI.Comm], device: Device, nccl: Any) -> Iterator[dict[str, NcclGroup]]:
    """Open NCCL communicators for the ranks of MPI's, by name. Collective over world.

    All ranks of world open each at once, for the part of them that is theirs. The id of each comes from its rank 0 by
    MPI. Raises ClusterError on all ranks of world when one cannot join.
    """
    keep_nccl_order()
    groups = {name: NcclGroup(nccl, join_communicator(world, comm, nccl), device, comm) for name, comm in comms.items()}
    try:
        yield groups
    except BaseException:
        abort_groups(nccl, groups.values())
        raise
    device.synchronize()
    for group in groups.values():
        group.communicator.destroy()


def join_communicator(world: MPI.Comm, comm: MPI.Comm, nccl: Any) -> Any:
    """Return this rank's end of the communicator of comm, as the others of world open theirs. Collective over world."""
    number = on_all(world, lambda: call_nccl(nccl.get_unique_id) if comm.rank == 0 else None)
    number = broadcast(comm, number)
    return on_all(world, lambda: call_nccl(nccl.NcclCommunicator, comm.size, number, comm.rank))


def call_nccl(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call of NCCL's set-up gives; raise ClusterError where it fails."""
    try:
        return function(*arguments)
    except _ERRORS as error:
        raise ClusterError(f"NCCL cannot be set up: {error}; NCCL_DEBUG=WARN tells more") from error


def abort_groups(nccl: Any, groups: Iterable[NcclGroup]) -> None:
    """Abort all communicators at once: what one waits for may never come, and its end may wait for the others."""
    with contextlib.suppress(*_ERRORS):  # what went wrong before is what matters
        nccl.groupStart()
        for group in groups:
            group.communicator.abort()
        nccl.groupEnd()


class NcclGroup:
    """The ranks of an NCCL communicator."""

    def __init__(self, nccl: Any, communicator: Any, device: Device, comm: MPI.Comm) -> None:
        """comm: MPI's communicator of the same ranks."""
        self.nccl, self.communicator, self.device = nccl, communicator, device
        self.rank, self.size = comm.rank, comm.size
        self.others = [rank for rank in range(comm.size) if rank != comm.rank]

    @contextlib.contextmanager
    def name_errors(self, name: str, peers: Iterable[int]) -> Iterator[None]:
        """Raise NCCL's errors within the with-block as a ClusterError that names what was done, and with whom."""
        try:
            yield
        except _ERRORS as error:
            ranks = ", ".join(map(str, peers)) or "none"
            raise ClusterError(f"NCCL, {name}, with ranks {ranks} of the group: {error}") from error

    def check(self, name: str, peers: Iterable[int]) -> None:
        """Raise ClusterError when something has gone wrong in what was started with these ranks."""
        with self.name_errors(name, peers):
            self.communicator.check_async_error()

    @contextlib.contextmanager
    def launch_together(self, name: str, peers: Iterable[int]) -> Iterator[None]:
        """Launch the calls within the with-block as one."""
        with self.name_errors(name, peers):
            self.nccl.groupStart()
            try:
                yield
            finally:
                self.nccl.groupEnd()

    def send_recv(self, outgoing: Parts, incoming: Parts, stream: Any, name: str) -> list[int]:
        """Send tensors to ranks and receive others, at once on a stream, and return the ranks.

        Between two ranks tensors are matched by their order.
        """
        communicator, address, as_bytes = self.communicator, stream.cuda_stream, self.nccl.NCCL_UINT8
        peers = sorted({rank for rank, _ in (*outgoing, *incoming)})
        with self.launch_together(name, peers):
            for rank, tensor in outgoing:
                communicator.send(tensor.data_ptr(), tensor.nbytes, as_bytes, rank, address)
            for rank, tensor in incoming:
                communicator.recv(tensor.data_ptr(), tensor.nbytes, as_bytes, rank, address)
        return peers

    def broadcast(self, parts: Parts, stream: Any, name: str) -> None:
        """Broadcast the tensor of each rank to all, in place, at once on a stream."""
        as_bytes, address = self.nccl.NCCL_UINT8, stream.cuda_stream
        with self.launch_together(name, self.others):
            for rank, tensor in parts:
                self.communicator.bcast(tensor.data_ptr(), tensor.nbytes, as_bytes, rank, address)

    def all_reduce(self, tensor: torch.Tensor, stream: Any, name: str) -> None:
        """Sum a contiguous float32 tensor over the ranks, in place, on a stream."""
        address, dtype, add = tensor.data_ptr(), self.nccl.NCCL_FLOAT32, self.nccl.NCCL_SUM
        with self.name_errors(name, self.others):
            self.communicator.allReduce(address, address, tensor.numel(), dtype, add, stream.cuda_stream)


class NcclAllToAll:
    """Grouped sends and receives."""

    name = "nccl"

    def __init__(self, group: NcclGroup) -> None:
        self.group = group
        self.requests: list[NcclRequest] = []

    def start(self, transfer: Transfer, ready: Event, after: Request | None) -> NcclRequest:
        """Launch a transfer; `after` went by the same stream, so nothing need be waited for."""
        request = NcclRequest(self.group, transfer, ready)
        self.requests.append(request)
        return request

    def poke(self) -> bool:
        """Raise what went wrong, and drop what is done. Return True if anything is."""
        for request in self.requests:
            self.group.check(request.name, request.peers)
        left = [request for request in self.requests if not request.done]
        moved, self.requests = len(left) < len(self.requests), left
        return moved


class NcclRequest:
    """A transfer that the device has been given whole: done for whatever comes behind its event."""

    send_done = recv_done = True

    def __init__(self, group: NcclGroup, transfer: Transfer, ready: Event) -> None:
        device, self.name, self.transfer = group.device, transfer.name, transfer
        device.send_stream.wait_event(ready)
        copy_own(device, transfer, group.rank)
        peers = list(list_peers(group.rank, group.size))
        outgoing = [(rank, transfer.send.tensor[transfer.send_slice(rank)]) for rank, _ in peers]
        incoming = [(rank, transfer.recv.tensor[transfer.recv_slice(rank)]) for _, rank in peers]
        outgoing, incoming = ([(rank, rows) for rank, rows in side if len(rows)] for side in (outgoing, incoming))
        self.peers = group.send_recv(outgoing, incoming, device.send_stream, transfer.name)
        self.event = device.send_stream.record_event()

    @property
    def done(self) -> bool:
        """Return True if nothing is left to do, on the device either."""
        return self.event.query()
