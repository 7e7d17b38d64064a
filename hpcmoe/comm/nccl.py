"""NCCL between GPUs: rows in groups of sends and receives on the send stream, and what sums are made of.

NCCL matches by order of issue, so all ranks start the same transfers, and the same sums, in the same order. What goes wrong
on the way is asked for at every poke: NCCL itself only stops.
"""

import contextlib
import warnings

from hpcmoe.comm.all_to_all import copy_own
from hpcmoe.environment import have_nccl_keep_order
from hpcmoe.errors import ClusterError, on_all
from hpcmoe.wait import broadcast

IN_ORDER_VERSION = 22600  # of NCCL: from 2.26 on it keeps the order of calls among communicators, where it is told so


def find_nccl():
    """Import NCCL as CuPy offers it -> (its module, None), or (None, why not)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # CuPy's, of eight lines a rank, where there is no library
            from cupy.cuda import nccl
    except (ImportError, OSError) as error:
        return None, f"CuPy cannot be imported: {error}"
    if not getattr(nccl, "available", False):
        return None, "libnccl.so.2 is not found: pip install nvidia-nccl-cu13 (cu12 with CUDA 12)"
    return nccl, None


@contextlib.contextmanager
def open_nccl(world, comms, device, nccl):
    """Make NCCL communicators for the ranks of MPI's, by name -> Groups by name, ended with the with-block.

    All ranks of world make each at once, for the part of them that is theirs. The id of each comes from its rank 0 by
    MPI. Raises ClusterError on all ranks of world when one cannot join. Collective over world.
    """
    have_nccl_keep_order()
    groups = {name: NcclGroup(nccl, join(world, comm, nccl), device, comm) for name, comm in comms.items()}
    try:
        yield groups
    except BaseException:
        abort(nccl, groups.values())
        raise
    device.synchronize()
    for group in groups.values():
        group.communicator.destroy()


def join(world, comm, nccl):
    """Make this rank's end of the communicator of comm, as the others of world make theirs -> NcclCommunicator."""
    number = on_all(world, lambda: call(nccl.get_unique_id) if comm.rank == 0 else None)
    number = broadcast(comm, number)
    return on_all(world, lambda: call(nccl.NcclCommunicator, comm.size, number, comm.rank))


def call(function, *arguments):
    """Call NCCL -> what it gives; ClusterError where it does not."""
    try:
        return function(*arguments)
    except (RuntimeError, KeyError) as error:  # CuPy has no name for NCCL's newest errors
        raise ClusterError(f"NCCL cannot be set up: {error}; NCCL_DEBUG=WARN tells more") from error


def abort(nccl, groups):
    """Give all communicators up at once: what one waits for may never come, and to end one may wait for the others."""
    with contextlib.suppress(RuntimeError, KeyError):  # what went wrong before is what matters
        nccl.groupStart()
        for group in groups:
            group.communicator.abort()
        nccl.groupEnd()


class NcclGroup:
    """The ranks of an NCCL communicator."""

    def __init__(self, nccl, communicator, device, comm):
        """comm: MPI's communicator of the same ranks."""
        self.nccl, self.communicator, self.device = nccl, communicator, device
        self.rank, self.size = comm.rank, comm.size
        self.others = [rank for rank in range(comm.size) if rank != comm.rank]

    @contextlib.contextmanager
    def name_errors(self, name, peers):
        """Within, turn what NCCL says into a ClusterError that names what was done, and with whom."""
        try:
            yield
        except (RuntimeError, KeyError) as error:
            ranks = ", ".join(map(str, peers)) or "none"
            raise ClusterError(f"NCCL, {name}, with ranks {ranks} of the group: {error}") from error

    def check(self, name, peers):
        """Raise ClusterError when something has send_done wrong in what was begun with these ranks."""
        with self.name_errors(name, peers):
            self.communicator.check_async_error()

    @contextlib.contextmanager
    def together(self, name, peers):
        """Within, gather calls to be launched as one."""
        with self.name_errors(name, peers):
            self.nccl.groupStart()
            try:
                yield
            finally:
                self.nccl.groupEnd()

    def send_recv(self, outgoing, incoming, stream, name):
        """Send contiguous tensors to ranks and receive others, ((rank, tensor), ...), at once on a stream -> the ranks.

        Between two ranks tensors are matched by their order.
        """
        communicator, address, as_bytes = self.communicator, stream.cuda_stream, self.nccl.NCCL_UINT8
        peers = sorted({rank for rank, _ in (*outgoing, *incoming)})
        with self.together(name, peers):
            for rank, tensor in outgoing:
                communicator.send(tensor.data_ptr(), tensor.nbytes, as_bytes, rank, address)
            for rank, tensor in incoming:
                communicator.recv(tensor.data_ptr(), tensor.nbytes, as_bytes, rank, address)
        return peers

    def spread(self, parts, stream, name):
        """Give all ranks the tensor of each, ((rank, contiguous tensor), ...), in place, at once on a stream."""
        with self.together(name, self.others):
            for rank, tensor in parts:
                self.communicator.bcast(
                    tensor.data_ptr(), tensor.nbytes, self.nccl.NCCL_UINT8, rank, stream.cuda_stream
                )

    def all_reduce(self, tensor, stream, name):
        """Sum a contiguous float32 tensor over the ranks, in place, on a stream."""
        address, nccl = tensor.data_ptr(), self.nccl
        with self.name_errors(name, self.others):
            self.communicator.allReduce(
                address, address, tensor.numel(), nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.cuda_stream
            )


class NcclAllToAll:
    """Grouped sends and receives."""

    name = "nccl"
    in_order = True

    def __init__(self, group):
        self.group, self.requests = group, []

    def start(self, transfer, ready, after):
        """Begin a transfer -> Request. `after` went by the same stream, so nothing need be waited for."""
        request = NcclRequest(self.group, transfer, ready)
        self.requests.append(request)
        return request

    def poke(self):
        """Ask whether something went wrong; forget what is over -> whether any is."""
        for request in self.requests:
            self.group.check(request.transfer.name, request.peers)
        left = [request for request in self.requests if not request.is_over()]
        moved, self.requests = len(left) < len(self.requests), left
        return moved


class NcclRequest:
    """A transfer that the device has been given whole: it has recv_done and send_done for whatever comes behind its event."""

    recv_done = send_done = True

    def __init__(self, group, transfer, ready):
        self.transfer, device = transfer, group.device
        device.send_stream.wait_event(ready)
        copy_own(device, transfer, group.rank)
        peers = list(transfer.peers(group.rank, group.size))
        outgoing = [(rank, transfer.send.tensor[transfer.send_slice(rank)]) for rank, _ in peers]
        incoming = [(rank, transfer.recv.tensor[transfer.recv_slice(rank)]) for _, rank in peers]
        outgoing, incoming = ([(rank, rows) for rank, rows in side if len(rows)] for side in (outgoing, incoming))
        self.peers = group.send_recv(outgoing, incoming, device.send_stream, transfer.name)
        self.event = device.send_stream.record_event()

    def is_over(self):
        """Whether the device has nothing left to do for it."""
        return self.event.query()
