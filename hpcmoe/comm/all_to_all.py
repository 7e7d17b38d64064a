"""All-to-all between devices: each rank sends a part of one buffer to each other, and receives into another.

The buffers lie on a device, so two things must be known: when the device has written what is sent, for which a transfer
waits; and when it may read what was received, which is behind an event. All ranks know the counts before a transfer
starts. Here is the plainest backend: MPI on the buffers as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpcmoe.comm.device import Device, Event
from hpcmoe.comm.rows import Buffer
from hpcmoe.comm.transport import Request, Transport
from hpcmoe.wait import poke_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The buffers and splits of one all-to-all among P ranks."""

    tag: int
    name: str  # for who reads an error
    send: Buffer
    send_edges: np.ndarray  # [P + 1] int64: rank r gets rows send_edges[r] to send_edges[r + 1]
    recv: Buffer
    recv_edges: np.ndarray  # [P + 1] int64

    def send_slice(self, rank: int) -> slice:
        """Return the rows for a rank."""
        return slice(int(self.send_edges[rank]), int(self.send_edges[rank + 1]))

    def recv_slice(self, rank: int) -> slice:
        """Return the rows of a rank."""
        return slice(int(self.recv_edges[rank]), int(self.recv_edges[rank + 1]))


class AllToAll(Protocol):
    """A backend that carries transfers among the P ranks of a group, without blocking."""

    name: str

    def start(self, transfer: Transfer, ready: Event, after: Request | None) -> TransferRequest:
        """Start a transfer once `ready` has happened and the sends of `after`, if any, are done.

        All that the device has done with either buffer lies before `ready`. NCCL matches transfers by their order,
        which must be the same on all ranks.
        """

    def poke(self) -> bool:
        """Advance all transfers, without waiting. Return True if anything moved."""


class TransferRequest(Request, Protocol):
    """A transfer under way."""

    event: Any  # of the device: what was received may be read behind it, once recv_done


class DirectAllToAll:
    """MPI's Isend and Irecv on buffers of the device: on the host, or with an MPI that takes device pointers."""

    name = "mpi, direct"

    def __init__(self, transport: Transport, device: Device) -> None:
        self.transport, self.device = transport, device
        self.requests: list[Any] = []

    def start(self, transfer: Transfer, ready: Event, after: Request | None) -> TransferRequest:
        """Start a transfer (see AllToAll)."""
        request = self.make_request(transfer, ready, after)
        self.requests.append(request)
        request.poke()
        return request

    def make_request(self, transfer: Transfer, ready: Event, after: Request | None) -> Any:
        """Return the request of a transfer, which has not begun."""
        return DirectRequest(self, transfer, ready, after)

    def poke(self) -> bool:
        """Advance messages, and then transfers. Return True if anything moved."""
        return self.transport.poke() | poke_all(self.requests)


class MpiRequest:
    """A transfer by MPI: begun when the device has written what is sent, and earlier sends have left the buffers."""

    def __init__(self, all_to_all: DirectAllToAll, transfer: Transfer, ready: Event, after: Request | None) -> None:
        self.transport, self.device = all_to_all.transport, all_to_all.device
        self.transfer, self.ready, self.after = transfer, ready, after
        self.begun, self.event = False, ready

    def may_begin(self) -> bool:
        """Return True if this transfer has not begun, and may touch its buffers."""
        return not self.begun and (self.after is None or self.after.send_done) and self.ready.query()


class DirectRequest(MpiRequest):
    """A transfer of one message to each rank."""

    send_done = recv_done = False

    def begin(self) -> None:
        """Start all messages, and copy what this rank keeps on the device."""
        self.begun, self.messages = True, list[Request]()
        self.event = copy_own(self.device, self.transfer, self.transport.rank)
        for target, source in list_peers(self.transport.rank, self.transport.size):
            rows = self.transfer.recv.array[self.transfer.recv_slice(source)]
            if len(rows):
                self.messages.append(self.transport.recv_rows(rows, source, self.transfer.tag))
            rows = self.transfer.send.array[self.transfer.send_slice(target)]
            if len(rows):
                self.messages.append(self.transport.send_rows(rows, target, self.transfer.tag))

    def poke(self) -> bool:
        """Start the messages when that may be, and mark what is done. Return True if anything has changed."""
        before = self.begun, self.send_done, self.recv_done
        if self.may_begin():
            self.begin()
        if self.begun:
            self.send_done = all(message.send_done for message in self.messages)
            self.recv_done = all(message.recv_done for message in self.messages)
        return before != (self.begun, self.send_done, self.recv_done)

    @property
    def done(self) -> bool:
        """Return True if nothing is left to do, on the device either."""
        return self.send_done and self.recv_done and self.event.query()


def list_peers(rank: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of ranks that one sends to and receives from at once.

    All ranks take the same steps, so that a rank that sends little at a time meets a peer that receives from it.
    """
    yield from (((rank + step) % size, (rank - step) % size) for step in range(1, size))


def copy_own(device: Device, transfer: Transfer, rank: int) -> Event:
    """Copy the rows that a rank sends to itself, on the send stream, and return the event behind it."""
    rows = transfer.send.tensor[transfer.send_slice(rank)]
    with device.use(device.send_stream):
        if len(rows):
            transfer.recv.tensor[transfer.recv_slice(rank)].copy_(rows, non_blocking=True)
        return device.send_stream.record_event()
