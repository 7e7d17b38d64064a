"""What carries rows between devices: each rank sends a part of one buffer to each other, and receives into another.

A transfer is one way of an exchange. Its buffers lie on a device, so two things must be known of each: when the device has
written what is sent, which is what the transfer waits for; and when it may read what has come, which is behind an event.
The counts are known to all before a transfer starts. Here is the plainest way: MPI on the buffers as they are.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Message rows on a device, seen by who carries them and by who works on them."""

    array: Any  # [n, row_bytes] uint8: NumPy's or CuPy's
    tensor: Any  # [n, row_bytes] uint8: torch's, of the same memory

    def __len__(self):
        """Rows."""
        return len(self.array)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Rows from one buffer to each of P ranks, and from each of them into another buffer."""

    tag: int
    name: str  # for who reads an error
    send: Buffer
    send_edges: np.ndarray  # [P + 1] int64: rank r gets rows send_edges[r] to send_edges[r + 1]
    recv: Buffer
    recv_edges: np.ndarray  # [P + 1] int64

    def send_slice(self, rank):
        """The rows for a rank -> slice."""
        return slice(int(self.send_edges[rank]), int(self.send_edges[rank + 1]))

    def recv_slice(self, rank):
        """The rows of a rank -> slice."""
        return slice(int(self.recv_edges[rank]), int(self.recv_edges[rank + 1]))

    def peers(self, rank, size):
        """Yield with whom a rank exchanges at once -> (rank that is sent to, rank that is received from).

        All ranks take the same steps, so that whoever sends little at a time meets a peer that receives from it.
        """
        yield from (((rank + step) % size, (rank - step) % size) for step in range(1, size))


class Request(Protocol):
    """A transfer under way."""

    recv_done: bool  # what was received may be read by what waits for `event`
    send_done: bool  # what was sent may be written over
    event: Any  # of the device, once it has recv_done

    def is_over(self):
        """Whether the device has nothing left to do for it."""


class AllToAll(Protocol):
    """Carries transfers among the P ranks of a group, without blocking."""

    name: str

    def start(self, transfer, ready, after):
        """Begin a transfer when `ready`, an event, has happened and the Request `after`, if any, is send_done -> Request.

        All that the device has done with either buffer lies before `ready`. Legs start in the same order on all ranks
        where `in_order` says so.
        """

    def poke(self):
        """Go on with all transfers, without waiting -> whether anything moved."""


class DirectAllToAll:
    """MPI's Isend and Irecv on buffers of the device: on the host, or with an MPI that takes device pointers."""

    name = "mpi, direct"
    in_order = False

    def __init__(self, transport, device):
        self.transport, self.device = transport, device
        self.requests = []

    def start(self, transfer, ready, after):
        """Begin a transfer -> Request."""
        request = DirectRequest(self, transfer, ready, after)
        self.requests.append(request)
        request.poke()
        return request

    def poke(self):
        """Go on with all transfers -> whether anything moved."""
        return poke_requests(self)


def poke_requests(all_to_all):
    """Go on with the messages and then the transfers of a all_to_all by MPI -> whether anything moved."""
    moved = all_to_all.transport.poke()
    for request in all_to_all.requests:
        moved |= request.poke()
    all_to_all.requests = [request for request in all_to_all.requests if not request.is_over()]
    return moved


class DirectRequest:
    """A transfer whose messages are whole."""

    def __init__(self, all_to_all, transfer, ready, after):
        self.all_to_all, self.transfer, self.ready, self.after = all_to_all, transfer, ready, after
        self.recv_done = self.send_done = False
        self.sends = self.receives = self.event = None

    def poke(self):
        """Begin when that may be, and see what is done -> whether anything has changed."""
        before = self.sends is not None, self.recv_done, self.send_done
        if self.sends is None and may_begin(self):
            self.begin()
        if self.sends is not None:
            self.send_done = all(request.done for request in self.sends)
            self.recv_done = all(request.done for request in self.receives)
        return before != (self.sends is not None, self.recv_done, self.send_done)

    def begin(self):
        """Send and receive all; what this rank keeps is copied on the device."""
        transfer, transport = self.transfer, self.all_to_all.transport
        self.sends, self.receives = [], []
        self.event = copy_own(self.all_to_all.device, transfer, transport.rank)
        for target, source in transfer.peers(transport.rank, transport.size):
            rows = transfer.recv.array[transfer.recv_slice(source)]
            if len(rows):
                self.receives.append(transport.recv_rows(rows, source, transfer.tag))
            rows = transfer.send.array[transfer.send_slice(target)]
            if len(rows):
                self.sends.append(transport.send_rows(rows, target, transfer.tag))

    def is_over(self):
        """Whether the device has nothing left to do for it."""
        return self.recv_done and self.send_done and self.event.query()


def may_begin(request):
    """Whether a transfer by MPI may touch its buffers: the device has written the one and is done with the other."""
    return (request.after is None or request.after.send_done) and request.ready.query()


def copy_own(device, transfer, rank):
    """Copy the rows that a rank sends to itself, on the send stream -> Event."""
    rows = transfer.send.tensor[transfer.send_slice(rank)]
    with device.use(device.send_stream):
        if len(rows):
            transfer.recv.tensor[transfer.recv_slice(rank)].copy_(rows, non_blocking=True)
        return device.send_stream.record_event()
