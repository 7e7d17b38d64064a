"""One word that each rank gives all others with an exchange: whether their calls fit together, and how many follow.

Ranks that call different layers would compute wrong numbers, or wait for rows that nobody sends. So each reads the
others' words before their rows, and where they differ all ranks raise the same error.
"""

import enum
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from hpcmoe.comm.transport import Direction
from hpcmoe.errors import ClusterError
from hpcmoe.messages import format_ranges

_GRACE_SECONDS = 5.0  # from when calls are seen to differ, for ranks of which nothing is known yet
_CALL = 2**31 - 1  # the bits of a word that say what is called
_REFUSES = 2**31


class Use(enum.IntEnum):
    """For whom rows travel."""

    LAYER = 0  # the experts of an ExpertLayer
    OWN_EXPERTS = 1  # a user's own, by dispatch and combine


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What a rank tells all others of its call, packed into one word.

    Bits, from the lowest: layer 16, direction 2, top_k 8, use 5, refuses 1, rounds_left 31; a word is never negative.
    """

    layer: int = 0
    direction: Direction = Direction.DISPATCH
    top_k: int = 0
    use: Use = Use.LAYER
    refuses: bool = False  # this rank has more tokens than a call may have
    rounds_left: int = 0  # exchanges of the same call that follow this one

    def pack(self) -> int:
        """Return the notice as a word. Raises ValueError where a field has too few bits."""
        word, shift = 0, 0
        for field, bits in zip(fields(self), _BITS, strict=True):
            value = int(getattr(self, field.name))
            if not 0 <= value < 2**bits:
                raise ValueError(f"{field.name} = {value}: a notice has {bits} bits for it")
            word |= value << shift
            shift += bits
        return word

    def of_call(self, layer: int, direction: Direction, top_k: int) -> "Notice":
        """Return the notice of a call: what exceeds its bits is told modulo them."""
        return replace(self, layer=layer % 2 ** _BITS[0], direction=direction, top_k=top_k % 2 ** _BITS[2])

    def __str__(self) -> str:
        """Format what is called, for who reads an error."""
        way = "forward" if self.direction == Direction.DISPATCH else "backward"
        return f"layer {self.layer} top-{self.top_k} {way}" + ", own experts" * (self.use == Use.OWN_EXPERTS)


ONE_ROUND = Notice()  # of a call of one exchange
_BITS = 16, 2, 8, 5, 1, 31  # of each field


@functools.lru_cache(maxsize=4096)
def pack_call(notice: Notice, layer: int, direction: Direction, top_k: int) -> int:
    """Return the word of a call: the same calls come again at every step."""
    return notice.of_call(layer, direction, top_k).pack()


def unpack_notice(word: int) -> Notice:
    """Return the notice of a word."""
    values, word = list[int](), int(word)
    for bits in _BITS:
        values.append(word % 2**bits)
        word >>= bits
    layer, direction, top_k, use, refuses, rounds_left = values
    return Notice(
        layer=layer,
        direction=Direction(direction),
        top_k=top_k,
        use=Use(use),
        refuses=bool(refuses),
        rounds_left=rounds_left,
    )


def count_rounds_left(words: np.ndarray) -> int:
    """Return the exchanges that some rank has still to make for the same call, by the words [P] of all."""
    return int(words.max()) >> sum(_BITS[:-1])  # a word's highest bits


class Notices:
    """The words of all P ranks in one exchange, as they come."""

    def __init__(self, own: int, size: int) -> None:
        """own: this rank's word, which comes as the others do; size: P."""
        self.own_call = own & _CALL
        self.words = np.zeros(size, np.int64)  # [P]
        self.is_known = np.zeros(size, bool)  # [P]
        self.deadline: float | None = None  # once calls are seen to differ, or to be refused

    @property
    def differ(self) -> bool:
        """Return True if some rank's call is seen not to fit this one's."""
        return self.deadline is not None

    def agrees(self, words: np.ndarray) -> np.ndarray:
        """Return which words [n] call what this rank calls, and refuse nothing -> bool [n]."""
        return (words & (_CALL | _REFUSES)) == self.own_call

    def add(self, ranks: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Add the words [n] of ranks [n], and return which of them agree with this rank's -> bool [n]."""
        self.words[ranks], self.is_known[ranks] = words, True
        agreed = self.agrees(words)
        if not (self.differ or agreed.all()):
            self.deadline = time.monotonic() + _GRACE_SECONDS
        return agreed

    def find_conflict(self) -> ClusterError | None:
        """Return the error of calls that do not fit together, or None.

        It waits for all words, so that it is the same on all ranks; after some seconds those that are missing are left
        out.
        """
        if self.deadline is None or not (self.is_known.all() or time.monotonic() > self.deadline):
            return None
        error = ClusterError("\n".join(list_conflicts(self.words, self.is_known)))
        error.shared = bool(self.is_known.all())
        return error


def check_notices(words: np.ndarray) -> None:
    """Raise ClusterError, the same on all ranks, where the words [P] of an exchange do not fit together."""
    lines = list(list_conflicts(words, np.ones(len(words), bool)))
    if lines:
        error = ClusterError("\n".join(lines))
        error.shared = True
        raise error


def list_conflicts(words: np.ndarray, is_known: np.ndarray) -> Iterator[str]:
    """List what does not fit together in the words [P] that are known [P] -> lines; no lines: nothing."""
    # Find what most ranks call, of equals what the lowest rank calls.
    ranks = np.flatnonzero(is_known)
    calls, firsts, call_of_rank = np.unique(words[ranks] & _CALL, return_index=True, return_inverse=True)
    order = np.lexsort((firsts, -np.bincount(call_of_rank)))
    usual = order[0]

    # Name the others, and who has more tokens than it may.
    for call in order[1:]:
        others, rest = ranks[call_of_rank == call], ranks[call_of_rank == usual]
        yield (
            f"{name_ranks(others)} {unpack_notice(calls[call])} where "
            f"{name_ranks(rest)} {unpack_notice(calls[usual])}: all ranks of a group make the same calls"
        )
    if len(refusing := ranks[words[ranks] & _REFUSES > 0]):
        notice = max((unpack_notice(word) for word in words[refusing]), key=lambda notice: notice.rounds_left)
        yield (
            f"{name_ranks(refusing)} {notice} with more tokens than a call may have: {notice.rounds_left + 1} calls "
            "would do, or a larger max_tokens"
        )


def name_ranks(ranks: np.ndarray) -> str:
    """Format ranks as the subject of what they call."""
    return f"rank {ranks[0]} calls" if len(ranks) == 1 else f"ranks {format_ranges(ranks)} call"
