"""What has been announced to the experts of this rank, and how it is put together into batches.

A descriptor on a local peer's descriptor table says where rows for the experts of this rank lie, grouped by slot: the local peer's own tokens, or
those of another node that it has landed.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.comm.window import DESCRIPTOR_WORDS
from hpcmoe.dispatch.plan import ranges

MAX_CHUNK_FACTOR = 1.5  # x the rows it is to have, as rounding to whole chunks gives


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows of some descriptors on which the local experts work at once, grouped by slot and within it by descriptor."""

    descriptors: tuple  # (publisher, descriptor) of each
    descriptor_of_row: np.ndarray  # [n] int64, which of these a row belongs to
    offset_of_row: np.ndarray  # [n] int64, its place in that descriptor's rows
    rows_of_slot: np.ndarray  # [s] int64

    def split_chunks(self, about_rows, apart=False):
        """Cut the rows into what is gathered, worked on and laid down at once -> (slice, ((slot, rows), ...)) of each.

        A slot with many rows has several chunks, as even as can be; slots with few rows share one, or, so that none
        depends on another, have one each. None has more than MAX_CHUNK_FACTOR x about_rows.
        """
        begin, end, shared = 0, 0, []  # of the chunk that is not full yet
        for slot, rows in enumerate(self.rows_of_slot.tolist()):
            if shared and (apart or end - begin + rows > MAX_CHUNK_FACTOR * about_rows):
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


def make_batch(descriptors, starts, counts):
    """Put together the rows of descriptors [n]: at starts [n], counts [n, s] of them for each slot of this rank -> Batch."""
    first = np.asarray(starts)[:, None] + np.cumsum(counts, axis=1) - counts  # [n, s]
    of_descriptor, by_slot = np.tile(np.arange(len(descriptors)), counts.shape[1]), counts.T.ravel()  # [s * n]
    return Batch(
        descriptors=tuple(descriptors),
        descriptor_of_row=np.repeat(of_descriptor, by_slot),
        offset_of_row=ranges(first.T.ravel(), by_slot),
        rows_of_slot=counts.sum(axis=0),
    )


class Descriptor(NamedTuple):
    """What a descriptor says to this rank."""

    first: int  # row of the window where its rows begin
    start: int  # of them, those for the local peers before this one
    counts: np.ndarray  # [s] int64, rows for each slot of this rank
    num_rows: int  # their sum
    num_descriptors: int  # that its peer has in this exchange, told by the first of them


class Arrivals:
    """The descriptors of one exchange, as this rank sees them come."""

    def __init__(self, window, routes, buffer_index, exchange):
        self.window, self.routes, self.buffer_index, self.exchange = window, routes, buffer_index, exchange
        self.seen = {}  # (publisher, descriptor): Descriptor
        self.expected = np.stack(
            self.find_descriptors(np.arange(len(routes.publishers))), axis=1
        )  # [n, 2], not yet seen

    def find_descriptors(self, peer, number=0):
        """Find where peers' rows are announced -> (publishers, descriptors); number counts the messages of another node's."""
        inbound = self.routes.inbound_index[peer]
        return self.routes.publishers[peer], (inbound >= 0) * (1 + inbound * self.window.sizes.max_messages + number)

    def poll(self):
        """See what is new -> the descriptors with rows for this rank that were not there before."""
        if len(self.expected) == 0:
            return []
        descriptors = self.window.descriptors[:, self.buffer_index, self.exchange % 2]
        there = descriptors[self.expected[:, 0], self.expected[:, 1], 0] == self.exchange
        if not there.any():
            return []
        self.window.sync()
        fresh, self.expected = self.expected[there], self.expected[~there]
        found = self.read(fresh, descriptors[fresh[:, 0], fresh[:, 1]])
        if len(self.expected) == 0:
            self.window.mark_consumed(self.buffer_index, self.exchange)
        return found

    def read(self, fresh, words):
        """Take in descriptors [n, 2], by their words [n, ...] -> those with rows for this rank.

        The first of several of one peer tells how many follow, which are expected from now on.
        """
        counts, local_index = (
            words[:, DESCRIPTOR_WORDS:].reshape(len(words), -1, self.routes.num_slots),
            self.routes.local_index,
        )
        own, starts = counts[:, local_index], counts[:, :local_index].sum(axis=(1, 2)).tolist()
        totals, (firsts, nums_descriptors) = own.sum(axis=1).tolist(), words[:, 1:DESCRIPTOR_WORDS].T.tolist()
        found = list(map(tuple, fresh.tolist()))
        self.seen.update(zip(found, map(Descriptor, firsts, starts, own, totals, nums_descriptors), strict=True))
        more = [
            (publisher, descriptor + number)
            for (publisher, descriptor), num_descriptors in zip(found, nums_descriptors, strict=True)
            for number in range(1, num_descriptors)
        ]
        if more:
            self.expected = np.concatenate([self.expected, more])
        return [descriptor for descriptor, total in zip(found, totals, strict=True) if total]

    def runs(self, peers, at_once):
        """Yield the descriptors of these peers in order, in lists for a batch each, and None until the next are all there.

        At most at_once messages that one rank lands are in a list, since no more need have room there together; and all
        local peers cut the same lists. Where each rank lands its own, and all meet rows in the same order, a local peer's rows
        count as a message too: then all ranks cut alike.
        """
        run, landed, once = [], Counter(), None
        alike = self.routes.same_order and not self.routes.once.any()
        for peer in peers:
            if once not in (
                None,
                self.routes.once[peer],
            ):  # local peers do not all see the messages that serve one of them
                yield run
                run, landed = [], Counter()
            once = self.routes.once[peer]
            number, num_descriptors = 0, 1
            while number < num_descriptors:
                descriptor = tuple(map(int, self.find_descriptors(peer, number)))
                while descriptor not in self.seen:
                    yield None
                seen = self.seen[descriptor]
                num_descriptors = seen.num_descriptors if number == 0 else num_descriptors
                run += [descriptor] if seen.num_rows else []
                number += 1
                if num_descriptors == 0 or (self.routes.inbound_index[peer] < 0 and not (alike and seen.num_rows)):
                    continue
                lands = None if alike else descriptor[0]
                landed[lands] += 1
                if landed[lands] == at_once:  # there may be no room for the next before these are done
                    yield run
                    run, landed = [], Counter()
        yield run

    def count_rows(self, descriptors):
        """Count the rows that these descriptors have for this rank."""
        return sum(self.seen[descriptor].num_rows for descriptor in descriptors)

    def batch_of(self, descriptors):
        """Put together what these descriptors have for this rank, at least one of them -> Batch."""
        seen = [self.seen[descriptor] for descriptor in descriptors]
        return make_batch(
            descriptors, [descriptor.start for descriptor in seen], np.array([descriptor.counts for descriptor in seen])
        )

    def has(self, batch):
        """Whether all descriptors of a batch, made in an earlier exchange of the same plans, have been seen."""
        return all(descriptor in self.seen for descriptor in batch.descriptors)

    def rows(self, batch):
        """Find where a batch's results go, now -> rows of the window [n] int64."""
        firsts = np.array([self.seen[descriptor].first for descriptor in batch.descriptors])
        return firsts[batch.descriptor_of_row] + batch.offset_of_row

    def finish(self, batch):
        """Tell the homes that a batch's results are laid down."""
        for publisher, descriptor in batch.descriptors:
            self.window.mark_done(self.buffer_index, self.exchange, publisher, descriptor)
