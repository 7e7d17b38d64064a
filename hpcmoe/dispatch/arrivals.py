"""What has been announced to the experts of this rank, and how it is put together into batches.

A descriptor in a local peer's table says where rows for the experts of this rank lie, grouped by slot: the peer's own
tokens, or those of another node that it has received.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.comm.window import DESCRIPTOR_WORDS, Window
from hpcmoe.dispatch.notice import Notices
from hpcmoe.dispatch.plan import ranges
from hpcmoe.dispatch.routes import Routes

_MAX_CHUNK_FACTOR = 1.5  # x the rows that a chunk is to have, as rounding to whole chunks gives
Key = tuple[int, int]  # of a descriptor: the local peer that published it, and its number in that peer's table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of some descriptors on which the local experts work at once, grouped by slot and within it by descriptor."""

    descriptors: tuple[Key, ...]
    descriptor_of_row: np.ndarray  # [n] int64, which of these a row belongs to
    offset_of_row: np.ndarray  # [n] int64, its place in that descriptor's rows
    rows_of_slot: np.ndarray  # [s] int64

    @property
    def key(self) -> tuple[Key, ...]:
        """Return what tells a batch from the others of its exchange, at every run alike."""
        return self.descriptors

    def split(self, about_rows: int, apart: bool = False) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
        """Yield the chunks into which the rows are cut: a slice, and (slot, rows) of each slot in it.

        A slot with many rows has several chunks, as even as can be. Slots with few rows share one or, apart, have one
        each, so that none depends on another. None has more than _MAX_CHUNK_FACTOR x about_rows.
        """
        begin, end = 0, 0  # of the chunk that is not full yet
        shared: list[tuple[int, int]] = []
        for slot, rows in enumerate(self.rows_of_slot.tolist()):
            # Close the shared chunk where this slot's rows would be too many in it.
            if shared and (apart or end - begin + rows > _MAX_CHUNK_FACTOR * about_rows):
                yield slice(begin, end), shared
                begin, shared = end, []

            # Cut a slot with many rows into chunks of its own.
            edges = cut_evenly(end, rows, max(round(rows / about_rows), 1))
            if len(edges) > 2:
                yield from ((slice(*ends), [(slot, ends[1] - ends[0])]) for ends in itertools.pairwise(edges))
                begin = edges[-1]
            elif rows:
                shared.append((slot, rows))
            end = edges[-1]
        if shared:
            yield slice(begin, end), shared


def cut_evenly(begin: int, count: int, parts: int) -> list[int]:
    """Return the edges [parts + 1] that cut a range into parts as even as can be."""
    return [begin + count * part // parts for part in range(parts + 1)]


def make_batch(descriptors: Sequence[Key], starts: Sequence[int], counts: np.ndarray) -> Batch:
    """Return the rows of descriptors [n] as a batch: they begin at starts [n], counts [n, s] of them for each slot."""
    first = np.asarray(starts)[:, None] + np.cumsum(counts, axis=1) - counts  # [n, s]
    of_descriptor, by_slot = np.tile(np.arange(len(descriptors)), counts.shape[1]), counts.T.ravel()  # [s * n]
    return Batch(
        descriptors=tuple(descriptors),
        descriptor_of_row=np.repeat(of_descriptor, by_slot),
        offset_of_row=ranges(first.T.ravel(), by_slot),
        rows_of_slot=counts.sum(axis=0),
    )


class Descriptor(NamedTuple):
    """The part of a descriptor that concerns this rank."""

    first: int  # row of the window where its rows begin
    start: int  # of them, those for the local peers before this one
    counts: np.ndarray  # [s] int64, rows for each slot of this rank
    num_rows: int  # their sum
    num_descriptors: int  # that its peer has in this exchange, in the first of them


class Arrivals:
    """The descriptors of one exchange, read as they are published."""

    def __init__(self, window: Window, routes: Routes, buffer_index: int, exchange: int, notices: Notices) -> None:
        """exchange: the number of the exchange in these in-flight buffers, from 1; notices: none known yet."""
        self.window, self.routes, self.buffer_index, self.exchange = window, routes, buffer_index, exchange
        self.notices, self.seen, peers = notices, dict[Key, Descriptor](), np.arange(len(routes.publishers))
        self.expected = np.stack([*self.find_descriptors(peers), peers], axis=1)  # [n, 3], not seen; whose they are

    def find_descriptors(self, peer: int | np.ndarray, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return where peers' rows are announced: publishers and descriptors; number counts another node's messages."""
        inbound = self.routes.inbound_index[peer]
        return self.routes.publishers[peer], (inbound >= 0) * (1 + inbound * self.window.sizes.max_messages + number)

    def poll(self) -> list[Key]:
        """Read new descriptors, and return those with rows for this rank."""
        if len(self.expected) == 0:
            return []
        table = self.window.descriptors[:, self.buffer_index, self.exchange % 2]
        there = table[self.expected[:, 0], self.expected[:, 1], 0] == self.exchange
        if not there.any():
            return []
        self.window.sync()
        fresh, self.expected = self.expected[there], self.expected[~there]
        found = self.read(fresh, table[fresh[:, 0], fresh[:, 1]])
        if len(self.expected) == 0:
            self.window.mark_consumed(self.buffer_index, self.exchange)
        return found

    def read(self, fresh: np.ndarray, words: np.ndarray) -> list[Key]:
        """Read descriptors [n, 3] from their words [n, ...], and return those with rows for this rank.

        The first of several of one peer has their number: the others are expected from now on. A peer whose call
        differs from this rank's has no rows for it.
        """
        agreed = self.notices.add(fresh[:, 2], words[:, 3])
        if self.notices.differ:
            fresh, words = fresh[agreed], words[agreed]
        if len(fresh) == 0:
            return []

        # Read where this rank's rows begin among those of a descriptor, and how many there are for each slot.
        counts, index = (
            words[:, DESCRIPTOR_WORDS:].reshape(len(words), -1, self.routes.num_slots),
            self.routes.local_index,
        )
        own, starts = counts[:, index], counts[:, :index].sum(axis=(1, 2)).tolist()
        totals, (firsts, nums_descriptors) = own.sum(axis=1).tolist(), words[:, 1:3].T.tolist()
        found: list[Key] = [(publisher, descriptor) for publisher, descriptor, _ in fresh.tolist()]
        self.seen.update(zip(found, map(Descriptor, firsts, starts, own, totals, nums_descriptors), strict=True))

        # Expect the others of each peer.
        more = [
            (publisher, descriptor + number, peer)
            for (publisher, descriptor, peer), num_descriptors in zip(fresh.tolist(), nums_descriptors, strict=True)
            for number in range(1, num_descriptors)
        ]
        if more:
            self.expected = np.concatenate([self.expected, more])
        return [key for key, total in zip(found, totals, strict=True) if total]

    def read_in_order(self, peers: Sequence[int], at_once: int) -> Iterator[list[Key] | None]:
        """Yield the descriptors of these peers in order, in lists for a batch each, and None until the next are there.

        A list has at most at_once messages that one rank receives: no more need fit into its pool together. All local
        peers cut the same lists. Where each rank receives its own, and all meet rows in the same order, a local peer's
        rows count as a message too: then all ranks cut alike.
        """
        group, received, once = list[Key](), Counter[int | None](), None
        alike = self.routes.same_order and not self.routes.once.any()
        for peer in peers:
            # Begin anew between messages for one rank and for all: local peers do not all see the former.
            if once not in (None, self.routes.once[peer]):
                yield group
                group, received = [], Counter()
            once = self.routes.once[peer]

            # Add the peer's descriptors, and end the list before its messages could be too many for the pool.
            number, num_descriptors = 0, 1
            while number < num_descriptors:
                publisher, descriptor = self.find_descriptors(peer, number)
                key = int(publisher), int(descriptor)
                while key not in self.seen:
                    yield None
                seen = self.seen[key]
                num_descriptors = seen.num_descriptors if number == 0 else num_descriptors
                group += [key] if seen.num_rows else []
                number += 1
                if num_descriptors == 0 or (self.routes.inbound_index[peer] < 0 and not (alike and seen.num_rows)):
                    continue
                receiver = None if alike else key[0]
                received[receiver] += 1
                if received[receiver] == at_once:
                    yield group
                    group, received = [], Counter()
        yield group

    def count_rows(self, descriptors: Sequence[Key]) -> int:
        """Return how many rows these descriptors have for this rank."""
        return sum(self.seen[key].num_rows for key in descriptors)

    def build_batch(self, descriptors: Sequence[Key]) -> Batch:
        """Build a batch of what these descriptors have for this rank, at least one of them."""
        seen = [self.seen[key] for key in descriptors]
        return make_batch(descriptors, [own.start for own in seen], np.array([own.counts for own in seen]))

    def has(self, batch: Batch) -> bool:
        """Return True if all descriptors of a batch, of an earlier exchange of the same plans, have been read."""
        return all(key in self.seen for key in batch.descriptors)

    def find_rows(self, batch: Batch) -> np.ndarray:
        """Return the rows of the window [n] int64 where a batch's results go in this exchange."""
        firsts = np.array([self.seen[key].first for key in batch.descriptors])
        return firsts[batch.descriptor_of_row] + batch.offset_of_row

    def finish(self, batch: Batch) -> None:
        """Mark a batch's descriptors as done: their results are written."""
        for publisher, descriptor in batch.descriptors:
            self.window.mark_done(self.buffer_index, self.exchange, publisher, descriptor)
