"""Messages from other nodes, received by this rank for itself or for all its local peers, and their sums sent home.

header -> room in the pool -> rows -> descriptor in the table -> local peers' experts -> sums -> home -> room free again
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional

from hpcmoe.comm.pool import RowPool
from hpcmoe.comm.transport import HOMEWARD, Direction, MessageKind, Request, Transport
from hpcmoe.comm.window import Window
from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.dispatch.plan import TRAILER_BYTES, num_trailing_rows
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.sizes import HostSizes

T = TypeVar("T")
TagOf = Callable[..., int]  # tag_of(kind, message): of a message of an exchange
CountRows = Callable[[Direction, np.ndarray | int, np.ndarray | int], None]


@dataclass(slots=True, kw_only=True, eq=False)
class InboundMessage:
    """One message on its way through this rank."""

    sender: int
    number: int  # of the sender's messages
    descriptor: int
    num_descriptors: int  # that its sender has in this exchange
    word: int  # of its sender, to all ranks
    num_tokens: int  # U
    counts: np.ndarray  # [local peers, s] assignments for each slot
    rows: slice = field(init=False)  # of the window: its tokens, and behind them the trailer of its assignments
    results: slice = field(init=False)  # of the window, behind these: a row for each assignment
    request: Request = field(init=False)  # of what is under way
    gates: np.ndarray = field(init=False)  # [C] float32 that came with the assignments

    @property
    def num_assignments(self) -> int:
        """Return C."""
        return int(self.counts.sum())

    def is_done(self) -> bool:
        """Return True if what is under way, in or out, is done."""
        return self.request.done


class InboundReceiver:
    """All that this rank receives for others, or for itself, in one exchange."""

    def __init__(self, pool: "ReceivePool", arrivals: Arrivals, direction: Direction, tag_of: TagOf) -> None:
        """direction: outward; arrivals: what is announced to this rank in the same exchange."""
        self.pool, self.window, self.routes, self.transport = pool, pool.window, pool.routes, pool.transport
        self.buffer_index, self.exchange, self.notices = arrivals.buffer_index, arrivals.exchange, arrivals.notices
        self.direction, self.tag_of = direction, tag_of
        self.headers = [self.expect(number, sender) for number, sender in enumerate(self.routes.senders)]
        self.waiting: list[InboundMessage] = []  # for room; messages by what they wait for
        self.receiving: list[InboundMessage] = []
        self.working: list[InboundMessage] = []
        self.leaving: list[InboundMessage] = []

    def expect(self, number: int, sender: int) -> tuple[int, np.ndarray, Request]:
        """Start to receive a sender's header -> its number, words and request."""
        words = np.zeros(self.pool.header_words(number), np.int64)
        return number, words, self.transport.recv_words(words, sender, self.tag_of(MessageKind.HEADER))

    @property
    def done(self) -> bool:
        """Return True if all messages have come and gone."""
        return not (self.headers or self.waiting or self.receiving or self.working or self.leaving)

    def poke(self) -> bool:
        """Advance each message as far as it can go without waiting, and return True if any moved."""
        if not self.window.may_post(self.buffer_index, self.exchange):
            return False
        if self.notices.differ:
            self.give_up()
        moved = [self.read_headers(), self.admit(), self.announce(), self.send_home(), self.release()]
        return any(moved)

    def read_headers(self) -> bool:
        """Queue the messages whose headers have come; in the senders' order where the order of work is fixed."""
        if self.pool.in_order:
            num_ready = len(list(itertools.takewhile(is_received, self.headers)))
            ready, self.headers = self.headers[:num_ready], self.headers[num_ready:]
        else:
            ready, self.headers = partition(self.headers, is_received)
        for number, words, _ in ready:
            self.waiting += self.make_inbound(number, words)
        return bool(ready)

    def make_inbound(self, number: int, words: np.ndarray) -> list[InboundMessage]:
        """Return the messages that a header announces; publish that a sender has none, or none that fit this call."""
        (num_descriptors, word), max_messages = words[:2].tolist(), self.window.sizes.max_messages
        first_descriptor = 1 + number * max_messages
        if num_descriptors == 0 or not self.notices.agrees(words[1]):
            self.window.post(self.buffer_index, self.exchange, first_descriptor, (0, 0, word))
            return []

        # Spread each message's counts over the local peers that the sender serves.
        messages = []
        for index, of_message in enumerate(words[2:].reshape(max_messages, -1)[:num_descriptors]):
            counts = self.pool.no_counts.copy()
            counts[self.routes.served[number]] = of_message[1:].reshape(-1, self.routes.num_slots)
            messages.append(
                InboundMessage(
                    sender=self.routes.senders[number],
                    number=index,
                    descriptor=first_descriptor + index,
                    num_descriptors=num_descriptors if index == 0 else 1,
                    word=word,
                    num_tokens=int(of_message[0]),
                    counts=counts,
                )
            )
        return messages

    def give_up(self) -> None:
        """Publish the words alone of the senders whose rows have not come: the ranks' calls differ, and all raise."""
        for message in self.waiting + self.receiving:
            if message.number == 0:
                self.window.post(self.buffer_index, self.exchange, message.descriptor, (0, 0, message.word))
        self.waiting, self.receiving = [], []

    def admit(self) -> bool:
        """Start to receive the messages for which there is room, in order."""
        moved = False
        while self.waiting:
            # Allocate rows for the tokens and trailer, and behind them for the results.
            message = self.waiting[0]
            num_rows = message.num_tokens + num_trailing_rows(message.num_assignments, self.window.sizes.row_bytes)
            first = self.pool.pools[self.buffer_index].allocate(num_rows + message.num_assignments)
            if first is None:
                break
            message.rows = slice(first, first + num_rows)
            message.results, moved = slice(first + num_rows, first + num_rows + message.num_assignments), True
            rows, tag = self.window.rows[message.rows], self.tag_of(MessageKind.ROWS, message.number)
            message.request = self.transport.recv_rows(rows, message.sender, tag)
            self.receiving.append(self.waiting.pop(0))
        return moved

    def announce(self) -> bool:
        """Announce the messages that have come: each result row's token and gate, and the descriptor."""
        window, others = self.window, self.routes.local_peers != self.routes.rank
        received, self.receiving = partition(self.receiving, InboundMessage.is_done)
        for message in received:
            # Write beside each result row what it is computed from.
            tokens, gates = self.pool.view_trailer(message)
            message.gates = gates.copy()
            window.sources[message.results] = message.rows.start + tokens
            window.gate_values[message.results] = gates

            # Let the local peers read it, and count what they will.
            head = message.results.start, message.num_descriptors, message.word
            window.post(self.buffer_index, self.exchange, message.descriptor, head, message.counts)
            rows = message.counts.sum(axis=1)[others]
            self.pool.count_rows(self.direction, self.routes.local_peers[others], rows)
            self.working.append(message)
        return bool(received)

    def send_home(self) -> bool:
        """Sum the results of the messages whose assignments are all done, by token, and send the sums home."""
        done, self.working = partition(self.working, self.is_computed)
        for message in done:
            self.pool.sum_by_token(message, by_gates=self.direction == Direction.DISPATCH)
            self.pool.count_rows(HOMEWARD[self.direction], message.sender, message.num_tokens)
            rows, tag = self.window.rows[message.rows], self.tag_of(MessageKind.RETURN, message.number)
            message.request = self.transport.send_rows(rows, message.sender, tag)
            self.leaving.append(message)
        return bool(done)

    def is_computed(self, message: InboundMessage) -> bool:
        """Return True if all local peers' experts have written their results of a message."""
        return self.window.is_done(self.buffer_index, self.exchange, message.descriptor, message.counts)

    def release(self) -> bool:
        """Free the rows of the messages that have left."""
        left, self.leaving = partition(self.leaving, InboundMessage.is_done)
        for message in left:
            num_rows = message.results.stop - message.rows.start
            self.pool.pools[self.buffer_index].free(message.rows.start, num_rows)
        return bool(left)


def is_received(header: tuple[int, np.ndarray, Request]) -> bool:
    """Return True if a header has come."""
    return header[2].done


def partition(things: Iterable[T], test: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    """Split a list -> those that pass the test, and the others, in order."""
    passed: tuple[list[T], list[T]] = [], []
    for thing in things:
        passed[not test(thing)].append(thing)
    return passed


class ReceivePool:
    """Where a rank receives messages: rows of the window that no micro-batch in flight takes from another."""

    def __init__(
        self,
        transport: Transport,
        window: Window,
        routes: Routes,
        pools: list[RowPool],
        sizes: HostSizes,
        count_rows: CountRows,
    ) -> None:
        """pools: one for each micro-batch in flight; count_rows counts what goes from here."""
        self.transport, self.window, self.routes, self.pools = transport, window, routes, pools
        self.count_rows, self.dtype, self.in_order = count_rows, sizes.dtype, sizes.in_order
        self.no_counts = np.zeros((len(routes.local_peers), routes.num_slots), np.int64)

    def header_words(self, number: int) -> int:
        """Count a header's words: how many messages, the sender's word; of each its tokens and assignments by slot."""
        return 2 + self.window.sizes.max_messages * (1 + len(self.routes.served[number]) * self.routes.num_slots)

    def view_trailer(self, message: InboundMessage) -> tuple[np.ndarray, np.ndarray]:
        """Return the token [C] int32 and gate [C] float32 of each assignment, as views of the window."""
        rows = self.window.rows[message.rows.start + message.num_tokens : message.rows.stop]
        return view_trailer(rows, message.num_assignments)

    def sum_by_token(self, message: InboundMessage, by_gates: bool) -> None:
        """Write the sums of the results over the tokens, times the gates or not, and what came back of these behind."""
        table, first, results = self.window.table(self.dtype), message.rows.start, message.results
        token_of_assignment, gates = self.view_trailer(message)

        # Order the results by token, and weigh them by the gates that came with the assignments.
        order = np.argsort(token_of_assignment, kind="stable")
        begins = np.searchsorted(token_of_assignment[order], np.arange(message.num_tokens))
        weights = message.gates[order] if by_gates else np.ones(message.num_assignments, np.float32)
        if by_gates and self.routes.same_order:  # products are rounded before they are added, as at home
            table[results.start + order] *= torch.from_numpy(weights).to(self.dtype)[:, None]
            weights = np.ones_like(weights)

        # Write each token's sum in its place, and what came back of the gates behind.
        table[first : first + message.num_tokens] = functional.embedding_bag(
            torch.from_numpy(results.start + order),
            table,
            torch.from_numpy(begins),
            mode="sum",
            per_sample_weights=torch.from_numpy(weights).to(self.dtype),
        )
        gates[:] = self.window.gate_values[results]


def view_trailer(rows: np.ndarray, num_assignments: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a token [C] int32 and a gate [C] float32 of each assignment, as views of uint8 rows."""
    words = rows.reshape(-1)[: TRAILER_BYTES * num_assignments].view(np.int32)
    return words[:num_assignments], words[num_assignments:].view(np.float32)
