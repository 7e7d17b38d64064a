"""Routing and placement become a Plan: which row goes where, forward and backward alike.

Rows travel sorted by destination slot, so every message is already grouped by expert; slot j lives on rank j // s.
"""

from dataclasses import dataclass

import numpy as np

from hpcmoe.comm.transport import offsets_of

GOLDEN = 0.6180339887498949  # its multiples, modulo 1, fill [0, 1) evenly however many are taken
BELOW_ONE = 1 - 1e-9  # keeps expert + point below expert + 1 after rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one micro-batch exchanges in one layer; N' copies leave this rank and R rows reach it."""

    copy_of_row: np.ndarray  # [N'] int64, which copy t * K + k each row sent is, in sending order
    row_of_copy: np.ndarray  # [T, K] int64, the inverse; 0 for a dropped copy, whose gate is zero
    sent_to_slot: np.ndarray  # [P, s] int64, rows for each peer's slots
    received_for_slot: np.ndarray  # [P, s] int64, rows from each peer for this rank's slots
    top_k: int

    @property
    def token_of_row(self):
        """The token whose copy each row sent is. [N']"""
        return self.copy_of_row // self.top_k

    @property
    def send_counts(self):
        """Rows for each peer. [P]"""
        return self.sent_to_slot.sum(axis=1)

    @property
    def recv_counts(self):
        """Rows from each peer. [P]"""
        return self.received_for_slot.sum(axis=1)

    @property
    def num_received(self):
        """R: rows that reach this rank."""
        return int(self.received_for_slot.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of some peers on which the local experts work at once."""

    peers: tuple  # whose rows they are
    order: np.ndarray  # [n] int64, the rows' places in the receive buffer, grouped by slot
    rows_of_slot: np.ndarray  # [s] int64


def make_send_order(slot_of_copy, kept):
    """Sort the kept copies by slot, in token order within a slot: slots [N], kept [N] -> copy_of_row [N']."""
    copies = np.flatnonzero(kept)
    return copies[np.argsort(slot_of_copy[copies], kind="stable")]


def make_plan(slot_of_copy, copy_of_row, sent_to_slot, received_for_slot):
    """Put a Plan together: slot_of_copy [T, K], copy_of_row [N'], counts [P, s] both ways."""
    row_of_copy = np.zeros(slot_of_copy.size, dtype=np.int64)
    row_of_copy[copy_of_row] = np.arange(len(copy_of_row))
    return Plan(
        copy_of_row=copy_of_row,
        row_of_copy=row_of_copy.reshape(slot_of_copy.shape),
        sent_to_slot=sent_to_slot,
        received_for_slot=received_for_slot,
        top_k=slot_of_copy.shape[1],
    )


class SlotChooser:
    """Picks a replica for each copy of a token, by the shares that the placement gives this rank's node.

    The i-th of n copies that a rank has for an expert takes the point (i + phase) / n in the expert's shares, so each
    replica's copies miss its share by less than one. Ranks differ in phase: single copies do not all go the same way.
    """

    def __init__(self, expert_of_replica, share_of_replica, num_experts, rank):
        """expert_of_replica [S] (-1 empty) and share_of_replica [S] of one layer."""
        used = np.flatnonzero((expert_of_replica >= 0) & (share_of_replica > 0))
        self.slots = used[np.argsort(expert_of_replica[used], kind="stable")]  # grouped by expert
        experts = expert_of_replica[self.slots]
        self.edges = experts + cumulative_share(experts, share_of_replica[self.slots])
        self.unique = len(self.slots) == num_experts
        self.phase = rank * GOLDEN % 1.0

    def choose(self, experts):
        """experts [T, K] -> slots [T, K]."""
        if self.unique:
            return self.slots[experts]
        flat = experts.ravel()
        point = (place_among_equals(flat) + self.phase) / np.bincount(flat)[flat] * BELOW_ONE
        chosen = np.searchsorted(self.edges, flat + point, side="right")
        return self.slots[chosen].reshape(experts.shape)


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


def make_batch(plan, peers):
    """Gather the rows of these peers into one batch, grouped by slot and by peer within a slot -> Batch."""
    segments = offsets_of(plan.received_for_slot.ravel())[:-1].reshape(plan.received_for_slot.shape)  # [P, s]
    peers = np.asarray(peers)
    counts = plan.received_for_slot[peers]  # [peers, s]
    return Batch(
        peers=tuple(peers.tolist()),
        order=ranges(segments[peers].T.ravel(), counts.T.ravel()),
        rows_of_slot=counts.sum(axis=0),
    )


def ranges(starts, counts):
    """Concatenate start, start + 1, ... of each count: starts [n], counts [n] -> int64."""
    before = offsets_of(counts)
    return np.arange(before[-1]) + np.repeat(starts - before[:-1], counts)


def cut_into_batches(plan, rank, max_rows):
    """Cut the peers, own rows first and then as they lie to the left, into lists of about max_rows rows.

    A function of the counts alone: the same rows meet in the same GEMM at every run.
    """
    counts, batches, rows = plan.recv_counts, [[]], 0
    for peer in (np.arange(rank, rank - len(counts), -1) % len(counts)).tolist():
        if batches[-1] and rows + counts[peer] > max_rows:
            batches.append([])
            rows = 0
        batches[-1].append(peer)
        rows += counts[peer]
    return batches
