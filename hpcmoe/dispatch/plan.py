"""Routing becomes a Plan: which assignment takes which way, and where its result will lie at home.

Assignments are sorted in the order of their ways (hpcmoe.dispatch.routes) and by slot, so that whatever takes one way to one
expert lies in one run.
"""

from dataclasses import dataclass

import numpy as np

_GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, fill [0, 1) evenly however many are taken
LARGEST_POINT = 1 - 1e-9  # keeps expert + point below expert + 1 after rounding
NUMBER_BYTES = 8  # of an assignment in a message: which of its tokens it is, and a number of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Tokens for other nodes that travel, and whose sums come back, in one message: each token once."""

    receiver: int  # which of the routes' messages it is part of
    tokens: np.ndarray  # [U] int64, ascending
    assignments: np.ndarray  # [C] int64, t * K + k, by slot
    token_of_assignment: np.ndarray  # [C] int32, which of the message's tokens each assignment is of
    counts: np.ndarray  # [served, s] int64, assignments for each slot of the ranks that it serves
    first: int  # row at home, after the window's assignments, where its sums land

    @property
    def num_tokens(self):
        """U."""
        return len(self.tokens)

    @property
    def num_assignments(self):
        """C."""
        return len(self.assignments)

    def num_rows(self, row_bytes):
        """Rows of its message: tokens, and behind them the assignments' gate values."""
        return self.num_tokens + num_trailing_rows(self.num_assignments, row_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one micro-batch exchanges in one layer, as its home sees it."""

    assignments: np.ndarray  # [N'] int64, t * K + k: those that take the window, by local_peer and slot
    counts: np.ndarray  # [local_peers, s] int64, of these for each slot
    messages: tuple  # of all other assignments
    row_of_entry: np.ndarray  # [T, K] int64, the rows whose sum is a token's result; -1 where there are fewer than K
    is_sum: np.ndarray  # [T, K] bool: the row holds several assignments' sum, already weighed
    num_rows: int  # rows that come home
    assignments_to_rank: np.ndarray  # [P] int64

    @property
    def top_k(self):
        """K."""
        return self.row_of_entry.shape[1]


def make_plan(slots, kept, routes, max_tokens, row_bytes):
    """Find the way of each kept assignment -> Plan: slots [T, K], kept [T, K] bool, at most max_tokens tokens a message."""
    assignments = np.flatnonzero(kept)
    place = routes.place_of_slot[slots.ravel()[assignments]]
    narrow = np.uint8 if len(routes.place_of_slot) <= 256 else np.uint16 if len(routes.place_of_slot) <= 65536 else None
    order = np.argsort(place if narrow is None else place.astype(narrow), kind="stable")  # a narrow key sorts faster
    assignments = assignments[order]
    counts = np.bincount(place, minlength=len(routes.place_of_slot))
    edges = np.concatenate(([0], np.cumsum(counts)))[routes.edges]

    # The window's assignments come home each to a row of its own.
    local = edges[0]
    row_of_entry, is_sum = np.full(slots.size, -1), np.zeros(slots.size, bool)
    row_of_entry[assignments[:local]] = np.arange(local)

    # A message's come home summed by token: the row is entered for the first assignment of each.
    messages, row = [], int(local)
    for receiver in np.flatnonzero(np.diff(edges)).tolist():
        mine = assignments[edges[receiver] : edges[receiver + 1]]
        of_slots = counts[routes.edges[receiver] : routes.edges[receiver + 1]]
        for cut, entries in cut_by_token(mine, of_slots.reshape(-1, routes.num_slots), slots.shape[1], max_tokens):
            message = Message(receiver=receiver, first=row, **cut)
            messages.append(message)
            row_of_entry[entries] = np.arange(row, row + message.num_tokens)
            is_sum[entries] = True
            row += message.num_rows(row_bytes)
    return Plan(
        assignments=assignments[:local],
        counts=counts[: routes.num_places].reshape(-1, routes.num_slots),
        messages=tuple(messages),
        row_of_entry=row_of_entry.reshape(slots.shape),
        is_sum=is_sum.reshape(slots.shape),
        num_rows=row,
        assignments_to_rank=counts[routes.place_of_slot].reshape(-1, routes.num_slots).sum(axis=1),
    )


def cut_by_token(assignments, counts, top_k, max_tokens):
    """Cut one way's assignments [C], counts [served, s] of them a slot, into messages -> (fields of Message, entries) of each.

    entries are the first assignment of each token.
    """
    tokens, entries, token_of_assignment = np.unique(assignments // top_k, return_index=True, return_inverse=True)
    slot_of_assignment = np.repeat(np.arange(counts.size), counts.ravel())
    for begin in range(0, len(tokens), max_tokens):
        part = slice(begin, begin + max_tokens)
        inside = (token_of_assignment >= begin) & (token_of_assignment < begin + max_tokens)
        cut = {
            "tokens": tokens[part],
            "assignments": assignments[inside],
            "token_of_assignment": (token_of_assignment[inside] - begin).astype(np.int32),
            "counts": np.bincount(slot_of_assignment[inside], minlength=counts.size).reshape(counts.shape),
        }
        yield cut, assignments[entries[part]]


def num_trailing_rows(num_assignments, row_bytes):
    """Rows that hold the gate values of a message's assignments, behind its tokens."""
    return -(-num_assignments * NUMBER_BYTES // row_bytes)


def ranges(starts, counts):
    """Concatenate start, start + 1, ... of each count: starts [n], counts [n] -> int64."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


class SlotChooser:
    """Picks a replica for each assignment of a token, by the shares that the placement gives this rank's node.

    The i-th of n assignments that a rank has for an expert takes the point (i + phase) / n in the expert's shares, so each
    replica's assignments miss its share by less than one. Ranks differ in phase: single assignments do not all go the same way.
    """

    def __init__(self, expert_of_replica, share_of_replica, slots_of_replica, num_experts, rank):
        """expert_of_replica [S] (-1 empty), share_of_replica [S] and slots_of_replica [S, shards] of one layer."""
        used = np.flatnonzero((expert_of_replica >= 0) & (share_of_replica > 0))
        used = used[np.argsort(expert_of_replica[used], kind="stable")]  # grouped by expert
        self.slots = slots_of_replica[used]
        experts = expert_of_replica[used]
        self.edges = experts + cumulative_share(experts, share_of_replica[used])
        self.unique = len(used) == num_experts
        self.phase = rank * _GOLDEN_RATIO % 1.0

    def choose(self, experts):
        """experts [T, K] -> slots [T, K * shards]."""
        shape = len(experts), experts.shape[1] * self.slots.shape[1]
        if self.unique:
            return self.slots[experts].reshape(shape)
        flat = experts.ravel()
        point = (place_among_equals(flat) + self.phase) / np.bincount(flat)[flat] * LARGEST_POINT
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
