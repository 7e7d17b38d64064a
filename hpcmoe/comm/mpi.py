"""Messages by MPI: Isend and Irecv on buffers that stay where they are, and sums over ranks.

Large messages progress only while some thread is inside an MPI call. Between two GEMMs the transport is poked; a long
GEMM releases the interpreter, and then a thread enters MPI a thousand times a second. While the transport is poked
anyway it stays out of the way: sixteen such threads on two cores took half of their time.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.transport import MessageLog, MessageRequest
from hpcmoe.wait import barrier, wait_all

_SHORTEST_SECONDS, _LONGEST_SECONDS = 1e-3, 8e-3  # between two probes


@contextlib.contextmanager
def open_mpi_transport(
    comm: MPI.Comm, row_bytes: int, bind_thread: Callable[[], None] = lambda: None
) -> Iterator["MpiTransport"]:
    """Open the transport of a group. Collective over comm.

    bind_thread: the first call of the thread that progresses messages beside this one.
    """
    barrier(comm)
    own = comm.Dup()  # nobody else's messages are in it
    row_type = MPI.BYTE.Create_contiguous(row_bytes).Commit()
    transport = MpiTransport(own, row_type)
    try:
        with open_progress_thread(transport, bind_thread):
            yield transport
    finally:
        row_type.Free()
    own.Free()


class MpiTransport:
    """Carries rows of one width among the ranks of a communicator."""

    def __init__(self, comm: MPI.Comm, row_type: MPI.Datatype) -> None:
        self.comm, self.row_type = comm, row_type
        self.rank, self.size = comm.rank, comm.size
        self.mpi_requests: list[MPI.Request] = []  # under way, in pairs with:
        self.requests: list[MessageRequest] = []
        self.num_pokes = 0  # ever
        self.log: MessageLog | None = None  # while somebody wants to know of the rows' messages

    def send_rows(self, rows: np.ndarray, peer: int, tag: int) -> MessageRequest:
        """Start to send uint8 rows [n, row_bytes], which must stay as they are until the request is done."""
        request = self._add(self.comm.Isend([rows, len(rows), self.row_type], peer, tag), sends=True)
        if self.log is not None:
            self.log.add(request, True, peer, tag, rows.nbytes)
        return request

    def recv_rows(self, rows: np.ndarray, peer: int, tag: int) -> MessageRequest:
        """Start to receive into uint8 rows [n, row_bytes]."""
        request = self._add(self.comm.Irecv([rows, len(rows), self.row_type], peer, tag), sends=False)
        if self.log is not None:
            self.log.add(request, False, peer, tag, rows.nbytes)
        return request

    def send_words(self, words: np.ndarray, peer: int, tag: int) -> MessageRequest:
        """Start to send an int64 array."""
        return self._add(self.comm.Isend(words, peer, tag), sends=True)

    def recv_words(self, words: np.ndarray, peer: int, tag: int) -> MessageRequest:
        """Start to receive into an int64 array."""
        return self._add(self.comm.Irecv(words, peer, tag), sends=False)

    def poke(self) -> bool:
        """Advance messages and mark the requests that are done, without waiting. Return True if any is."""
        self.num_pokes += 1
        done = MPI.Request.Testsome(self.mpi_requests) if self.mpi_requests else None
        for index in done or ():
            self.requests[index].complete()
            if self.log is not None:
                self.log.end(self.requests[index])
        if done:  # the list is kept short: each test looks at all of it
            left = [index for index, request in enumerate(self.requests) if not request.done]
            self.mpi_requests = [self.mpi_requests[index] for index in left]
            self.requests = [self.requests[index] for index in left]
        return bool(done)

    def _add(self, mpi_request: MPI.Request, sends: bool) -> MessageRequest:
        """Follow one of MPI's requests until it is done."""
        request = MessageRequest(sends)
        self.mpi_requests.append(mpi_request)
        self.requests.append(request)
        return request


def read_max_tag() -> int:
    """Return the largest tag that this MPI takes, at least 32767."""
    return int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767)  # Open MPI has it on no other communicator


def start_all_reduce(comm: MPI.Comm, array: np.ndarray) -> MPI.Request:
    """Start to sum an array over the ranks, in place. Collective over comm."""
    return comm.Iallreduce(MPI.IN_PLACE, array)


def all_reduce(comm: MPI.Comm, array: np.ndarray, poke: Callable[[], bool] | None = None) -> np.ndarray:
    """Sum an array over the ranks, in place, with poke() while it waits. Collective over comm."""
    wait_all([start_all_reduce(comm, array)], poke=poke)
    return array


@contextlib.contextmanager
def open_progress_thread(transport: MpiTransport, begin: Callable[[], None]) -> Iterator[None]:
    """Keep a transport's messages moving within the with-block, whenever nobody pokes it.

    begin() is the thread's first call; what it raises is raised here. Where MPI may not be called from several threads
    there is no thread.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        yield
        return

    # Start the thread, and raise what its first call raises.
    over, begun = threading.Event(), concurrent.futures.Future[None]()

    def work() -> None:
        try:
            begin()
        except Exception as error:
            begun.set_exception(error)
        else:
            begun.set_result(None)
            probe_until(over, transport)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    begun.result()

    # End it with the block.
    try:
        yield
    finally:
        over.set()
        thread.join()


def probe_until(over: threading.Event, transport: MpiTransport) -> None:
    """Probe for a message that never comes, for MPI progresses all others on the way, until `over` is set."""
    pause, seen, max_tag = _SHORTEST_SECONDS, 0, read_max_tag()
    while not over.wait(pause):
        pokes = transport.num_pokes
        if transport.requests and pokes == seen:
            transport.comm.Iprobe(MPI.ANY_SOURCE, max_tag)
            pause = _SHORTEST_SECONDS
        else:
            pause = min(2 * pause, _LONGEST_SECONDS)
        seen = pokes
