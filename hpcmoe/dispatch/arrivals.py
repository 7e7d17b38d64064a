"""What has been announced to the experts of this rank, and how it is put together into batches.

A slip on a mate's board says where rows for the experts of this rank lie, grouped by slot: the mate's own tokens, or
those of another node that it has landed.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.comm.window import SLIP_WORDS
from hpcmoe.dispatch.plan import ranges

MOST_OF_PORTION = 1.5  # x the rows it is to have, as rounding to whole portions gives


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of some slips on which the local experts work at once, grouped by slot and within it by slip."""

    slips: tuple  # (publisher, slip) of each
    slip_of_row: np.ndarray  # [n] int64, which of these a row belongs to
    offset_of_row: np.ndarray  # [n] int64, its place in that slip's rows
    rows_of_slot: np.ndarray  # [s] int64

    def portions(self, about_rows):
        """Cut the rows into what is gathered, worked on and laid down at once -> (slice, ((slot, rows), ...)) of each.

        A slot with many rows has several portions, as even as can be; slots with few rows share one. None has more than
        MOST_OF_PORTION x about_rows.
        """
        begin, end, shared = 0, 0, []  # of the portion that is not full yet
        for slot, rows in enumerate(self.rows_of_slot.tolist()):
            if shared and end - begin + rows > MOST_OF_PORTION * about_rows:
                yield slice(begin, end), shared
                begin, shared = end, []
            edges = cut_evenly(end, rows, max(round(rows / about_rows), 1))
            if len(edges) > 2:
                yield from ((slice(*ends), [(slot, ends[1] - ends[0])]) for ends in itertools.pairwise(edges))
                begin = edges[-1]
            elif rows:
                shared.append((slot, rows))
            end = edges[-1]
        if shared:
            yield slice(begin, end), shared


def cut_evenly(begin, count, parts):
    """Cut a range into parts as even as can be -> their edges, one more than parts."""
    return [begin + count * part // parts for part in range(parts + 1)]


def make_batch(slips, starts, counts):
    """Put together the rows of slips [n]: at starts [n], counts [n, s] of them for each slot of this rank -> Batch."""
    first = np.asarray(starts)[:, None] + np.cumsum(counts, axis=1) - counts  # [n, s]
    of_slip, by_slot = np.tile(np.arange(len(slips)), counts.shape[1]), counts.T.ravel()  # [s * n]
    return Batch(
        slips=tuple(slips),
        slip_of_row=np.repeat(of_slip, by_slot),
        offset_of_row=ranges(first.T.ravel(), by_slot),
        rows_of_slot=counts.sum(axis=0),
    )


class Seen(NamedTuple):
    """What a slip says to this rank."""

    first: int  # row of the window where its rows begin
    start: int  # of them, those for the mates before this one
    counts: np.ndarray  # [s] int64, rows for each slot of this rank
    num_rows: int  # their sum
    num_slips: int  # that its peer has in this exchange, told by the first of them


class Arrivals:
    """The slips of one exchange, as this rank sees them come."""

    def __init__(self, window, routes, berth, exchange):
        self.window, self.routes, self.berth, self.exchange = window, routes, berth, exchange
        self.seen = {}  # (publisher, slip): Seen
        self.expected = np.stack(self.slip_of(np.arange(len(routes.publishers))), axis=1)  # [n, 2], not yet seen

    def slip_of(self, peer, number=0):
        """Find where peers' rows are announced -> (publishers, slips); number counts the parcels of another node's."""
        guests = self.routes.guests[peer]
        return self.routes.publishers[peer], (guests >= 0) * (1 + guests * self.window.sizes.max_parcels + number)

    def look(self):
        """See what is new -> the slips with rows for this rank that were not there before."""
        if len(self.expected) == 0:
            return []
        slips = self.window.slips[:, self.berth, self.exchange % 2]
        there = slips[self.expected[:, 0], self.expected[:, 1], 0] == self.exchange
        if not there.any():
            return []
        self.window.sync()
        fresh, self.expected = self.expected[there], self.expected[~there]
        found = self.read(fresh, slips[fresh[:, 0], fresh[:, 1]])
        if len(self.expected) == 0:
            self.window.mark_taken(self.berth, self.exchange)
        return found

    def read(self, fresh, words):
        """Take in slips [n, 2], by their words [n, ...] -> those with rows for this rank.

        The first of several of one peer tells how many follow, which are expected from now on.
        """
        counts, mate = words[:, SLIP_WORDS:].reshape(len(words), -1, self.routes.num_slots), self.routes.mate
        own, starts = counts[:, mate], counts[:, :mate].sum(axis=(1, 2)).tolist()
        totals, (firsts, nums_slips) = own.sum(axis=1).tolist(), words[:, 1:SLIP_WORDS].T.tolist()
        found = list(map(tuple, fresh.tolist()))
        self.seen.update(zip(found, map(Seen, firsts, starts, own, totals, nums_slips), strict=True))
        more = [
            (publisher, slip + number)
            for (publisher, slip), num_slips in zip(found, nums_slips, strict=True)
            for number in range(1, num_slips)
        ]
        if more:
            self.expected = np.concatenate([self.expected, more])
        return [slip for slip, total in zip(found, totals, strict=True) if total]

    def runs(self, peers, at_once):
        """Yield the slips of these peers in order, in lists for a batch each, and None until the next are all there.

        At most at_once parcels that one rank lands are in a list, since no more need have room there together; and all
        mates cut the same lists.
        """
        run, landed, once = [], Counter(), None
        for peer in peers:
            if once not in (None, self.routes.once[peer]):  # mates do not all see the parcels that serve one of them
                yield run
                run, landed = [], Counter()
            once = self.routes.once[peer]
            number, num_slips = 0, 1
            while number < num_slips:
                slip = tuple(map(int, self.slip_of(peer, number)))
                while slip not in self.seen:
                    yield None
                seen = self.seen[slip]
                num_slips = seen.num_slips if number == 0 else num_slips
                run += [slip] if seen.num_rows else []
                number += 1
                if self.routes.guests[peer] < 0 or num_slips == 0:
                    continue
                landed[slip[0]] += 1
                if landed[slip[0]] == at_once:  # there may be no room for the next before these are done
                    yield run
                    run, landed = [], Counter()
        yield run

    def count_rows(self, slips):
        """Count the rows that these slips have for this rank."""
        return sum(self.seen[slip].num_rows for slip in slips)

    def batch_of(self, slips):
        """Put together what these slips have for this rank, at least one of them -> Batch."""
        seen = [self.seen[slip] for slip in slips]
        return make_batch(slips, [slip.start for slip in seen], np.array([slip.counts for slip in seen]))

    def has(self, batch):
        """Whether all slips of a batch, made in an earlier exchange of the same plans, have been seen."""
        return all(slip in self.seen for slip in batch.slips)

    def rows(self, batch):
        """Find where a batch's results go, now -> rows of the window [n] int64."""
        firsts = np.array([self.seen[slip].first for slip in batch.slips])
        return firsts[batch.slip_of_row] + batch.offset_of_row

    def finish(self, batch):
        """Tell the homes that a batch's results are laid down."""
        for publisher, slip in batch.slips:
            self.window.mark_done(self.berth, self.exchange, publisher, slip)
