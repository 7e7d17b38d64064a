"""What has been announced to the experts of this rank, and how it is put together into batches.

A slip on a mate's board says where rows for the experts of this rank lie, grouped by slot: the mate's own tokens, or
those of another node that it has landed.
"""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hpcmoe.comm.window import SLIP_WORDS
from hpcmoe.dispatch.plan import ranges


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of some slips on which the local experts work at once, grouped by slot and within it by slip."""

    slips: tuple  # (publisher, slip) of each
    slip_of_row: np.ndarray  # [n] int64, which of these a row belongs to
    offset_of_row: np.ndarray  # [n] int64, its place in that slip's rows
    rows_of_slot: np.ndarray  # [s] int64

    def portions(self, about_rows, apart=False):
        """Cut the rows into what is gathered, worked on and laid down at once -> (slice, ((slot, rows), ...)) of each.

        A slot with many rows has several portions, as even as can be; where all are few, there is one for all slots,
        or, so that none depends on another, one for each.
        """
        if len(self.slip_of_row) <= about_rows and not apart:
            slots = [(slot, rows) for slot, rows in enumerate(self.rows_of_slot.tolist()) if rows]
            yield slice(0, len(self.slip_of_row)), slots
            return
        begin = 0
        for slot, rows in enumerate(self.rows_of_slot.tolist()):
            num_portions = max(round(rows / about_rows), rows > 0)
            edges = [begin + rows * portion // max(num_portions, 1) for portion in range(num_portions + 1)]
            yield from ((slice(*ends), [(slot, ends[1] - ends[0])]) for ends in itertools.pairwise(edges))
            begin += rows


def make_batch(slips, starts, counts):
    """Put together the rows of slips [n]: at starts [n], counts [n, s] of them for each slot of this rank -> Batch."""
    first = np.asarray(starts)[:, None] + np.cumsum(counts, axis=1) - counts  # [n, s]
    of_slip = np.broadcast_to(np.arange(len(slips))[:, None], counts.shape)
    return Batch(
        slips=tuple(slips),
        slip_of_row=np.repeat(of_slip.T.ravel(), counts.T.ravel()),
        offset_of_row=ranges(first.T.ravel(), counts.T.ravel()),
        rows_of_slot=counts.sum(axis=0),
    )


class Arrivals:
    """The slips of one exchange, as this rank sees them come."""

    def __init__(self, window, routes, berth, exchange):
        self.window, self.routes, self.berth, self.exchange = window, routes, berth, exchange
        self.seen = {}  # (publisher, slip): (first row, start and counts [s] of this rank's share, slips of that peer)
        firsts = [self.slip_of(peer) for peer in range(len(routes.publishers))]
        self.expected = np.array(firsts)  # [n, 2] publisher and slip, of those that have not been seen

    def slip_of(self, peer, number=0):
        """Find where a peer's rows are announced -> (publisher, slip); number counts the parcels of another node's."""
        guest, publisher = int(self.routes.guests[peer]), int(self.routes.publishers[peer])
        return publisher, 0 if guest < 0 else 1 + guest * self.window.sizes.max_parcels + number

    def look(self):
        """See what is new -> the slips with rows for this rank that were not there before."""
        if len(self.expected) == 0:
            return []
        slips = self.window.slips[:, self.berth, self.exchange % 2]
        there = slips[self.expected[:, 0], self.expected[:, 1], 0] == self.exchange
        if not there.any():
            return []
        self.window.sync()
        fresh, self.expected = list(map(tuple, self.expected[there].tolist())), self.expected[~there]
        for publisher, slip in fresh:
            self.read(publisher, slip, slips[publisher, slip])
        if len(self.expected) == 0:
            self.window.mark_taken(self.berth, self.exchange)
        return [slip for slip in fresh if self.seen[slip][2].any()]

    def read(self, publisher, slip, words):
        """Take in one slip; the first of several tells how many follow."""
        first, num_slips, counts = int(words[1]), int(words[2]), words[SLIP_WORDS:].reshape(-1, self.routes.num_slots)
        mate = self.routes.mate
        self.seen[publisher, slip] = (first, int(counts[:mate].sum()), counts[mate].copy(), num_slips)
        if num_slips > 1:
            more = [(publisher, slip + number) for number in range(1, num_slips)]
            self.expected = np.concatenate([self.expected, more])

    def runs(self, peers, at_once):
        """Yield the slips of these peers in order, in lists for a batch each, and None until the next are all there.

        At most at_once parcels that one rank lands are in a list, since no more need have room there together; and all
        mates cut the same lists. Where each rank lands its own, and all meet rows in the same order, a mate's rows
        count as a parcel too: then all ranks cut alike.
        """
        run, landed, once = [], Counter(), None
        alike = self.routes.same_order and not self.routes.once.any()
        for peer in peers:
            if once not in (None, self.routes.once[peer]):  # mates do not all see the parcels that serve one of them
                yield run
                run, landed = [], Counter()
            once = self.routes.once[peer]
            number, num_slips = 0, 1
            while number < num_slips:
                slip = self.slip_of(peer, number)
                while slip not in self.seen:
                    yield None
                counts, follow = self.seen[slip][2:]
                num_slips = follow if number == 0 else num_slips
                run += [slip] if counts.any() else []
                number += 1
                if num_slips == 0 or (self.routes.guests[peer] < 0 and not (alike and counts.any())):
                    continue
                lands = None if alike else slip[0]
                landed[lands] += 1
                if at_once and landed[lands] == at_once:  # there may be no room for the next before these are done
                    yield run
                    run, landed = [], Counter()
        yield run

    def count_rows(self, slips):
        """Count the rows that these slips have for this rank."""
        return sum(int(self.seen[slip][2].sum()) for slip in slips)

    def batch_of(self, slips):
        """Put together what these slips have for this rank, at least one of them -> Batch."""
        _, starts, counts, _ = zip(*(self.seen[slip] for slip in slips), strict=True)
        return make_batch(slips, starts, np.stack(counts))

    def has(self, batch):
        """Whether all slips of a batch, made in an earlier exchange of the same plans, have been seen."""
        return all(slip in self.seen for slip in batch.slips)

    def rows(self, batch):
        """Find where a batch's results go, now -> rows of the window [n] int64."""
        firsts = np.array([self.seen[slip][0] for slip in batch.slips])
        return firsts[batch.slip_of_row] + batch.offset_of_row

    def finish(self, batch):
        """Tell the homes that a batch's results are laid down."""
        for publisher, slip in batch.slips:
            self.window.mark_done(self.berth, self.exchange, publisher, slip)
