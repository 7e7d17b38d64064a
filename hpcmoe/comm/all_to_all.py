"""What carries rows between devices: each rank sends a part of one buffer to each other, and receives into another.

A leg is one way of an exchange. Its buffers lie on a device, so two things must be known of each: when the device has
written what is sent, which is what the leg waits for; and when it may read what has come, which is behind an event.
The counts are known to all before a leg starts. Here is the plainest way: MPI on the buffers as they are.
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
class Leg:
    """Rows from one buffer to each of P ranks, and from each of them into another buffer."""

    tag: int
    name: str  # for who reads an error
    send: Buffer
    send_edges: np.ndarray  # [P + 1] int64: rank r gets rows send_edges[r] to send_edges[r + 1]
    receive: Buffer
    receive_edges: np.ndarray  # [P + 1] int64

    def sent_to(self, rank):
        """The rows for a rank -> slice."""
        return slice(int(self.send_edges[rank]), int(self.send_edges[rank + 1]))

    def received_from(self, rank):
        """The rows of a rank -> slice."""
        return slice(int(self.receive_edges[rank]), int(self.receive_edges[rank + 1]))

    def peers(self, rank, size):
        """Yield with whom a rank exchanges at once -> (rank that is sent to, rank that is received from).

        All ranks take the same steps, so that whoever sends little at a time meets a peer that receives from it.
        """
        yield from (((rank + step) % size, (rank - step) % size) for step in range(1, size))


class Pending(Protocol):
    """A leg under way."""

    landed: bool  # what was received may be read by what waits for `event`
    gone: bool  # what was sent may be written over
    event: Any  # of the device, once it has landed

    def is_over(self):
        """Whether the device has nothing left to do for it."""


class Carrier(Protocol):
    """Carries legs among the P ranks of a group, without blocking."""

    name: str

    def start(self, leg, ready, after):
        """Begin a leg when `ready`, an event, has happened and the Pending `after`, if any, is gone -> Pending.

        All that the device has done with either buffer lies before `ready`. Legs start in the same order on all ranks
        where `in_order` says so.
        """

    def poke(self):
        """Go on with all legs, without waiting -> whether anything moved."""


class DirectCarrier:
    """MPI's Isend and Irecv on buffers of the device: on the host, or with an MPI that takes device pointers."""

    name = "mpi, direct"
    in_order = False

    def __init__(self, transport, device):
        self.transport, self.device = transport, device
        self.pending = []

    def start(self, leg, ready, after):
        """Begin a leg -> Pending."""
        pending = DirectPending(self, leg, ready, after)
        self.pending.append(pending)
        pending.poke()
        return pending

    def poke(self):
        """Go on with all legs -> whether anything moved."""
        return poke_all(self)


def poke_all(carrier):
    """Go on with the messages and then the legs of a carrier by MPI -> whether anything moved."""
    moved = carrier.transport.poke()
    for pending in carrier.pending:
        moved |= pending.poke()
    carrier.pending = [pending for pending in carrier.pending if not pending.is_over()]
    return moved


class DirectPending:
    """A leg whose messages are whole."""

    def __init__(self, carrier, leg, ready, after):
        self.carrier, self.leg, self.ready, self.after = carrier, leg, ready, after
        self.landed = self.gone = False
        self.sends = self.receives = self.event = None

    def poke(self):
        """Begin when that may be, and see what is done -> whether anything has changed."""
        before = self.sends is not None, self.landed, self.gone
        if self.sends is None and may_begin(self):
            self.begin()
        if self.sends is not None:
            self.gone = all(ticket.done for ticket in self.sends)
            self.landed = all(ticket.done for ticket in self.receives)
        return before != (self.sends is not None, self.landed, self.gone)

    def begin(self):
        """Send and receive all; what this rank keeps is copied on the device."""
        leg, transport = self.leg, self.carrier.transport
        self.sends, self.receives = [], []
        self.event = copy_own(self.carrier.device, leg, transport.rank)
        for target, source in leg.peers(transport.rank, transport.size):
            rows = leg.receive.array[leg.received_from(source)]
            if len(rows):
                self.receives.append(transport.receive_rows(rows, source, leg.tag))
            rows = leg.send.array[leg.sent_to(target)]
            if len(rows):
                self.sends.append(transport.send_rows(rows, target, leg.tag))

    def is_over(self):
        """Whether the device has nothing left to do for it."""
        return self.landed and self.gone and self.event.query()


def may_begin(pending):
    """Whether a leg by MPI may touch its buffers: the device has written the one and is done with the other."""
    return (pending.after is None or pending.after.gone) and pending.ready.query()


def copy_own(device, leg, rank):
    """Copy the rows that a rank sends to itself, on the send stream -> Event."""
    rows = leg.send.tensor[leg.sent_to(rank)]
    with device.use(device.send):
        if len(rows):
            leg.receive.tensor[leg.received_from(rank)].copy_(rows, non_blocking=True)
        return device.send.record_event()
