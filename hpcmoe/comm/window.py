"""Memory that the ranks of one node share: rows that any of them gathers from and writes to, without a message.

Three arrays run over all rows of all local peers (the ranks that share the window): the row itself, its gate value, and
the row from which it is to be computed. Descriptors announce what is there, and when. Each of their words has one
writer, which lets what it announces reach memory first.
"""

import contextlib
import math
import mmap
import os
import pathlib
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from hpcmoe.errors import ClusterError
from hpcmoe.survivors import survives_deaths
from hpcmoe.wait import barrier, broadcast

_SHARED_MEMORY = "/dev/shm"  # where MPIs on Linux keep it
_FENCE = threading.Lock()
# A descriptor: its exchange, first row, the number of its sender's descriptors, the sender's word to all ranks; behind
# these the rows for each local peer's slots.
DESCRIPTOR_WORDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSizes:
    """What each local peer puts into the window."""

    rows: int
    row_bytes: int
    num_in_flight: int
    max_senders: int  # ranks of other nodes whose messages a local peer receives, at most
    max_messages: int  # of each of them in one exchange
    num_slots: int  # of all local peers together

    @property
    def num_descriptors(self) -> int:
        """Return how much a rank can announce in one exchange: its own tokens, and all messages that it receives."""
        return 1 + self.max_senders * self.max_messages

    def arrays(self, num_local_peers: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Return the window's arrays by name -> (shape, dtype)."""
        rows, shared = num_local_peers * self.rows, (num_local_peers, self.num_in_flight)
        words = DESCRIPTOR_WORDS + self.num_slots
        return {
            "rows": ((rows, self.row_bytes), np.uint8),
            "gate_values": ((rows,), np.float32),
            "sources": ((rows,), np.int64),
            "sequence_numbers": ((num_local_peers,), np.int64),
            "consumed": (shared, np.int64),
            "done": ((*shared, num_local_peers, self.num_descriptors), np.int64),
            "descriptors": ((*shared, 2, self.num_descriptors, words), np.int64),
        }

    def num_bytes(self, num_local_peers: int) -> int:
        """Return the bytes of the whole window."""
        return sum(round_up(size_of(*array)) for array in self.arrays(num_local_peers).values())


class Window:
    """Rows and descriptors of the local peers, each array with the shape that WindowSizes.arrays gives it."""

    rows: np.ndarray
    gate_values: np.ndarray
    sources: np.ndarray
    sequence_numbers: np.ndarray
    consumed: np.ndarray
    done: np.ndarray
    descriptors: np.ndarray

    def __init__(
        self, sizes: WindowSizes, num_local_peers: int, local_index: int, memory: np.ndarray, sync: Callable[[], object]
    ) -> None:
        """memory: uint8 array of sizes.num_bytes, all zero; sync: a call that orders memory among the local peers."""
        self.sizes, self.num_local_peers, self.local_index, self.sync = sizes, num_local_peers, local_index, sync
        self.num_bytes, begin = len(memory), 0
        for name, (shape, dtype) in sizes.arrays(num_local_peers).items():
            num_bytes = size_of(shape, dtype)
            setattr(self, name, memory[begin : begin + num_bytes].view(dtype).reshape(shape))
            begin += round_up(num_bytes)
        self.first_row = local_index * sizes.rows  # of this rank

    def table(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all rows as scalars -> [local peers * rows, H]."""
        return torch.from_numpy(self.rows).view(dtype)

    def post(
        self,
        buffer_index: int,
        exchange: int,
        descriptor: int,
        head: tuple[int, int, int],
        counts: np.ndarray | None = None,
    ) -> None:
        """Announce rows that lie in the window: counts [local peers, s] of them for each slot; None: no rows.

        head: their first row, the number of their sender's descriptors, and the sender's word.
        """
        words = self.descriptors[self.local_index, buffer_index, exchange % 2, descriptor]
        words[1:DESCRIPTOR_WORDS], words[DESCRIPTOR_WORDS:] = head, 0 if counts is None else counts.ravel()
        self.sync()
        words[0] = exchange
        self.sequence_numbers[self.local_index] += 1

    def may_post(self, buffer_index: int, exchange: int) -> bool:
        """Return True if all local peers have read the last exchange but one, whose descriptors are written over."""
        return bool((self.consumed[:, buffer_index] >= exchange - 2).all())

    def mark_consumed(self, buffer_index: int, exchange: int) -> None:
        """Mark this exchange's descriptors as consumed by this rank."""
        self.sync()
        self.consumed[self.local_index, buffer_index] = exchange
        self.sequence_numbers[self.local_index] += 1

    def mark_done(self, buffer_index: int, exchange: int, local_peer: int, descriptor: int) -> None:
        """Mark what a local peer's descriptor asks as done by this rank's experts."""
        self.sync()
        self.done[self.local_index, buffer_index, local_peer, descriptor] = exchange
        self.sequence_numbers[self.local_index] += 1

    def read_sequence_number(self) -> int:
        """Return how often any local peer has announced anything: while it stays, there is nothing to look for."""
        return int(self.sequence_numbers.sum())

    def is_done(self, buffer_index: int, exchange: int, descriptor: int, counts: np.ndarray) -> bool:
        """Return True if the experts of all local peers have done this rank's descriptor: counts [local peers, s]."""
        if not (self.done[:, buffer_index, self.local_index, descriptor] >= exchange)[counts.any(axis=1)].all():
            return False
        self.sync()
        return True


def size_of(shape: tuple[int, ...], dtype: type) -> int:
    """Return the bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def round_up(num_bytes: int) -> int:
    """Return the bytes of whole pages, so that each array has pages of its own."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def make_private_window(sizes: WindowSizes) -> Window:
    """Return the window of a rank without local peers."""
    return touch(Window(sizes, 1, 0, np.zeros(sizes.num_bytes(1), np.uint8), lambda: None))


@contextlib.contextmanager
def open_window(comm: MPI.Comm, sizes: WindowSizes) -> Iterator[Window]:
    """Share a window among the ranks of comm, which all lie on one node. Collective over comm, both ends."""
    if comm.size == 1:
        yield make_private_window(sizes)
        return
    assert isinstance(comm, MPI.Intracomm)
    with (map_shared if survives_deaths() else share_by_mpi)(comm, sizes.num_bytes(comm.size)) as (memory, sync):
        window = touch(Window(sizes, comm.size, comm.rank, memory, sync))
        barrier(comm)
        yield window


@contextlib.contextmanager
def share_by_mpi(comm: MPI.Intracomm, num_bytes: int) -> Iterator[tuple[np.ndarray, Callable[[], object]]]:
    """Share memory by MPI -> (memory, [num_bytes] uint8, the call that orders it). Collective over comm, both ends."""
    # All of it belongs to the first rank, so that it is one range; each page goes to the core that touches it first.
    barrier(comm)
    shared = MPI.Win.Allocate_shared(num_bytes if comm.rank == 0 else 0, 1, comm=comm)
    shared.Lock_all(MPI.MODE_NOCHECK)
    yield np.asarray(shared.Shared_query(0)[0]).view(np.uint8)[:num_bytes], shared.Sync

    # Freeing is collective: after an error, which not all ranks may share, leave it to the end of the process.
    barrier(comm)
    shared.Unlock_all()
    shared.Free()


@contextlib.contextmanager
def map_shared(comm: MPI.Intracomm, num_bytes: int) -> Iterator[tuple[np.ndarray, Callable[[], object]]]:
    """Share memory by a file that has no name any more once all have mapped it; as share_by_mpi.

    MPI's own windows do not outlive the death of a rank.
    """
    path = broadcast(comm, f"{_SHARED_MEMORY}/hpcmoe-window-{uuid.uuid4().hex}" if comm.rank == 0 else None)
    try:
        if comm.rank == 0:
            with open(path, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)  # zeros
        barrier(comm)
        memory = np.memmap(path, np.uint8, "r+", shape=(num_bytes,))
        barrier(comm)
    finally:
        if comm.rank == 0:
            pathlib.Path(path).unlink(missing_ok=True)
    yield memory, order_memory


def order_memory() -> None:
    """Order memory: what this thread has written reaches it before what it writes next, and so what it reads."""
    for _ in range(2):  # a lock taken and given back holds back what came before, the next one what comes after
        with _FENCE:
            pass


def check_shared_memory(num_bytes: int) -> None:
    """Raise ClusterError when the node's shared memory is too small: touching more of it would kill the rank."""
    if not os.path.isdir(_SHARED_MEMORY):
        return
    state = os.statvfs(_SHARED_MEMORY)
    free = state.f_bavail * state.f_frsize
    if num_bytes > free:
        raise ClusterError(
            f"{_SHARED_MEMORY}: {free / 1e6:.0f} MB free, and the ranks of a node share {num_bytes / 1e6:.0f} MB; "
            "enlarge it, or set [comm] shared_memory = false"
        )


def touch(window: Window) -> Window:
    """Zero this rank's part of each array, which brings its pages near, and return the window."""
    for name in window.sizes.arrays(window.num_local_peers):
        of_peers = getattr(window, name).reshape(window.num_local_peers, -1)
        of_peers[window.local_index] = 0
    return window
