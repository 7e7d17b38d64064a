"""How ranks sum and share float32 numbers: by MPI in the host's memory, or by NCCL between GPUs.

Both lend memory in which to do it, swap arrays between ranks, sum over all ranks of the run or over those that hold the
same shard, and gather parts. What takes time is a generator that yields while it waits.
"""

import contextlib

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.mpi import start_all_reduce


class HostReducer:
    """MPI, in the host's memory: what lies on a GPU is copied there and back."""

    def __init__(self, mesh, device, bucket):
        """bucket: numbers that one message sums at most."""
        self.mesh, self.device, self.bucket = mesh, device, bucket
        self.overlaps = device.name == "host"  # for a GPU's numbers the host would have to wait

    @contextlib.contextmanager
    def lend(self, flat):
        """Give what may be summed in the place of a tensor, and lay it there in the end: on the host the same."""
        host, event = self.device.fetch(flat)
        event.synchronize()  # host waits for the device here: all ranks are to begin their sums in one order
        yield host
        if host is not flat:
            flat.copy_(host, non_blocking=True)

    def swap(self, outgoing, incoming):
        """Send tensors to ranks of mesh.ep and receive others: ((tag, rank, tensor), ...), all lent."""
        requests = [self.mesh.ep.Irecv(tensor.numpy(), rank, tag) for tag, rank, tensor in incoming]
        requests += [self.mesh.ep.Isend(tensor.numpy(), rank, tag) for tag, rank, tensor in outgoing]
        yield from until_done(requests)

    def sum_over(self, name, flat):
        """Sum a lent flat tensor over mesh.world or mesh.dp, whose name it is, in place."""
        comm = getattr(self.mesh, name)
        if comm.size > 1 and len(flat):
            yield from until_done([start_all_reduce(comm, piece.numpy()) for piece in flat.split(self.bucket)])

    def gather(self, flat, counts):
        """Give all ranks of mesh.world all of a lent flat tensor; rank r has its r-th part, counts[r] numbers."""
        edges = np.cumsum([0, *counts[:-1]]).tolist()
        yield from until_done([self.mesh.world.Iallgatherv(MPI.IN_PLACE, [flat.numpy(), counts, edges, MPI.FLOAT])])

    def poke(self):
        """There is nothing to look after but what the generators do."""

    def join(self):
        """What is summed is there when its generator is over."""


class NcclReducer:
    """NCCL, where the numbers lie, on the receive stream: NCCL's rows have the send stream for themselves.

    All is launched at once, in an order that must be the same on all ranks.
    """

    overlaps = True

    def __init__(self, mesh, device, groups):
        """groups: comm.nccl.Group by name: "world", and "dp" where that has more ranks than one."""
        self.device, self.groups = device, groups
        self.world_ranks = mesh.ep.group.Translate_ranks(None, mesh.world.group)

    @contextlib.contextmanager
    def lend(self, flat):
        """Give the tensor itself, to work on behind what the compute stream has done; not to be left waiting."""
        self.device.receive.wait_event(self.device.compute.record_event())
        with self.device.use(self.device.receive):
            yield flat

    def swap(self, outgoing, incoming):
        """Send tensors to ranks of mesh.ep and receive others: ((tag, rank, tensor), ...), all contiguous."""
        sides = (  # between two ranks NCCL knows an array by its turn
            [(self.world_ranks[rank], tensor) for tag, rank, tensor in sorted(side, key=lambda entry: entry[:2])]
            for side in (outgoing, incoming)
        )
        self.groups["world"].swap(*sides, self.device.receive)
        return ()

    def sum_over(self, name, flat):
        """Sum a flat tensor over mesh.world or mesh.dp, whose name it is, in place."""
        if name in self.groups and len(flat):
            self.groups[name].all_reduce(flat, self.device.receive)
        return ()

    def gather(self, flat, counts):
        """Give all ranks of mesh.world all of a flat tensor; rank r has its r-th part, counts[r] numbers."""
        world, parts = self.groups["world"], dict(enumerate(flat.split(counts)))
        own = parts.pop(world.rank)
        outgoing = [(rank, own) for rank in parts if len(own)]
        world.swap(outgoing, [(rank, part) for rank, part in parts.items() if len(part)], self.device.receive)
        return ()

    def poke(self):
        """Ask whether something went wrong."""
        for name, group in self.groups.items():
            group.check(f"sum of gradients over {name}", [rank for rank in range(group.size) if rank != group.rank])

    def join(self):
        """Have the compute stream wait for all sums."""
        self.device.compute.wait_event(self.device.receive.record_event())


def until_done(requests):
    """Yield while any request is under way."""
    while not MPI.Request.Testall(requests):
        yield
