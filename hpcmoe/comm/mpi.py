"""Rows by MPI: Isend and Irecv between every two ranks, on buffers that stay where they are."""

import contextlib

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.transport import offsets_of
from hpcmoe.wait import Patience, wait_all


@contextlib.contextmanager
def open_mpi_transport(comm, row_bytes, max_message_rows):
    """Make the transport of a group, freed at the end. Collective over comm."""
    row_type = MPI.BYTE.Create_contiguous(row_bytes).Commit()
    try:
        yield MpiTransport(comm, row_type, max_message_rows)
    finally:
        row_type.Free()


class MpiTransport:
    """Carries rows of one width among the ranks of a communicator."""

    def __init__(self, comm, row_type, max_message_rows):
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.row_type = row_type
        self.max_message_rows = max_message_rows
        self.last_tag = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)  # Open MPI tells it of no other communicator

    def start(self, send, send_counts, recv, recv_counts, ready, tag):
        """Begin an exchange -> Pending. Receives come first, then sends, each rank starting with its neighbour."""
        send, recv = send.numpy(), recv.numpy()
        send_offsets, recv_offsets = offsets_of(send_counts), offsets_of(recv_counts)
        tag %= self.last_tag + 1

        receives, peers = [], []
        for peer in self.neighbours(-1):
            for part in self.parts(recv, recv_offsets, peer):
                receives.append(self.comm.Irecv(part, peer, tag))
                peers.append(peer)

        ready.synchronize()  # MPI reads the rows from the host: they must be there
        sends = [
            self.comm.Isend(part, peer, tag)
            for peer in self.neighbours(+1)
            for part in self.parts(send, send_offsets, peer)
        ]
        own_send, own_recv = send_offsets[self.rank], recv_offsets[self.rank]
        own = send_counts[self.rank]
        recv[own_recv : own_recv + own] = send[own_send : own_send + own]
        return MpiPending(receives, peers, sends, self.size)

    def neighbours(self, way):
        """List the other ranks, nearest first, to the right (+1) or to the left (-1)."""
        return [(self.rank + way * step) % self.size for step in range(1, self.size)]

    def parts(self, buffer, offsets, peer):
        """Cut a peer's rows into messages of at most max_message_rows -> buffer specifications for MPI."""
        for first in range(offsets[peer], offsets[peer + 1], self.max_message_rows):
            count = min(self.max_message_rows, offsets[peer + 1] - first)
            yield [buffer[first : first + count], int(count), self.row_type]

    def start_counts(self, counts):
        """Begin to tell each peer p its row counts[p] of an int64 array [P, n] -> a call that waits for theirs."""
        send = np.ascontiguousarray(counts, dtype=np.int64)
        recv = np.empty_like(send)
        request = self.comm.Ialltoall(send, recv)

        def wait():
            wait_all([request])
            return recv

        return wait


class MpiPending:
    """An exchange under way: its requests, and whose rows have landed."""

    def __init__(self, receives, peers, sends, num_peers):
        self.receives, self.peers, self.sends = receives, peers, sends
        self.parts_missing = np.bincount(peers, minlength=num_peers)
        self.landed = {peer for peer in range(num_peers) if self.parts_missing[peer] == 0}

    def poke(self):
        """Let messages progress -> the peers whose last row landed just now."""
        MPI.Request.Testsome(self.sends)
        fresh = []
        for index in MPI.Request.Testsome(self.receives) or []:
            peer = self.peers[index]
            self.parts_missing[peer] -= 1
            if self.parts_missing[peer] == 0:
                fresh.append(peer)
        self.landed.update(fresh)
        return fresh

    def arrivals(self):
        """Yield lists of peers whose rows have landed since the last one, own rows first, until all have."""
        yield sorted(self.landed)
        patience = Patience()
        while len(self.landed) < len(self.parts_missing):
            fresh = self.poke()
            if fresh:
                patience.reset()
                yield fresh
            else:
                patience.pause()

    def wait_for(self, peers):
        """Wait until the rows of all these peers have landed."""
        patience = Patience()
        while not self.landed.issuperset(peers):
            if self.poke():
                patience.reset()
            else:
                patience.pause()

    def wait(self):
        """Wait until everything has landed and left."""
        self.wait_for(range(len(self.parts_missing)))
        wait_all(self.sends)


def start_all_reduce(comm, array):
    """Begin to sum a NumPy array over the ranks, in place -> a call that waits for it. Collective over comm."""
    request = comm.Iallreduce(MPI.IN_PLACE, array)
    return lambda: wait_all([request])


def all_reduce(comm, array):
    """Sum a NumPy array over the ranks, in place. Collective over comm."""
    start_all_reduce(comm, array)()
    return array
