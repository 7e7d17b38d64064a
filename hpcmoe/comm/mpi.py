"""Messages by MPI: Isend and Irecv on buffers that stay where they are, and sums over ranks."""

import contextlib

from mpi4py import MPI

from hpcmoe.comm.progress import open_progress_thread
from hpcmoe.comm.transport import MessageRequest
from hpcmoe.wait import barrier, wait_all


@contextlib.contextmanager
def open_mpi_transport(comm, row_bytes, hesitate=None, bind_thread=lambda: None):
    """Make the transport of a group, freed at the end. Collective over comm.

    hesitate, for tests: a call before each poke; while it returns true, nothing progresses. bind_thread: what the
    thread that progresses messages beside this one calls first.
    """
    barrier(comm)
    own = comm.Dup()  # nobody else's messages are in it
    row_type = MPI.BYTE.Create_contiguous(row_bytes).Commit()
    transport = MpiTransport(own, row_type, hesitate)
    try:
        with open_progress_thread(transport, bind_thread):
            yield transport
    finally:
        row_type.Free()
    own.Free()


def read_max_tag() -> int:
    """Read the largest tag that this MPI takes, at least 32767."""
    return MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)  # Open MPI tells it of no other communicator


class MpiTransport:
    """Carries rows of one width among the ranks of a communicator."""

    def __init__(self, comm, row_type, hesitate):
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.row_type = row_type
        self.hesitate = hesitate
        self.mpi_requests, self.requests = [], []  # under way, in pairs
        self.num_sent, self.num_pokes = 0, 0  # messages and looks, ever

    def send_rows(self, rows, peer, tag):
        """Begin to send uint8 rows [n, row_bytes], which must stay as they are until the request is done -> Request."""
        self.num_sent += 1
        return self.add(self.comm.Isend([rows, len(rows), self.row_type], peer, tag))

    def recv_rows(self, rows, peer, tag):
        """Begin to receive into uint8 rows [n, row_bytes] -> Request."""
        return self.add(self.comm.Irecv([rows, len(rows), self.row_type], peer, tag))

    def send_words(self, words, peer, tag):
        """Begin to send an int64 array -> Request."""
        self.num_sent += 1
        return self.add(self.comm.Isend(words, peer, tag))

    def recv_words(self, words, peer, tag):
        """Begin to receive into an int64 array -> Request."""
        return self.add(self.comm.Irecv(words, peer, tag))

    def poke(self):
        """Let messages progress and mark the requests of those that are done, without waiting -> whether any is."""
        self.num_pokes += 1
        if not self.mpi_requests or (self.hesitate is not None and self.hesitate()):
            return False
        done = MPI.Request.Testsome(self.mpi_requests)
        for index in done or ():
            self.requests[index].done = True
        if done:  # the list is kept short: each test looks at all of it
            left = [index for index, request in enumerate(self.requests) if not request.done]
            self.mpi_requests = [self.mpi_requests[index] for index in left]
            self.requests = [self.requests[index] for index in left]
        return bool(done)

    def add(self, mpi_request):
        """Follow a request until it is done -> its Request."""
        request = MessageRequest()
        self.mpi_requests.append(mpi_request)
        self.requests.append(request)
        return request


def start_all_reduce(comm, array):
    """Begin to sum a NumPy array over the ranks, in place -> its request. Collective over comm."""
    return comm.Iallreduce(MPI.IN_PLACE, array)


def all_reduce(comm, array, poke=None):
    """Sum a NumPy array over the ranks, in place, doing poke() while it waits. Collective over comm."""
    wait_all([start_all_reduce(comm, array)], poke=poke)
    return array
