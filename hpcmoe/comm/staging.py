"""Rows between devices by way of the host, in pieces: while one is in the network, the next is copied.

For MPIs that take no device pointers. A piece goes from the device to pinned memory on the send stream, by MPI to the
other rank's pinned memory, and from there to its device on the receive stream.
"""

from collections import deque

from hpcmoe.comm.all_to_all import copy_own, may_begin, poke_requests

_PIECE_BYTES = 2**22  # long enough for a copy's and a message's full speed, short beside what a rank sends
MOST_PIECES = 8  # of a transfer that are on their way out, and as many on their way in


class StagedAllToAll:
    """MPI on pieces of pinned memory."""

    name = "mpi, staged"
    in_order = False

    def __init__(self, transport, device, row_bytes):
        self.transport, self.device, self.row_bytes = transport, device, row_bytes
        self.piece_rows = max(_PIECE_BYTES // row_bytes, 1)
        self.requests, self.free = [], []

    def start(self, transfer, ready, after):
        """Begin a transfer -> Request."""
        request = StagedRequest(self, transfer, ready, after)
        self.requests.append(request)
        request.poke()
        return request

    def poke(self):
        """Go on with all transfers -> whether anything moved."""
        return poke_requests(self)

    def take_piece(self):
        """Take pinned memory for a piece -> uint8 tensor [piece_rows, row_bytes] on the host."""
        return self.free.pop() if self.free else self.device.make_pinned(self.piece_rows, self.row_bytes)

    def cut(self, rows):
        """Cut a slice of rows into pieces -> slices."""
        edges = range(rows.start, rows.stop, self.piece_rows)
        return [slice(first, min(first + self.piece_rows, rows.stop)) for first in edges]


class Piece:
    """Rows in pinned memory, on their way from or to the device."""

    def __init__(self, memory, rows, peer):
        self.memory, self.rows, self.peer = memory, rows, peer
        self.staged = memory[: rows.stop - rows.start]
        self.event = self.request = None


class StagedRequest:
    """A transfer in pieces."""

    def __init__(self, all_to_all, transfer, ready, after):
        self.all_to_all, self.transfer, self.ready, self.after = all_to_all, transfer, ready, after
        rank, size = all_to_all.transport.rank, all_to_all.transport.size
        self.to_send, self.to_receive = deque(), deque()
        for target, source in transfer.peers(rank, size):
            self.to_send += [(target, rows) for rows in all_to_all.cut(transfer.send_slice(target))]
            self.to_receive += [(source, rows) for rows in all_to_all.cut(transfer.recv_slice(source))]
        self.copied_out, self.sending, self.receiving, self.copied_in = deque(), [], [], deque()
        self.begun = False
        self.event = self.own = None

    @property
    def send_done(self):
        """Whether all has been sent."""
        return self.begun and not (self.to_send or self.copied_out or self.sending)

    @property
    def recv_done(self):
        """Whether all has been received, and its copies to the device are under way."""
        return self.begun and not (self.to_receive or self.receiving)

    def is_over(self):
        """Whether the device has nothing left to do for it."""
        return self.send_done and self.recv_done and not self.copied_in and self.event.query()

    def poke(self):
        """Take every piece as far as it can go -> whether anything has changed."""
        if not self.begun:
            if not may_begin(self):
                return False
            self.begin()
            return True
        moved = [self.send_copied(), self.free_sent(), self.copy_received(), self.free_copied_in(), self.fill()]
        return any(moved)

    def begin(self):
        """Let both streams wait for what has been done with the buffers, and start the first pieces."""
        device, self.begun = self.all_to_all.device, True
        device.send_stream.wait_event(self.ready)
        device.recv_stream.wait_event(self.ready)
        self.event = copy_own(device, self.transfer, self.all_to_all.transport.rank)
        device.recv_stream.wait_event(self.event)
        self.event = device.recv_stream.record_event()
        self.fill()

    def fill(self):
        """Take up new pieces while there is room -> whether any."""
        all_to_all, moved = self.all_to_all, False
        while self.to_receive and len(self.receiving) + len(self.copied_in) < MOST_PIECES:
            peer, rows = self.to_receive.popleft()
            piece = Piece(all_to_all.take_piece(), rows, peer)
            piece.request = all_to_all.transport.recv_rows(piece.staged.numpy(), peer, self.transfer.tag)
            self.receiving.append(piece)
            moved = True
        while self.to_send and len(self.copied_out) + len(self.sending) < MOST_PIECES:
            peer, rows = self.to_send.popleft()
            piece = Piece(all_to_all.take_piece(), rows, peer)
            with all_to_all.device.use(all_to_all.device.send_stream):
                piece.staged.copy_(self.transfer.send.tensor[rows], non_blocking=True)
                piece.event = all_to_all.device.send_stream.record_event()
            self.copied_out.append(piece)
            moved = True
        return moved

    def send_copied(self):
        """Send the pieces that have left the device, in their order -> whether any."""
        moved = False
        while self.copied_out and self.copied_out[0].event.query():
            piece = self.copied_out.popleft()
            piece.request = self.all_to_all.transport.send_rows(piece.staged.numpy(), piece.peer, self.transfer.tag)
            self.sending.append(piece)
            moved = True
        return moved

    def free_sent(self):
        """Take the memory of pieces that have been sent back -> whether any."""
        sent = [piece for piece in self.sending if piece.request.done]
        self.sending = [piece for piece in self.sending if not piece.request.done]
        self.all_to_all.free += [piece.memory for piece in sent]
        return bool(sent)

    def copy_received(self):
        """Copy what has come to the device -> whether any."""
        device, there = self.all_to_all.device, [piece for piece in self.receiving if piece.request.done]
        self.receiving = [piece for piece in self.receiving if not piece.request.done]
        with device.use(device.recv_stream):
            for piece in there:
                self.transfer.recv.tensor[piece.rows].copy_(piece.staged, non_blocking=True)
                piece.event = self.event = device.recv_stream.record_event()
                self.copied_in.append(piece)
        return bool(there)

    def free_copied_in(self):
        """Take the memory of pieces that are on the device back -> whether any."""
        moved = False
        while self.copied_in and self.copied_in[0].event.query():
            self.all_to_all.free.append(self.copied_in.popleft().memory)
            moved = True
        return moved
