"""Memory that the ranks of one node share: rows that any of them gathers from and writes to, without a message.

Three arrays run over all rows of all local peers (the ranks that share the window): the row itself, a number that goes with
it, and the row from which it is to be computed. A board of words says when what is there. Each word has one writer,
who lets what it announces reach memory first.
"""

import contextlib
import math
import mmap
import os
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from hpcmoe.errors import ClusterError
from hpcmoe.wait import barrier

SHARED_MEMORY = "/dev/shm"  # where MPIs on Linux keep it


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSizes:
    """What each local peer puts into the window."""

    rows: int
    row_bytes: int
    num_in_flight: int
    max_senders: int  # ranks of other nodes whose messages a local peer lands, at most
    max_messages: int  # of each of them in one exchange
    num_slots: int  # of all local peers together

    @property
    def num_descriptors(self):
        """What a rank can announce in one exchange: its own tokens, and all messages that it lands."""
        return 1 + self.max_senders * self.max_messages

    def arrays(self, num_local_peers):
        """List the window's arrays -> dict name: (shape, dtype)."""
        rows, num_in_flight = num_local_peers * self.rows, self.num_in_flight
        return {
            "rows": ((rows, self.row_bytes), np.uint8),
            "gate_values": ((rows,), np.float32),
            "sources": ((rows,), np.int64),
            "sequence_numbers": ((num_local_peers,), np.int64),
            "consumed": ((num_local_peers, num_in_flight), np.int64),
            "done": ((num_local_peers, num_in_flight, num_local_peers, self.num_descriptors), np.int64),
            "descriptors": (
                (num_local_peers, num_in_flight, 2, self.num_descriptors, DESCRIPTOR_WORDS + self.num_slots),
                np.int64,
            ),
        }

    def num_bytes(self, num_local_peers):
        """Bytes of the whole window."""
        return sum(round_up(size_of(*array)) for array in self.arrays(num_local_peers).values())


DESCRIPTOR_WORDS = (
    3  # exchange, first row, number of descriptors that its sender has; then rows for each local peer's slots
)


class Window:
    """Rows and descriptor table of the local peers."""

    def __init__(self, sizes, num_local_peers, local_index, memory, sync):
        """memory: uint8 array of sizes.num_bytes, all zero; sync: a call that orders memory among the local peers."""
        self.sizes, self.num_local_peers, self.local_index, self.sync = sizes, num_local_peers, local_index, sync
        self.num_bytes, begin = len(memory), 0
        for name, (shape, dtype) in sizes.arrays(num_local_peers).items():
            num_bytes = size_of(shape, dtype)
            setattr(self, name, memory[begin : begin + num_bytes].view(dtype).reshape(shape))
            begin += round_up(num_bytes)
        self.first_row = local_index * sizes.rows  # of this rank

    def table(self, dtype):
        """See all rows as scalars -> tensor [local_peers * rows, H]."""
        return torch.from_numpy(self.rows).view(dtype)

    def post(self, buffer_index, exchange, descriptor, first, num_descriptors, counts):
        """Announce rows that lie in the window: counts [local_peers, s] of them for each local peer's slots, from `first` on."""
        words = self.descriptors[self.local_index, buffer_index, exchange % 2, descriptor]
        words[1], words[2], words[DESCRIPTOR_WORDS:] = first, num_descriptors, counts.ravel()
        self.sync()
        words[0] = exchange
        self.sequence_numbers[self.local_index] += 1

    def may_post(self, buffer_index, exchange):
        """Whether all local peers have read what the last exchange but one announced: its descriptors are written over."""
        return bool((self.consumed[:, buffer_index] >= exchange - 2).all())

    def mark_consumed(self, buffer_index, exchange):
        """Tell that this rank has read all that was announced."""
        self.sync()
        self.consumed[self.local_index, buffer_index] = exchange
        self.sequence_numbers[self.local_index] += 1

    def mark_done(self, buffer_index, exchange, local_peer, descriptor):
        """Tell that this rank's experts have done what a local peer's descriptor asked."""
        self.sync()
        self.done[self.local_index, buffer_index, local_peer, descriptor] = exchange
        self.sequence_numbers[self.local_index] += 1

    def read_sequence_number(self):
        """Count how often anything has been told, by any local peer: while it stays, there is nothing to look for."""
        return int(self.sequence_numbers.sum())

    def is_done(self, buffer_index, exchange, descriptor, counts):
        """Whether the experts of all local peers have done this rank's descriptor: counts [local_peers, s]."""
        if not (self.done[:, buffer_index, self.local_index, descriptor] >= exchange)[counts.any(axis=1)].all():
            return False
        self.sync()
        return True


def size_of(shape, dtype):
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def round_up(num_bytes):
    """Fill the last page, so that each array has pages of its own."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def make_private_window(sizes):
    """Make the window of a rank without local peers."""
    window = Window(sizes, 1, 0, np.zeros(sizes.num_bytes(1), np.uint8), lambda: None)
    touch(window)
    return window


@contextlib.contextmanager
def open_window(comm, sizes):
    """Share a window among the ranks of comm, which all lie on one node -> Window. Collective over comm, both ends."""
    if comm.size == 1:
        yield make_private_window(sizes)
        return
    num_bytes = sizes.num_bytes(comm.size)

    # All of it belongs to the first rank, so that it is one range; each page goes to the core that touches it first.
    barrier(comm)
    shared = MPI.Win.Allocate_shared(num_bytes if comm.rank == 0 else 0, 1, comm=comm)
    memory = np.frombuffer(shared.Shared_query(0)[0], np.uint8, num_bytes)
    shared.Lock_all(MPI.MODE_NOCHECK)
    window = Window(sizes, comm.size, comm.rank, memory, shared.Sync)
    touch(window)
    barrier(comm)
    yield window

    # Freeing is collective: after an error, which not all ranks may share, leave it to the end of the process.
    barrier(comm)
    shared.Unlock_all()
    shared.Free()


def check_shared_memory(num_bytes):
    """Raise ClusterError when the node's shared memory is too small: touching more of it would kill the rank."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    state = os.statvfs(SHARED_MEMORY)
    free = state.f_bavail * state.f_frsize
    if num_bytes > free:
        raise ClusterError(
            f"{SHARED_MEMORY}: {free / 1e6:.0f} MB free, and the ranks of a node share {num_bytes / 1e6:.0f} MB; "
            "enlarge it, or set [comm] shared_memory = false"
        )


def touch(window):
    """Zero this rank's part of each array, which brings its pages near."""
    for name in ("rows", "gate_values", "sources"):
        of_mates = getattr(window, name).reshape(window.num_local_peers, -1)
        of_mates[window.local_index] = 0
    for words in (window.sequence_numbers, window.consumed, window.done, window.descriptors):
        words[window.local_index] = 0
