"""Rows between devices by way of the host, in pieces: while one is in the network, the next is copied.

For MPIs that take no device pointers. A piece goes from the device to pinned memory on the send stream, by MPI to the
other rank's pinned memory, and from there to its device on the receive stream.
"""

from __future__ import annotations

from collections import deque

import torch

from hpcmoe.comm.all_to_all import DirectAllToAll, MpiRequest, Transfer, copy_own, list_peers
from hpcmoe.comm.device import Device, Event
from hpcmoe.comm.transport import Request, Transport

_PIECE_BYTES = 2**22  # long enough for a copy's and a message's full speed, short beside what a rank sends
MAX_PIECES = 8  # of a transfer that are on their way out, and as many on their way in


class StagedAllToAll(DirectAllToAll):
    """MPI on pieces of pinned memory."""

    name = "mpi, staged"

    def __init__(self, transport: Transport, device: Device, row_bytes: int) -> None:
        super().__init__(transport, device)
        self.row_bytes, self.piece_rows = row_bytes, max(_PIECE_BYTES // row_bytes, 1)
        self.free: list[torch.Tensor] = []  # pinned memory, [piece_rows, row_bytes] uint8 each

    def make_request(self, transfer: Transfer, ready: Event, after: Request | None) -> StagedRequest:
        """Return the request of a transfer, which has not begun."""
        return StagedRequest(self, transfer, ready, after)

    def cut(self, rows: slice, peer: int) -> list[StagedPiece]:
        """Return the pieces of a slice of rows, without memory as yet."""
        edges = range(rows.start, rows.stop, self.piece_rows)
        return [StagedPiece(slice(first, min(first + self.piece_rows, rows.stop)), peer) for first in edges]

    def allot(self, piece: StagedPiece) -> StagedPiece:
        """Allocate pinned memory for a piece, and return the piece."""
        piece.memory = self.free.pop() if self.free else self.device.make_pinned(self.piece_rows, self.row_bytes)
        piece.staged = piece.memory[: piece.rows.stop - piece.rows.start]
        return piece


class StagedPiece:
    """Rows on their way between a device and a peer."""

    memory: torch.Tensor  # [piece_rows, row_bytes] uint8, pinned
    staged: torch.Tensor  # the part of it that has rows
    event: Event  # behind the copy from or to the device
    request: Request  # of the message

    def __init__(self, rows: slice, peer: int) -> None:
        self.rows, self.peer = rows, peer


class StagedRequest(MpiRequest):
    """A transfer in pieces, each in a queue: to_send, copied_out or sending; to_recv, receiving or copied_in."""

    def __init__(self, all_to_all: StagedAllToAll, transfer: Transfer, ready: Event, after: Request | None) -> None:
        super().__init__(all_to_all, transfer, ready, after)
        self.backend, self.to_send, self.to_recv = all_to_all, deque[StagedPiece](), deque[StagedPiece]()
        for target, source in list_peers(self.transport.rank, self.transport.size):
            self.to_send += all_to_all.cut(transfer.send_slice(target), target)
            self.to_recv += all_to_all.cut(transfer.recv_slice(source), source)
        self.copied_out, self.copied_in = deque[StagedPiece](), deque[StagedPiece]()
        self.sending: list[StagedPiece] = []
        self.receiving: list[StagedPiece] = []

    @property
    def send_done(self) -> bool:
        """Return True if all has been sent."""
        return self.begun and not (self.to_send or self.copied_out or self.sending)

    @property
    def recv_done(self) -> bool:
        """Return True if all has been received, and its copies to the device are under way."""
        return self.begun and not (self.to_recv or self.receiving)

    @property
    def done(self) -> bool:
        """Return True if nothing is left to do, on the device either."""
        return self.send_done and self.recv_done and not self.copied_in and self.event.query()

    def begin(self) -> None:
        """Make both streams wait for what has been done with the buffers, and start the first pieces."""
        device, self.begun = self.device, True
        device.send_stream.wait_event(self.ready)
        device.recv_stream.wait_event(self.ready)
        device.recv_stream.wait_event(copy_own(device, self.transfer, self.transport.rank))
        self.event = device.recv_stream.record_event()
        self.start_pieces()

    def poke(self) -> bool:
        """Advance every piece as far as it can go. Return True if anything has changed."""
        if not self.begun:
            if self.may_begin():
                self.begin()
            return self.begun
        queues = self.to_send, self.copied_out, self.sending, self.to_recv, self.receiving, self.copied_in
        before = [len(queue) for queue in queues]
        self.send_copied()
        self.free_sent()
        self.copy_received()
        self.free_copied_in()
        self.start_pieces()
        return before != [len(queue) for queue in queues]

    def start_pieces(self) -> None:
        """Start to receive pieces and to copy them out, while there is room for more of them."""
        while self.to_recv and len(self.receiving) + len(self.copied_in) < MAX_PIECES:
            piece = self.backend.allot(self.to_recv.popleft())
            piece.request = self.transport.recv_rows(piece.staged.numpy(), piece.peer, self.transfer.tag)
            self.receiving.append(piece)
        while self.to_send and len(self.copied_out) + len(self.sending) < MAX_PIECES:
            piece = self.backend.allot(self.to_send.popleft())
            with self.device.use(self.device.send_stream):
                piece.staged.copy_(self.transfer.send.tensor[piece.rows], non_blocking=True)
                piece.event = self.device.send_stream.record_event()
            self.copied_out.append(piece)

    def send_copied(self) -> None:
        """Send the pieces that have left the device, in their order."""
        while self.copied_out and self.copied_out[0].event.query():
            piece = self.copied_out.popleft()
            piece.request = self.transport.send_rows(piece.staged.numpy(), piece.peer, self.transfer.tag)
            self.sending.append(piece)

    def free_sent(self) -> None:
        """Free the memory of pieces that have been sent."""
        self.backend.free += [piece.memory for piece in self.sending if piece.request.done]
        self.sending[:] = [piece for piece in self.sending if not piece.request.done]

    def copy_received(self) -> None:
        """Copy the pieces that have been received to the device."""
        received = [piece for piece in self.receiving if piece.request.done]
        self.receiving[:] = [piece for piece in self.receiving if not piece.request.done]
        with self.device.use(self.device.recv_stream):
            for piece in received:
                self.transfer.recv.tensor[piece.rows].copy_(piece.staged, non_blocking=True)
                piece.event = self.event = self.device.recv_stream.record_event()
                self.copied_in.append(piece)

    def free_copied_in(self) -> None:
        """Free the memory of pieces that are on the device."""
        while self.copied_in and self.copied_in[0].event.query():
            self.backend.free.append(self.copied_in.popleft().memory)
