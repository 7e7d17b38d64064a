"""Parcels from other nodes, landed by this rank for itself or for all its mates, and their sums sent home.

header -> room in the pool -> rows land -> slip on the board -> mates' experts -> sums -> home -> room free again
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
class Guest:
    """One parcel on its way through this rank."""

    sender: int
    number: int  # of the sender's parcels
    slip: int
    num_slips: int  # that its sender has in this exchange
    num_tokens: int  # U
    counts: np.ndarray  # [mates, s] copies for each slot
    first: int = -1  # its first row in the window: tokens, their copies' gate values, results of the copies
    request: Any = None  # of what is under way
    gate_values: np.ndarray | None = None  # [C] float32 that came with the copies

    @property
    def num_copies(self):
        """C."""
        return int(self.counts.sum())


class Landing:
    """All that this rank lands in one exchange."""

    def __init__(self, hall, berth, exchange, direction, tag_of):
        """hall: the Hall of all landings; direction: outward; tag_of(part, parcel)."""
        self.hall, self.berth, self.exchange, self.direction, self.tag_of = hall, berth, exchange, direction, tag_of
        self.headers = [self.expect(number, sender) for number, sender in enumerate(hall.routes.senders)]
        self.waiting, self.landing, self.working, self.leaving = [], [], [], []  # guests by what they wait for

    def expect(self, number, sender):
        """Begin to receive the header of a sender -> (its number, words, request)."""
        words = np.zeros(self.hall.header_words(number), np.int64)
        return number, words, self.hall.transport.recv_words(words, sender, self.tag_of(MessageKind.HEADER))

    @property
    def is_over(self):
        """Whether all guests have come and gone."""
        return not (self.headers or self.waiting or self.landing or self.working or self.leaving)

    def poke(self):
        """Take each guest as far as it can go, without waiting -> whether any moved."""
        if not self.hall.window.may_post(self.berth, self.exchange):
            return False
        moved = [self.read_headers(), self.admit(), self.announce(), self.send_home(), self.see_off()]
        return any(moved)

    def read_headers(self):
        """Queue the guests whose headers have come; in the senders' order where the order of work is fixed."""
        if self.hall.in_order:
            num_ready = len(list(itertools.takewhile(has_come, self.headers)))
            ready, self.headers = self.headers[:num_ready], self.headers[num_ready:]
        else:
            ready, self.headers = part(self.headers, has_come)
        for number, words, _ in ready:
            self.waiting += self.read_guests(number, words)
        return bool(ready)

    def read_guests(self, number, words):
        """Make a header's guests; a sender without any is announced as such."""
        hall, num_slips = self.hall, int(words[0])
        first_slip = 1 + number * hall.window.sizes.max_parcels
        if num_slips == 0:
            hall.window.post(self.berth, self.exchange, first_slip, 0, 0, hall.no_counts)
        guests = []
        for place, parcel in enumerate(words[1:].reshape(hall.window.sizes.max_parcels, -1)[:num_slips]):
            counts = hall.no_counts.copy()
            counts[hall.routes.served[number]] = parcel[1:].reshape(-1, hall.routes.num_slots)
            guests.append(
                Guest(
                    sender=hall.routes.senders[number],
                    number=place,
                    slip=first_slip + place,
                    num_slips=num_slips if place == 0 else 1,
                    num_tokens=int(parcel[0]),
                    counts=counts,
                )
            )
        return guests

    def admit(self):
        """Begin to receive the guests for whom there is room, in order."""
        pool, window, moved = self.hall.pools[self.berth], self.hall.window, False
        while self.waiting:
            guest = self.waiting[0]
            message_rows = self.hall.message_rows(guest)
            first = pool.take(message_rows + guest.num_copies)
            if first is None:
                break
            guest.first, moved = first, True
            rows = window.rows[first : first + message_rows]
            guest.request = self.hall.transport.recv_rows(
                rows, guest.sender, self.tag_of(MessageKind.PARCEL, guest.number)
            )
            self.landing.append(self.waiting.pop(0))
        return moved

    def announce(self):
        """Tell the mates of the guests that have landed: each result row's token and number, and the slip."""
        window = self.hall.window
        landed, self.landing = part(self.landing, is_done)
        for guest in landed:
            tokens, gate_values = self.hall.trailer(guest)
            guest.gate_values = gate_values.copy()
            results = self.hall.results(guest)
            window.sources[results] = guest.first + tokens
            window.gate_values[results] = gate_values
            window.post(self.berth, self.exchange, guest.slip, results.start, guest.num_slips, guest.counts)
            others = self.hall.routes.mates != self.hall.routes.rank
            self.hall.tally(self.direction, self.hall.routes.mates[others], guest.counts.sum(axis=1)[others])
            self.working.append(guest)
        return bool(landed)

    def send_home(self):
        """Sum the results of the guests whose copies are all done, by token, and send the sums home."""
        window = self.hall.window
        done, self.working = part(
            self.working, lambda guest: window.is_done(self.berth, self.exchange, guest.slip, guest.counts)
        )
        for guest in done:
            self.hall.sum_up(guest, weigh=self.direction == Direction.DISPATCH)
            self.hall.tally(HOMEWARD[self.direction], guest.sender, guest.num_tokens)
            rows = window.rows[guest.first : guest.first + self.hall.message_rows(guest)]
            guest.request = self.hall.transport.send_rows(
                rows, guest.sender, self.tag_of(MessageKind.RETURN, guest.number)
            )
            self.leaving.append(guest)
        return bool(done)

    def see_off(self):
        """Free the rows of the guests that have left."""
        left, self.leaving = part(self.leaving, is_done)
        for guest in left:
            self.hall.pools[self.berth].give_back(guest.first, self.hall.message_rows(guest) + guest.num_copies)
        return bool(left)


def has_come(header):
    """Whether a header (number, words, request) has come."""
    return header[2].done


def is_done(guest):
    """Whether a guest's message, in or out, is done."""
    return guest.request.done


def part(things, test):
    """Split a list -> (those that pass the test, the others), in order."""
    passed = [test(thing) for thing in things]
    return [t for t, yes in zip(things, passed, strict=True) if yes], [
        t for t, yes in zip(things, passed, strict=True) if not yes
    ]


class Hall:
    """Where a rank lands parcels: rows of the window that no micro-batch in flight takes from another."""

    def __init__(self, transport, window, routes, pools, sizes, tally):
        """pools: a RowPool for each micro-batch in flight; tally(direction, ranks, rows) counts what goes from here."""
        self.transport, self.window, self.routes, self.pools, self.tally = transport, window, routes, pools, tally
        self.dtype, self.in_order = sizes.dtype, sizes.in_order
        self.no_counts = np.zeros((len(routes.mates), routes.num_slots), np.int64)

    def header_words(self, number):
        """Words of a header: how many parcels; of each its tokens, and copies for each slot that the sender serves."""
        return 1 + self.window.sizes.max_parcels * (1 + len(self.routes.served[number]) * self.routes.num_slots)

    def message_rows(self, guest):
        """Rows of a guest's message: tokens, and behind them its copies' gate values."""
        return guest.num_tokens + num_trailing_rows(guest.num_copies, self.window.sizes.row_bytes)

    def results(self, guest):
        """Rows of the window that are for the results of a guest's copies -> slice."""
        first = guest.first + self.message_rows(guest)
        return slice(first, first + guest.num_copies)

    def trailer(self, guest):
        """See what travels behind a guest's tokens -> (token of each copy [C] int32, number of each [C] float32)."""
        return see_trailer(
            self.window.rows[guest.first + guest.num_tokens : self.results(guest).start], guest.num_copies
        )

    def sum_up(self, guest, weigh):
        """Put the sums of the copies' results in the tokens' place, and the copies' gate values behind them."""
        table, results = self.window.table(self.dtype), self.results(guest)
        token_of_copy, gate_values = self.trailer(guest)
        order = np.argsort(token_of_copy, kind="stable")
        begins = np.searchsorted(token_of_copy[order], np.arange(guest.num_tokens))
        weights = guest.gate_values[order] if weigh else np.ones(guest.num_copies, np.float32)
        if weigh and self.routes.same_order:  # rounded before they are added, as at home
            table[results.start + order] *= torch.from_numpy(weights).to(self.dtype)[:, None]
            weights = np.ones_like(weights)
        table[guest.first : guest.first + guest.num_tokens] = functional.embedding_bag(
            torch.from_numpy(results.start + order),
            table,
            torch.from_numpy(begins),
            mode="sum",
            per_sample_weights=torch.from_numpy(weights).to(self.dtype),
        )
        gate_values[:] = self.window.gate_values[results]


def see_trailer(rows, num_copies):
    """See uint8 rows as a token and a number for each copy -> (int32 [C], float32 [C]), which can be written."""
    words = rows.reshape(-1)[: 8 * num_copies].view(np.int32)
    return words[:num_copies], words[num_copies:].view(np.float32)
