"""Routing becomes a Plan: which copy takes which way, and where its result will lie at home.

Copies are laid in the order of their ways (hpcmoe.dispatch.routes) and by slot, so that whatever takes one way to one
expert lies in one run.
"""

from dataclasses import dataclass

import numpy as np

GOLDEN = 0.6180339887498949  # its multiples, modulo 1, fill [0, 1) evenly however many are taken
BELOW_ONE = 1 - 1e-9  # keeps expert + point below expert + 1 after rounding
NUMBER_BYTES = 8  # of a copy in a parcel: which of its tokens it is, and a number of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Tokens for other nodes that travel, and whose sums come back, in one message: each token once."""

    landing: int  # which of the routes' parcels it is part of
    tokens: np.ndarray  # [U] int64, ascending
    copies: np.ndarray  # [C] int64, t * K + k, by slot
    token_of_copy: np.ndarray  # [C] int32, which of the parcel's tokens each copy is of
    counts: np.ndarray  # [served, s] int64, copies for each slot of the ranks that it serves
    first: int  # row at home, after the window's copies, where its sums land

    @property
    def num_tokens(self):
        """U."""
        return len(self.tokens)

    @property
    def num_copies(self):
        """C."""
        return len(self.copies)

    def num_rows(self, row_bytes):
        """Rows of its message: tokens, and behind them the copies' gate values."""
        return self.num_tokens + num_trailing_rows(self.num_copies, row_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one micro-batch exchanges in one layer, as its home sees it."""

    copies: np.ndarray  # [N'] int64, t * K + k: those that take the window, by mate and slot
    counts: np.ndarray  # [mates, s] int64, of these for each slot
    parcels: tuple  # of all other copies
    row_of_entry: np.ndarray  # [T, K] int64, the rows whose sum is a token's result; -1 where there are fewer than K
    is_sum: np.ndarray  # [T, K] bool: the row holds several copies' sum, already weighed
    num_rows: int  # rows that come home
    copies_to_rank: np.ndarray  # [P] int64

    @property
    def top_k(self):
        """K."""
        return self.row_of_entry.shape[1]


def make_plan(slots, kept, routes, max_tokens, row_bytes):
    """Find the way of each kept copy -> Plan: slots [T, K], kept [T, K] bool, at most max_tokens tokens a parcel."""
    copies = np.flatnonzero(kept)
    place = routes.place_of_slot[slots.ravel()[copies]]
    narrow = np.uint8 if len(routes.place_of_slot) <= 256 else np.uint16 if len(routes.place_of_slot) <= 65536 else None
    order = np.argsort(place if narrow is None else place.astype(narrow), kind="stable")  # a narrow key sorts faster
    copies = copies[order]
    counts = np.bincount(place, minlength=len(routes.place_of_slot))
    edges = np.concatenate(([0], np.cumsum(counts)))[routes.edges]

    # The window's copies come home each to a row of its own.
    local = edges[0]
    row_of_entry, is_sum = np.full(slots.size, -1), np.zeros(slots.size, bool)
    row_of_entry[copies[:local]] = np.arange(local)

    # A parcel's come home summed by token: the row is entered for the first copy of each.
    parcels, row = [], int(local)
    for landing in np.flatnonzero(np.diff(edges)).tolist():
        mine = copies[edges[landing] : edges[landing + 1]]
        of_slots = counts[routes.edges[landing] : routes.edges[landing + 1]]
        for cut, entries in cut_by_token(mine, of_slots.reshape(-1, routes.num_slots), slots.shape[1], max_tokens):
            parcel = Parcel(landing=landing, first=row, **cut)
            parcels.append(parcel)
            row_of_entry[entries] = np.arange(row, row + parcel.num_tokens)
            is_sum[entries] = True
            row += parcel.num_rows(row_bytes)
    return Plan(
        copies=copies[:local],
        counts=counts[: routes.num_places].reshape(-1, routes.num_slots),
        parcels=tuple(parcels),
        row_of_entry=row_of_entry.reshape(slots.shape),
        is_sum=is_sum.reshape(slots.shape),
        num_rows=row,
        copies_to_rank=counts[routes.place_of_slot].reshape(-1, routes.num_slots).sum(axis=1),
    )


def cut_by_token(copies, counts, top_k, max_tokens):
    """Cut one way's copies [C], counts [served, s] of them a slot, into parcels -> (fields of Parcel, entries) of each.

    entries are the first copy of each token.
    """
    tokens, entries, token_of_copy = np.unique(copies // top_k, return_index=True, return_inverse=True)
    slot_of_copy = np.repeat(np.arange(counts.size), counts.ravel())
    for begin in range(0, len(tokens), max_tokens):
        part = slice(begin, begin + max_tokens)
        inside = (token_of_copy >= begin) & (token_of_copy < begin + max_tokens)
        cut = {
            "tokens": tokens[part],
            "copies": copies[inside],
            "token_of_copy": (token_of_copy[inside] - begin).astype(np.int32),
            "counts": np.bincount(slot_of_copy[inside], minlength=counts.size).reshape(counts.shape),
        }
        yield cut, copies[entries[part]]


def num_trailing_rows(num_copies, row_bytes):
    """Rows that hold the gate values of a parcel's copies, behind its tokens."""
    return -(-num_copies * NUMBER_BYTES // row_bytes)


def ranges(starts, counts):
    """Concatenate start, start + 1, ... of each count: starts [n], counts [n] -> int64."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


class SlotChooser:
    """Picks a replica for each copy of a token, by the shares that the placement gives this rank's node.

    The i-th of n copies that a rank has for an expert takes the point (i + phase) / n in the expert's shares, so each
    replica's copies miss its share by less than one. Ranks differ in phase: single copies do not all go the same way.
    """

    def __init__(self, expert_of_replica, share_of_replica, slots_of_replica, num_experts, rank):
        """expert_of_replica [S] (-1 empty), share_of_replica [S] and slots_of_replica [S, shards] of one layer."""
        used = np.flatnonzero((expert_of_replica >= 0) & (share_of_replica > 0))
        used = used[np.argsort(expert_of_replica[used], kind="stable")]  # grouped by expert
        self.slots = slots_of_replica[used]
        experts = expert_of_replica[used]
        self.edges = experts + cumulative_share(experts, share_of_replica[used])
        self.unique = len(used) == num_experts
        self.phase = rank * GOLDEN % 1.0

    def choose(self, experts):
        """experts [T, K] -> slots [T, K * shards]."""
        shape = len(experts), experts.shape[1] * self.slots.shape[1]
        if self.unique:
            return self.slots[experts].reshape(shape)
        flat = experts.ravel()
        point = (place_among_equals(flat) + self.phase) / np.bincount(flat)[flat] * BELOW_ONE
        chosen = np.searchsorted(self.edges, flat + point, side="right")
        return self.slots[chosen].reshape(shape)


def find_slots_of_shards(num_replicas, slots_per_rank, num_shards):
    """Find the slots of the ranks that hold a replica's shards, neighbours all -> [S, shards] int64."""
    position, slot = np.divmod(np.arange(num_replicas), slots_per_rank)
    return (position[:, None] * num_shards + np.arange(num_shards)) * slots_per_rank + slot[:, None]


def cumulative_share(experts, shares):
    """Running sum of the shares within each expert, its last exactly 1: sorted experts [n], shares [n] -> [n]."""
    total = np.cumsum(shares)
    before = np.concatenate(([0.0], total))[np.searchsorted(experts, experts)]
    last = np.append(experts[1:] != experts[:-1], True)
    return np.where(last, 1.0, total - before)


def place_among_equals(values):
    """Number each value's occurrences from 0, in order: [n] -> [n]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return place
