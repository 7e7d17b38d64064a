"""The seam between the program and whatever carries messages between nodes: MPI, or nothing within one node.

A transport carries rows: arrays are uint8 [rows, row_bytes] and lengths are rows. So a bfloat16 row needs no special
case, and a message of more than 2 GiB is still a small number of rows. Ranks of one node need none of it: they share
a window (hpcmoe.comm.window).
"""

import enum
import math
import time
from collections import Counter
from typing import Protocol

import numpy as np

MOST_MESSAGES = 50_000  # that a MessageLog keeps


class Direction(enum.IntEnum):
    """What an exchange carries; part of its tag."""

    DISPATCH = 0  # tokens to their experts
    COMBINE = 1  # results back home
    COMBINE_BACKWARD = 2  # gradients of the results, to the experts
    DISPATCH_BACKWARD = 3  # gradients of the tokens, back home


HOMEWARD = {Direction.DISPATCH: Direction.COMBINE, Direction.COMBINE_BACKWARD: Direction.DISPATCH_BACKWARD}


class MessageKind(enum.IntEnum):
    """What one message of an exchange holds; part of its tag."""

    HEADER = 0  # counts of the messages that follow
    ROWS = 1  # rows, and a gate value for each assignment, on their way out
    RETURN = 2  # the same on their way home


class Request(Protocol):
    """What has been started and not waited for: one message, or all messages of an all-to-all."""

    @property
    def send_done(self) -> bool:
        """Return True if what is sent may be written over."""

    @property
    def recv_done(self) -> bool:
        """Return True if what is received may be read; on a device, by what waits for the request's event."""

    @property
    def done(self) -> bool:
        """Return True if nothing is left to do, on the device either."""


class MessageRequest:
    """One message under way; half of it is done from the beginning."""

    __slots__ = ("recv_done", "send_done")

    def __init__(self, sends: bool = False) -> None:
        self.send_done, self.recv_done = not sends, sends

    @property
    def done(self) -> bool:
        """Return True if the message has been sent, or received."""
        return self.send_done and self.recv_done

    def complete(self) -> None:
        """Mark the message as done."""
        self.send_done = self.recv_done = True


class MessageLog:
    """When messages of rows began and ended on this rank, by time.perf_counter()."""

    def __init__(self) -> None:
        self.rows = list[list[float]]()  # sends (0, 1), peer, tag, its number among those alike, bytes, begin, end
        self.under_way: dict[MessageRequest, list[float]] = {}
        self.counts = Counter[tuple[bool, int, int]]()

    def add(self, request: MessageRequest, sends: bool, peer: int, tag: int, num_bytes: int) -> None:
        """Record that a message has begun; beyond MOST_MESSAGES, nothing."""
        if len(self.rows) == MOST_MESSAGES:
            return
        key = sends, peer, tag
        row = [float(sends), peer, tag, self.counts[key], num_bytes, time.perf_counter(), math.nan]
        self.counts[key] += 1
        self.rows.append(row)
        self.under_way[request] = row

    def end(self, request: MessageRequest) -> None:
        """Record that a message has ended, as far as this rank can see."""
        row = self.under_way.pop(request, None)
        if row is not None:
            row[-1] = time.perf_counter()


class Transport(Protocol):
    """Carries messages among the P ranks of a group, without blocking."""

    rank: int
    size: int
    log: MessageLog | None  # of the messages of rows, while somebody wants to know

    def send_rows(self, rows: np.ndarray, peer: int, tag: int) -> Request:
        """Start to send uint8 rows [n, row_bytes], which must stay as they are until the request is done."""
        raise RuntimeError(f"nothing is carried between this rank and {peer}")

    def recv_rows(self, rows: np.ndarray, peer: int, tag: int) -> Request:
        """Start to receive into uint8 rows [n, row_bytes]."""
        raise RuntimeError(f"nothing is carried between this rank and {peer}")

    def send_words(self, words: np.ndarray, peer: int, tag: int) -> Request:
        """Start to send an int64 array."""
        raise RuntimeError(f"nothing is carried between this rank and {peer}")

    def recv_words(self, words: np.ndarray, peer: int, tag: int) -> Request:
        """Start to receive into an int64 array."""
        raise RuntimeError(f"nothing is carried between this rank and {peer}")

    def poke(self) -> bool:
        """Advance messages and mark the requests that are done, without waiting. Return True if any is."""


class Loopback(Transport):
    """The transport of a group on one node: nothing may be sent."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.log = rank, size, None

    def poke(self) -> bool:
        """Return False: nothing is under way."""
        return False


def make_tag(micro_batch: int, direction: Direction) -> int:
    """Return the number of an exchange, so that messages of different micro-batches and directions never match.

    Its layer is no part of it: both ranks come to a micro-batch's layers in one order, and MPI keeps to it.
    """
    return micro_batch * len(Direction) + direction


def make_message_tag(exchange_tag: int, kind: MessageKind, message: int, max_messages: int) -> int:
    """Return the tag of a message: those of one pair of ranks may overtake each other on their way back."""
    return (exchange_tag * len(MessageKind) + kind) * max_messages + message


def count_tags(num_micro_batches: int, max_messages: int) -> int:
    """Count the tags of all messages that may be under way."""
    return num_micro_batches * len(Direction) * len(MessageKind) * max_messages
