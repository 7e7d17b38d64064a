"""Messages from other nodes, landed by this rank for itself or for all its local peers, and their sums sent home.

header -> room in the pool -> rows land -> descriptor on the descriptor table -> local peers' experts -> sums -> home -> room free again
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hpcmoe.comm.transport import HOMEWARD, Direction, MessageKind
from hpcmoe.dispatch.plan import num_trailing_rows


@dataclass(slots=True, kw_only=True, eq=False)
class InboundMessage:
    """One message on its way through this rank."""

    sender: int
    number: int  # of the sender's messages
    descriptor: int
    num_descriptors: int  # that its sender has in this exchange
    num_tokens: int  # U
    counts: np.ndarray  # [local_peers, s] assignments for each slot
    first: int = -1  # its first row in the window: tokens, their assignments' gate values, results of the assignments
    request: Any = None  # of what is under way
    gate_values: np.ndarray | None = None  # [C] float32 that came with the assignments

    @property
    def num_assignments(self):
        """C."""
        return int(self.counts.sum())


class Receiver:
    """All that this rank lands in one exchange."""

    def __init__(self, receive_pool, buffer_index, exchange, direction, tag_of):
        """receive_pool: the ReceivePool of all receivers; direction: outward; tag_of(part, message)."""
        self.receive_pool, self.buffer_index, self.exchange, self.direction, self.tag_of = (
            receive_pool,
            buffer_index,
            exchange,
            direction,
            tag_of,
        )
        self.headers = [self.expect(number, sender) for number, sender in enumerate(receive_pool.routes.senders)]
        self.waiting, self.receiving, self.working, self.leaving = [], [], [], []  # messages by what they wait for

    def expect(self, number, sender):
        """Begin to receive the header of a sender -> (its number, words, request)."""
        words = np.zeros(self.receive_pool.header_words(number), np.int64)
        return number, words, self.receive_pool.transport.recv_words(words, sender, self.tag_of(MessageKind.HEADER))

    @property
    def done(self):
        """Whether all messages have come and gone."""
        return not (self.headers or self.waiting or self.receiving or self.working or self.leaving)

    def poke(self):
        """Take each message as far as it can go, without waiting -> whether any moved."""
        if not self.receive_pool.window.may_post(self.buffer_index, self.exchange):
            return False
        moved = [self.read_headers(), self.admit(), self.announce(), self.send_home(), self.release()]
        return any(moved)

    def read_headers(self):
        """Queue the messages whose headers have come; in the senders' order where the order of work is fixed."""
        if self.receive_pool.in_order:
            num_ready = len(list(itertools.takewhile(is_received, self.headers)))
            ready, self.headers = self.headers[:num_ready], self.headers[num_ready:]
        else:
            ready, self.headers = part(self.headers, is_received)
        for number, words, _ in ready:
            self.waiting += self.make_inbound(number, words)
        return bool(ready)

    def make_inbound(self, number, words):
        """Make a header's messages; a sender without any is announced as such."""
        receive_pool, num_descriptors = self.receive_pool, int(words[0])
        first_descriptor = 1 + number * receive_pool.window.sizes.max_messages
        if num_descriptors == 0:
            receive_pool.window.post(self.buffer_index, self.exchange, first_descriptor, 0, 0, receive_pool.no_counts)
        messages = []
        for place, message in enumerate(
            words[1:].reshape(receive_pool.window.sizes.max_messages, -1)[:num_descriptors]
        ):
            counts = receive_pool.no_counts.copy()
            counts[receive_pool.routes.served[number]] = message[1:].reshape(-1, receive_pool.routes.num_slots)
            messages.append(
                InboundMessage(
                    sender=receive_pool.routes.senders[number],
                    number=place,
                    descriptor=first_descriptor + place,
                    num_descriptors=num_descriptors if place == 0 else 1,
                    num_tokens=int(message[0]),
                    counts=counts,
                )
            )
        return messages

    def admit(self):
        """Begin to receive the messages for whom there is room, in order."""
        pool, window, moved = self.receive_pool.pools[self.buffer_index], self.receive_pool.window, False
        while self.waiting:
            message = self.waiting[0]
            message_rows = self.receive_pool.message_rows(message)
            first = pool.allocate(message_rows + message.num_assignments)
            if first is None:
                break
            message.first, moved = first, True
            rows = window.rows[first : first + message_rows]
            message.request = self.receive_pool.transport.recv_rows(
                rows, message.sender, self.tag_of(MessageKind.ROWS, message.number)
            )
            self.receiving.append(self.waiting.pop(0))
        return moved

    def announce(self):
        """Tell the local peers of the messages that have landed: each result row's token and number, and the descriptor."""
        window = self.receive_pool.window
        landed, self.receiving = part(self.receiving, is_done)
        for message in landed:
            tokens, gate_values = self.receive_pool.trailer(message)
            message.gate_values = gate_values.copy()
            results = self.receive_pool.results(message)
            window.sources[results] = message.first + tokens
            window.gate_values[results] = gate_values
            window.post(
                self.buffer_index,
                self.exchange,
                message.descriptor,
                results.start,
                message.num_descriptors,
                message.counts,
            )
            others = self.receive_pool.routes.local_peers != self.receive_pool.routes.rank
            self.receive_pool.tally(
                self.direction, self.receive_pool.routes.local_peers[others], message.counts.sum(axis=1)[others]
            )
            self.working.append(message)
        return bool(landed)

    def send_home(self):
        """Sum the results of the messages whose assignments are all done, by token, and send the sums home."""
        window = self.receive_pool.window
        done, self.working = part(
            self.working,
            lambda message: window.is_done(self.buffer_index, self.exchange, message.descriptor, message.counts),
        )
        for message in done:
            self.receive_pool.sum_up(message, weigh=self.direction == Direction.DISPATCH)
            self.receive_pool.tally(HOMEWARD[self.direction], message.sender, message.num_tokens)
            rows = window.rows[message.first : message.first + self.receive_pool.message_rows(message)]
            message.request = self.receive_pool.transport.send_rows(
                rows, message.sender, self.tag_of(MessageKind.RETURN, message.number)
            )
            self.leaving.append(message)
        return bool(done)

    def release(self):
        """Free the rows of the messages that have left."""
        left, self.leaving = part(self.leaving, is_done)
        for message in left:
            self.receive_pool.pools[self.buffer_index].free(
                message.first, self.receive_pool.message_rows(message) + message.num_assignments
            )
        return bool(left)


def is_received(header):
    """Whether a header (number, words, request) has come."""
    return header[2].done


def is_done(message):
    """Whether a message's message, in or out, is done."""
    return message.request.done


def part(things, test):
    """Split a list -> (those that pass the test, the others), in order."""
    passed = [test(thing) for thing in things]
    return [t for t, yes in zip(things, passed, strict=True) if yes], [
        t for t, yes in zip(things, passed, strict=True) if not yes
    ]


class ReceivePool:
    """Where a rank lands messages: rows of the window that no micro-batch in flight takes from another."""

    def __init__(self, transport, window, routes, pools, sizes, tally):
        """pools: a RowPool for each micro-batch in flight; tally(direction, ranks, rows) counts what goes from here."""
        self.transport, self.window, self.routes, self.pools, self.tally = transport, window, routes, pools, tally
        self.dtype, self.in_order = sizes.dtype, sizes.in_order
        self.no_counts = np.zeros((len(routes.local_peers), routes.num_slots), np.int64)

    def header_words(self, number):
        """Words of a header: how many messages; of each its tokens, and assignments for each slot that the sender serves."""
        return 1 + self.window.sizes.max_messages * (1 + len(self.routes.served[number]) * self.routes.num_slots)

    def message_rows(self, message):
        """Rows of a message's message: tokens, and behind them its assignments' gate values."""
        return message.num_tokens + num_trailing_rows(message.num_assignments, self.window.sizes.row_bytes)

    def results(self, message):
        """Rows of the window that are for the results of a message's assignments -> slice."""
        first = message.first + self.message_rows(message)
        return slice(first, first + message.num_assignments)

    def trailer(self, message):
        """See what travels behind a message's tokens -> (token of each assignment [C] int32, number of each [C] float32)."""
        return see_trailer(
            self.window.rows[message.first + message.num_tokens : self.results(message).start], message.num_assignments
        )

    def sum_up(self, message, weigh):
        """Put the sums of the assignments' results in the tokens' place, and the assignments' gate values behind them."""
        table, results = self.window.table(self.dtype), self.results(message)
        token_of_assignment, gate_values = self.trailer(message)
        order = np.argsort(token_of_assignment, kind="stable")
        begins = np.searchsorted(token_of_assignment[order], np.arange(message.num_tokens))
        weights = message.gate_values[order] if weigh else np.ones(message.num_assignments, np.float32)
        if weigh and self.routes.same_order:  # rounded before they are added, as at home
            table[results.start + order] *= torch.from_numpy(weights).to(self.dtype)[:, None]
            weights = np.ones_like(weights)
        table[message.first : message.first + message.num_tokens] = functional.embedding_bag(
            torch.from_numpy(results.start + order),
            table,
            torch.from_numpy(begins),
            mode="sum",
            per_sample_weights=torch.from_numpy(weights).to(self.dtype),
        )
        gate_values[:] = self.window.gate_values[results]


def see_trailer(rows, num_assignments):
    """See uint8 rows as a token and a number for each assignment -> (int32 [C], float32 [C]), which can be written."""
    words = rows.reshape(-1)[: 8 * num_assignments].view(np.int32)
    return words[:num_assignments], words[num_assignments:].view(np.float32)
