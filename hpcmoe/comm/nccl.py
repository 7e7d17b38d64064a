"""Rows and sums between GPUs by NCCL: grouped sends and receives on the send stream, which the device orders by itself.

NCCL matches by order of issue, so all ranks start the same legs in the same order. What goes wrong on the way is
asked for at every poke: NCCL itself only stops.
"""

import contextlib

from hpcmoe.comm.carrier import copy_own
from hpcmoe.errors import ClusterError, on_all, on_root


def find_nccl():
    """Import NCCL as CuPy offers it -> (its module, None), or (None, why not)."""
    try:
        from cupy.cuda import nccl
    except ImportError as fault:
        return None, f"CuPy cannot be imported: {fault}"
    if not getattr(nccl, "available", False):
        return None, "libnccl.so.2 is not found: pip install nvidia-nccl-cu13 (cu12 with CUDA 12)"
    return nccl, None


@contextlib.contextmanager
def open_nccl(comm, device, nccl):
    """Make the NCCL communicator of a group of ranks -> Group, ended with the with-block. Collective over comm.

    Its id comes from rank 0 by MPI. Raises ClusterError on all ranks when one cannot join.
    """
    number = on_root(comm, lambda: call(nccl.get_unique_id))
    communicator = on_all(comm, lambda: call(nccl.NcclCommunicator, comm.size, number, comm.rank))
    group = Group(nccl, communicator, device, comm.rank, comm.size)
    try:
        yield group
    except BaseException:
        group.communicator.abort()  # what it waits for may never come
        raise
    device.settle()
    group.communicator.destroy()


def call(function, *arguments):
    """Call NCCL -> what it gives; ClusterError where it does not."""
    try:
        return function(*arguments)
    except (RuntimeError, KeyError) as fault:  # CuPy has no name for NCCL's newest errors
        raise ClusterError(f"NCCL cannot be set up: {fault}; NCCL_DEBUG=WARN tells more") from fault


class Group:
    """The ranks of an NCCL communicator."""

    def __init__(self, nccl, communicator, device, rank, size):
        self.nccl, self.communicator, self.device = nccl, communicator, device
        self.rank, self.size = rank, size

    def check(self, name, peers):
        """Raise ClusterError when something has gone wrong in what was begun with these ranks."""
        try:
            self.communicator.check_async_error()
        except (RuntimeError, KeyError) as fault:
            ranks = ", ".join(map(str, peers)) or "none"
            raise ClusterError(f"NCCL, {name}, with ranks {ranks} of the group: {fault}") from fault

    def swap(self, outgoing, incoming, stream):
        """Send contiguous tensors to ranks and receive others, ((rank, tensor), ...), all at once on a stream.

        Between two ranks tensors are matched by their order.
        """
        communicator, address, bytes_ = self.communicator, stream.cuda_stream, self.nccl.NCCL_UINT8
        self.nccl.groupStart()
        for rank, tensor in outgoing:
            communicator.send(tensor.data_ptr(), tensor.nbytes, bytes_, rank, address)
        for rank, tensor in incoming:
            communicator.recv(tensor.data_ptr(), tensor.nbytes, bytes_, rank, address)
        self.nccl.groupEnd()

    def all_reduce(self, tensor, stream):
        """Sum a contiguous float32 tensor over the ranks, in place, on a stream."""
        address, nccl = tensor.data_ptr(), self.nccl
        self.communicator.allReduce(
            address, address, tensor.numel(), nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.cuda_stream
        )


class NcclCarrier:
    """Grouped sends and receives."""

    name = "nccl"
    in_order = True

    def __init__(self, group):
        self.group, self.pending = group, []

    def start(self, leg, ready, after):
        """Begin a leg -> Pending. `after` went by the same stream, so nothing need be waited for."""
        pending = NcclPending(self.group, leg, ready)
        self.pending.append(pending)
        return pending

    def poke(self):
        """Ask whether something went wrong; forget what is over -> whether any is."""
        for pending in self.pending:
            self.group.check(pending.leg.name, pending.peers)
        left = [pending for pending in self.pending if not pending.is_over()]
        moved, self.pending = len(left) < len(self.pending), left
        return moved


class NcclPending:
    """A leg that the device has been given whole: it has landed and gone for whatever comes behind its event."""

    landed = gone = True

    def __init__(self, group, leg, ready):
        self.leg, device = leg, group.device
        device.send.wait_event(ready)
        copy_own(device, leg, group.rank)
        peers = list(leg.peers(group.rank, group.size))
        outgoing = [(rank, leg.send.tensor[leg.sent_to(rank)]) for rank, _ in peers]
        incoming = [(rank, leg.receive.tensor[leg.received_from(rank)]) for _, rank in peers]
        outgoing, incoming = ([(rank, rows) for rank, rows in side if len(rows)] for side in (outgoing, incoming))
        group.swap(outgoing, incoming, device.send)
        self.peers = {rank for rank, _ in outgoing + incoming}
        self.event = device.send.record_event()

    def is_over(self):
        """Whether the device has nothing left to do for it."""
        return self.event.query()
