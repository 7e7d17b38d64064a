"""The one seam between the program and whatever carries its rows: MPI today, a loopback in tests.

A transport moves rows: buffers are uint8 [rows, row_bytes], laid out peer after peer, and counts are rows. So a
bfloat16 row needs no special case, and a message of more than 2 GiB is still a small number of rows.
"""

import enum
from typing import Protocol

import numpy as np


class Direction(enum.IntEnum):
    """What a message carries; part of its tag."""

    DISPATCH = 0  # tokens to their experts
    COMBINE = 1  # results back home
    COMBINE_BACKWARD = 2  # gradients of the results, to the experts
    DISPATCH_BACKWARD = 3  # gradients of the tokens, back home


class Pending(Protocol):
    """An exchange under way."""

    def poke(self):
        """Let messages progress and note whose rows have landed, without waiting."""

    def arrivals(self):
        """Yield lists of peers whose rows have landed since the last one, until all have."""

    def wait_for(self, peers):
        """Wait until the rows of all these peers have landed."""

    def wait(self):
        """Wait until everything has landed and left: both buffers are free again."""


class Transport(Protocol):
    """Carries rows among the P ranks of a group."""

    rank: int
    size: int

    def start(self, send, send_counts, recv, recv_counts, ready, tag):
        """Begin an exchange: send_counts[p] rows to and recv_counts[p] rows from each peer p -> Pending.

        `ready` is the event after which the send buffer holds its rows.
        """

    def start_counts(self, counts):
        """Begin to tell each peer p its row counts[p] of an int64 array [P, n] -> a call that waits for theirs."""


def make_tag(layer, micro_batch, direction, num_micro_batches):
    """Number an exchange, so that messages of different layers, micro-batches and directions never match."""
    return (layer * num_micro_batches + micro_batch) * len(Direction) + direction


def offsets_of(counts):
    """Running start of each segment: counts [P] -> offsets [P + 1]."""
    return np.concatenate(([0], np.cumsum(counts)))


class Loopback:
    """A group of one rank: what it sends, it receives. The stand-in for tests that need no MPI."""

    rank = 0
    size = 1

    def start(self, send, send_counts, recv, recv_counts, ready, tag):
        """Copy the rows at once -> Landed."""
        ready.synchronize()
        recv[: recv_counts[0]] = send[: send_counts[0]]
        return Landed()

    def start_counts(self, counts):
        """Give the rank its own counts back."""
        return lambda: counts


class Landed:
    """A Pending whose only peer is this rank, and whose rows are there."""

    def poke(self):
        """Do nothing: all has landed."""

    def arrivals(self):
        """Yield the one peer."""
        yield [0]

    def wait_for(self, peers):
        """Return at once."""

    def wait(self):
        """Return at once."""
