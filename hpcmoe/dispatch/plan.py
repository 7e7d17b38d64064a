"""Routing becomes a Plan: which assignment takes which way, and where its result will lie at home.

Three permutations lie on a token's path, each undone by the next step back:

1. at home, assignments [N'] are sorted by way (hpcmoe.dispatch.routes) and slot, so that what takes one way to one
   expert lies in one run; a dropped assignment takes none (make_plan; on devices RowOps.sort_by_slot)
2. at the experts, rows [R], which lie by peer and within it by slot, are gathered by slot and within it by peer, for
   one GEMM an expert; the results are scattered back by the same indices (Arrivals.build_batch; DeviceBatch)
3. at home again, row_of_assignment [T, K] finds each token's results, and sums them times their gates (combine)

Between nodes a token goes once for several experts. So permutation 1 is by token there, each assignment carries the
index of its token, and the receiver sums by token before the rows come home.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmoe.dispatch.routes import Routes

_GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, fill [0, 1) evenly however many are taken
LARGEST_POINT = 1 - 1e-9  # keeps expert + point below expert + 1 after rounding
TRAILER_BYTES = 8  # of an assignment in a message: the index of its token int32, and its gate float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Tokens for other nodes that travel, and whose sums come back, in one message: each token once."""

    receiver: int  # which of the routes' receivers it goes to
    tokens: np.ndarray  # [U] int64, ascending
    assignments: np.ndarray  # [C] int64, t * K + k, by slot
    token_of_assignment: np.ndarray  # [C] int32, index among the message's tokens
    counts: np.ndarray  # [served, s] int64, assignments for each slot of the ranks that it serves
    first: int  # row at home, after the window's assignments, where its sums are received

    @property
    def num_tokens(self) -> int:
        """Return U."""
        return len(self.tokens)

    @property
    def num_assignments(self) -> int:
        """Return C."""
        return len(self.assignments)

    def num_rows(self, row_bytes: int) -> int:
        """Return the rows of the message: tokens, and behind them the trailer of its assignments."""
        return self.num_tokens + num_trailing_rows(self.num_assignments, row_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one micro-batch exchanges in one layer, as its home sees it."""

    assignments: np.ndarray  # [N'] int64, t * K + k: those that go through the window, by local peer and slot
    counts: np.ndarray  # [local peers, s] int64, of these for each slot
    messages: tuple[Message, ...]  # of all other assignments
    row_of_assignment: np.ndarray  # [T, K] int64, rows whose sum is a token's result; -1 where there are fewer than K
    is_sum: np.ndarray  # [T, K] bool: the row is a sum of several assignments, times their gates
    num_rows: int  # rows that come home
    assignments_to_rank: np.ndarray  # [P] int64

    @property
    def top_k(self) -> int:
        """Return K."""
        return self.row_of_assignment.shape[1]


def make_plan(slots: np.ndarray, kept: np.ndarray, routes: Routes, max_tokens: int, row_bytes: int) -> Plan:
    """Return the plan for assignments to slots [T, K], kept [T, K] bool, in messages of at most max_tokens tokens."""
    # Sort the assignments by way and slot: permutation 1.
    assignments = np.flatnonzero(kept)
    place = routes.place_of_slot[slots.ravel()[assignments]]
    narrow = np.uint8 if len(routes.place_of_slot) <= 256 else np.uint16 if len(routes.place_of_slot) <= 65536 else None
    order = np.argsort(place if narrow is None else place.astype(narrow), kind="stable")  # a narrow key sorts faster
    assignments = assignments[order]
    counts = np.bincount(place, minlength=len(routes.place_of_slot))
    edges = np.concatenate(([0], np.cumsum(counts)))[routes.edges]

    # Give each assignment that goes through the window a row of its own at home: permutation 3.
    local = edges[0]
    row_of_assignment, is_sum = np.full(slots.size, -1), np.zeros(slots.size, bool)
    row_of_assignment[assignments[:local]] = np.arange(local)

    # Give each token of a message a row, under its first assignment there.
    messages, row = list[Message](), int(local)
    for receiver in np.flatnonzero(np.diff(edges)).tolist():
        mine = assignments[edges[receiver] : edges[receiver + 1]]
        of_slots = counts[routes.edges[receiver] : routes.edges[receiver + 1]]
        for cut, firsts in cut_by_token(mine, of_slots.reshape(-1, routes.num_slots), slots.shape[1], max_tokens):
            message = Message(receiver=receiver, first=row, **cut)
            messages.append(message)
            row_of_assignment[firsts] = np.arange(row, row + message.num_tokens)
            is_sum[firsts] = True
            row += message.num_rows(row_bytes)
    return Plan(
        assignments=assignments[:local],
        counts=counts[: routes.num_places].reshape(-1, routes.num_slots),
        messages=tuple(messages),
        row_of_assignment=row_of_assignment.reshape(slots.shape),
        is_sum=is_sum.reshape(slots.shape),
        num_rows=row,
        assignments_to_rank=counts[routes.place_of_slot].reshape(-1, routes.num_slots).sum(axis=1),
    )


def cut_by_token(
    assignments: np.ndarray, counts: np.ndarray, top_k: int, max_tokens: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield the messages of one way: fields of Message, and the first assignment of each token [U].

    The way's assignments are [C], counts [served, s] of them for a slot.
    """
    tokens, firsts, token_of_assignment = np.unique(assignments // top_k, return_index=True, return_inverse=True)
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
        yield cut, assignments[firsts[part]]


def num_trailing_rows(num_assignments: int, row_bytes: int) -> int:
    """Return how many rows the trailer of a message's assignments takes, behind its tokens."""
    return -(-num_assignments * TRAILER_BYTES // row_bytes)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate start, start + 1, ... of each count: starts [n], counts [n] -> int64."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


class SlotChooser:
    """Picks a replica for each assignment, by the shares that the placement gives this rank's node.

    The i-th of n assignments that a rank has for an expert takes the point (i + phase) / n in the expert's shares, so
    each replica's count misses its share by less than one. Ranks differ in phase: single assignments do not all go the
    same way.
    """

    def __init__(
        self,
        expert_of_replica: np.ndarray,
        share_of_replica: np.ndarray,
        slots_of_replica: np.ndarray,
        num_experts: int,
        rank: int,
    ) -> None:
        """expert_of_replica [S] (-1 empty), share_of_replica [S] and slots_of_replica [S, shards] of one layer."""
        used = np.flatnonzero((expert_of_replica >= 0) & (share_of_replica > 0))
        used = used[np.argsort(expert_of_replica[used], kind="stable")]  # grouped by expert
        self.slots = slots_of_replica[used]
        experts = expert_of_replica[used]
        self.edges = experts + cumulative_share(experts, share_of_replica[used])
        self.unique = len(used) == num_experts
        self.phase = rank * _GOLDEN_RATIO % 1.0

    def choose(self, experts: np.ndarray) -> np.ndarray:
        """Return the slots [T, K * shards] for experts [T, K]."""
        shape = len(experts), experts.shape[1] * self.slots.shape[1]
        if self.unique:
            return self.slots[experts].reshape(shape)
        flat = experts.ravel()
        point = (count_earlier_equals(flat) + self.phase) / np.bincount(flat)[flat] * LARGEST_POINT
        chosen = np.searchsorted(self.edges, flat + point, side="right")
        return self.slots[chosen].reshape(shape)


def find_slots_of_shards(num_replicas: int, slots_per_rank: int, num_shards: int) -> np.ndarray:
    """Return the slots [S, shards] int64 that hold each replica's shards, on neighbouring ranks."""
    position, slot = np.divmod(np.arange(num_replicas), slots_per_rank)
    return (position[:, None] * num_shards + np.arange(num_shards)) * slots_per_rank + slot[:, None]


def cumulative_share(experts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the running sum of shares [n] within each of sorted experts [n], its last exactly 1."""
    total = np.cumsum(shares)
    before = np.concatenate(([0.0], total))[np.searchsorted(experts, experts)]
    last = np.append(experts[1:] != experts[:-1], True)
    return np.where(last, 1.0, total - before)


def count_earlier_equals(values: np.ndarray) -> np.ndarray:
    """Count the equal values before each: [n] -> [n]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return place
