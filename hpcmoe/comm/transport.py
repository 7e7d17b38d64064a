"""The one seam between the program and whatever carries messages between nodes: MPI today, nobody in a group of local peers.

A transport moves rows: arrays are uint8 [rows, row_bytes] and lengths are rows. So a bfloat16 row needs no special
case, and a message of more than 2 GiB is still a small number of rows. Ranks of one node need none of it: they share
a window (hpcmoe.comm.window).
"""

import enum
from typing import Protocol


class Direction(enum.IntEnum):
    """What an exchange carries; part of its tag."""

    DISPATCH = 0  # tokens to their experts
    COMBINE = 1  # results back home
    COMBINE_BACKWARD = 2  # gradients of the results, to the experts
    DISPATCH_BACKWARD = 3  # gradients of the tokens, back home


HOMEWARD = {Direction.DISPATCH: Direction.COMBINE, Direction.COMBINE_BACKWARD: Direction.DISPATCH_BACKWARD}


class MessageKind(enum.IntEnum):
    """What a message of an exchange holds; part of its tag."""

    HEADER = 0  # what the messages hold
    ROWS = 1  # rows, and a number for each assignment, on their way out
    RETURN = 2  # the same on their way home


class MessageRequest:
    """A message under way."""

    __slots__ = ("done",)

    def __init__(self, done=False):
        self.done = done


class Transport(Protocol):
    """Carries messages among the P ranks of a group, without blocking."""

    rank: int
    size: int
    num_sent: int  # messages, ever

    def send_rows(self, rows, peer, tag):
        """Begin to send uint8 rows [n, row_bytes], which must stay as they are until the request is done -> Request."""

    def recv_rows(self, rows, peer, tag):
        """Begin to receive into uint8 rows [n, row_bytes] -> Request."""

    def send_words(self, words, peer, tag):
        """Begin to send an int64 array -> Request."""

    def recv_words(self, words, peer, tag):
        """Begin to receive into an int64 array -> Request."""

    def poke(self):
        """Let messages progress and mark the requests of those that are done, without waiting -> whether any is."""


def make_tag(micro_batch: int, direction: Direction) -> int:
    """Number an exchange, so that messages of different micro-batches and directions never match.

    Its layer is no part of it: both ranks come to a micro-batch's layers in one order, and MPI keeps to it.
    """
    return micro_batch * len(Direction) + direction


def make_message_tag(exchange_tag, kind, message, max_messages):
    """Number a message of an exchange: messages of one pair of ranks may overtake each other on their way back."""
    return (exchange_tag * len(MessageKind) + kind) * max_messages + message


def count_tags(num_micro_batches: int, max_messages: int) -> int:
    """Count the tags of all messages that may be under way."""
    return num_micro_batches * len(Direction) * len(MessageKind) * max_messages


class Loopback:
    """A group in which no two ranks lie on different nodes: nothing is ever sent."""

    num_sent = 0

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size

    def poke(self):
        """Find nothing under way."""
        return False
