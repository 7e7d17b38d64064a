"""How ranks sum and share float32 numbers: by MPI in the host's memory, or by NCCL between GPUs.

Both open memory in which to do it, send arrays between ranks, sum over all ranks of the run or over those that hold the
same shard, and gather parts. What takes the host's time is a generator that yields while it waits.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from mpi4py import MPI

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.device import Device
from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.comm.nccl import IN_ORDER_VERSION, NcclGroup
from hpcmoe.float32 import FLOAT32_BYTES
from hpcmoe.wait import until_done

Messages = Iterable[tuple[int, int, torch.Tensor]]  # (tag, rank of mesh.ep, contiguous tensor)


class HostReducer:
    """MPI, in the host's memory: what lies on a GPU is copied there and back."""

    def __init__(self, mesh: Mesh, device: Device, bucket: int) -> None:
        """bucket: most scalars that one message sums."""
        self.mesh, self.device, self.bucket = mesh, device, bucket
        self.can_overlap = device.name == "host"  # for a GPU's numbers the host would have to wait

    @contextlib.contextmanager
    def open_for_sums(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Open a tensor's numbers in the host's memory; at the end the tensor has what became of them."""
        host, event = self.device.copy_to_host(flat)
        event.synchronize()  # host waits for the device here: all ranks must start their sums in one order
        yield host
        if host is not flat:
            flat.copy_(host, non_blocking=True)

    def send_recv(self, outgoing: Messages, incoming: Messages) -> Iterator[bool]:
        """Send opened tensors to ranks of mesh.ep and receive others."""
        requests = [self.mesh.ep.Irecv(tensor.numpy(), rank, tag) for tag, rank, tensor in incoming]
        requests += [self.mesh.ep.Isend(tensor.numpy(), rank, tag) for tag, rank, tensor in outgoing]
        yield from until_done(requests)

    def all_reduce(self, name: str, flat: torch.Tensor) -> Iterator[bool]:
        """Sum an opened flat tensor over all ranks ("world") or the data-parallel group ("dp"), in place."""
        comm = self.mesh.sums if name == "world" else self.mesh.dp
        if comm.size > 1 and len(flat):
            yield from until_done([start_all_reduce(comm, piece.numpy()) for piece in flat.split(self.bucket)])

    def all_gather(self, flat: torch.Tensor, counts: list[int]) -> Iterator[bool]:
        """Gather an opened flat tensor on all ranks, of which rank r has counts[r] numbers."""
        edges = np.cumsum([0, *counts[:-1]]).tolist()
        yield from until_done([self.mesh.sums.Iallgatherv(MPI.IN_PLACE, [flat.numpy(), counts, edges, MPI.FLOAT])])

    def poke(self) -> None:
        """Return at once: the generators do it all."""

    def finish(self) -> Iterable[bool]:
        """Return at once: what is summed is there when its generator is over."""
        return ()


class NcclReducer:
    """NCCL, where the numbers lie, on the receive stream: NCCL's rows have the send stream for themselves.

    All is launched at once, in an order that must be the same on all ranks. An NCCL that cannot keep to this order with
    several communicators has everything on one stream.
    """

    can_overlap = True

    def __init__(self, mesh: Mesh, device: Device, bucket: int, groups: dict[str, NcclGroup]) -> None:
        """bucket: whoever sums many numbers cuts them so; groups: by name, "world" and "dp", where larger than one."""
        self.mesh, self.device, self.groups, self.bucket = mesh, device, groups, bucket
        in_order = all(group.nccl.get_version() >= IN_ORDER_VERSION for group in groups.values())
        self.stream = device.recv_stream if in_order else device.send_stream

    @contextlib.contextmanager
    def open_for_sums(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Open the tensor itself: what is launched before control returns runs behind the compute stream's work."""
        self.stream.wait_event(self.device.compute_stream.record_event())
        with self.device.use(self.stream):
            yield flat

    def send_recv(self, outgoing: Messages, incoming: Messages) -> Iterable[bool]:
        """Send tensors to ranks of mesh.ep and receive others."""
        world_ranks = self.mesh.ep_ranks
        sends, recvs = (  # between two ranks NCCL knows an array by its turn
            [(world_ranks[rank], tensor) for tag, rank, tensor in sorted(side, key=lambda entry: entry[:2])]
            for side in (outgoing, incoming)
        )
        if sends or recvs:
            self.groups["world"].send_recv(sends, recvs, self.stream, "gradients of an expert's replicas")
        return ()

    def all_reduce(self, name: str, flat: torch.Tensor) -> Iterable[bool]:
        """Sum a flat tensor over all ranks ("world") or the data-parallel group ("dp"), in place."""
        if name in self.groups and len(flat):
            self.groups[name].all_reduce(flat, self.stream, f"sum of gradients over {name}")
        return ()

    def all_gather(self, flat: torch.Tensor, counts: list[int]) -> Iterable[bool]:
        """Gather a flat tensor on all ranks, of which rank r has counts[r] numbers."""
        parts = [(rank, part) for rank, part in enumerate(flat.split(counts)) if len(part)]
        self.groups["world"].broadcast(parts, self.stream, "parameters stepped elsewhere")
        return ()

    def poke(self) -> None:
        """Raise what went wrong."""
        for name, group in self.groups.items():
            group.check(f"sum of gradients over {name}", group.others)

    def finish(self) -> Iterator[None]:
        """Make the compute stream wait for all sums; yield until they are there."""
        event = self.stream.record_event()
        self.device.compute_stream.wait_event(event)
        while not event.query():  # not blindly: an NCCL that has failed would never come to it
            yield


Reducer = HostReducer | NcclReducer


def make_reducer(mesh: Mesh, device: Device, groups: dict[str, NcclGroup] | None, bucket_bytes: int) -> Reducer:
    """Build NCCL's reducer where there are groups of it, else MPI's; bucket_bytes 0: a message sums any number."""
    bucket = max(bucket_bytes // FLOAT32_BYTES, 1) if bucket_bytes else 2**31
    return HostReducer(mesh, device, bucket) if groups is None else NcclReducer(mesh, device, bucket, groups)
