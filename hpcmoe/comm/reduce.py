"""How ranks sum and share float32 numbers: by MPI in the host's memory, or by NCCL between GPUs.

Both lend memory in which to do it, swap arrays between ranks, sum over all ranks of the run or over those that hold the
same shard, and gather parts. What takes the host's time is a generator that yields while it waits.
"""

import contextlib

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.mpi import start_all_reduce
from hpcmoe.comm.nccl import IN_ORDER_VERSION
from hpcmoe.wait import until_done


class HostReducer:
    """MPI, in the host's memory: what lies on a GPU is copied there and back."""

    def __init__(self, mesh, device, bucket):
        """bucket: numbers that one message sums at most."""
        self.mesh, self.device, self.bucket = mesh, device, bucket
        self.can_overlap = device.name == "host"  # for a GPU's numbers the host would have to wait

    @contextlib.contextmanager
    def open_for_sums(self, flat):
        """Give a tensor's numbers in the host's memory, and in the end lay down there what has become of them."""
        host, event = self.device.copy_to_host(flat)
        event.synchronize()  # host waits for the device here: all ranks are to begin their sums in one order
        yield host
        if host is not flat:
            flat.copy_(host, non_blocking=True)

    def send_recv(self, outgoing, incoming):
        """Send tensors to ranks of mesh.ep and receive others: ((tag, rank, tensor), ...), all lent."""
        requests = [self.mesh.ep.Irecv(tensor.numpy(), rank, tag) for tag, rank, tensor in incoming]
        requests += [self.mesh.ep.Isend(tensor.numpy(), rank, tag) for tag, rank, tensor in outgoing]
        yield from until_done(requests)

    def all_reduce(self, name, flat):
        """Sum a lent flat tensor over mesh.world or mesh.dp, whose name it is, in place."""
        comm = getattr(self.mesh, name)
        if comm.size > 1 and len(flat):
            yield from until_done([start_all_reduce(comm, piece.numpy()) for piece in flat.split(self.bucket)])

    def all_gather(self, flat, counts):
        """Give all ranks of mesh.world all of a lent flat tensor; rank r has its r-th part, counts[r] numbers."""
        edges = np.cumsum([0, *counts[:-1]]).tolist()
        yield from until_done([self.mesh.world.Iallgatherv(MPI.IN_PLACE, [flat.numpy(), counts, edges, MPI.FLOAT])])

    def poke(self):
        """There is nothing to look after but what the generators do."""

    def finish(self):
        """Wait for nothing: what is summed is there when its generator is over."""
        return ()


class NcclReducer:
    """NCCL, where the numbers lie, on the receive stream: NCCL's rows have the send stream for themselves.

    All is launched at once, in an order that must be the same on all ranks. An NCCL that cannot keep to this order with
    several communicators has everything on one stream.
    """

    can_overlap = True

    def __init__(self, mesh, device, groups):
        """groups: comm.nccl.NcclGroup by name, "world" and "dp", each where it has more ranks than one."""
        self.device, self.groups, self.world_ranks = device, groups, mesh.ep_ranks
        in_order = all(group.nccl.get_version() >= IN_ORDER_VERSION for group in groups.values())
        self.stream = device.recv_stream if in_order else device.send_stream

    @contextlib.contextmanager
    def open_for_sums(self, flat):
        """Give the tensor itself, to be worked on behind what the compute stream has done, before control returns."""
        self.stream.wait_event(self.device.compute_stream.record_event())
        with self.device.use(self.stream):
            yield flat

    def send_recv(self, outgoing, incoming):
        """Send tensors to ranks of mesh.ep and receive others: ((tag, rank, tensor), ...), all contiguous."""
        sides = [  # between two ranks NCCL knows an array by its turn
            [(self.world_ranks[rank], tensor) for tag, rank, tensor in sorted(side, key=lambda entry: entry[:2])]
            for side in (outgoing, incoming)
        ]
        if any(sides):
            self.groups["world"].send_recv(*sides, self.stream, "gradients of an expert's replicas")
        return ()

    def all_reduce(self, name, flat):
        """Sum a flat tensor over mesh.world or mesh.dp, whose name it is, in place."""
        if name in self.groups and len(flat):
            self.groups[name].all_reduce(flat, self.stream, f"sum of gradients over {name}")
        return ()

    def all_gather(self, flat, counts):
        """Give all ranks of mesh.world all of a flat tensor; rank r has its r-th part, counts[r] numbers."""
        parts = [(rank, part) for rank, part in enumerate(flat.split(counts)) if len(part)]
        self.groups["world"].spread(parts, self.stream, "parameters stepped elsewhere")
        return ()

    def poke(self):
        """Ask whether something went wrong."""
        for name, group in self.groups.items():
            group.check(f"sum of gradients over {name}", group.others)

    def finish(self):
        """Have the compute stream wait for all sums; yields until they are made."""
        event = self.stream.record_event()
        self.device.compute_stream.wait_event(event)
        while not event.query():  # not blindly: an NCCL that has failed would never come to it
            yield
