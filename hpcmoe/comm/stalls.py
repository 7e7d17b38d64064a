"""Ranks that have all waited for seconds, in different calls, wait for each other for ever: rank 0 raises an error.

A rank that waits for long sends rank 0 where it is. Once all have, rank 0 asks each whether that wait goes on: if all
say so, none was at work when it asked. A rank that computes looks for no messages, so it is never taken for waiting.
"""

import contextlib
import pathlib
import time
import traceback
from collections.abc import Iterator

from mpi4py import MPI

from hpcmoe.comm.failures import PACKAGE, is_library, send_short
from hpcmoe.errors import ClusterError
from hpcmoe.messages import format_ranges
from hpcmoe.wait import barrier, call_at_pauses

_LONG_SECONDS = 8.0  # after which a rank sends where it waits
_CHECK_SECONDS = 0.1  # between two probes
_WAITS, _ASKS, _STILL, _NO_MORE = range(4)  # tags: to rank 0, from it, and two answers


class Stalls:
    """Where the ranks of a group have waited for long."""

    def __init__(self, comm: MPI.Comm) -> None:
        """comm: nobody else's messages are in it."""
        self.comm, self.next_check = comm, 0.0
        self.sent: float | None = None  # when the wait began of which rank 0 knows
        self.places: dict[int, str] = {}  # on rank 0, by rank
        self.answers: dict[int, bool] | None = None  # while rank 0 asks, by rank: still in the same wait

    def check(self, begun: float) -> None:
        """Raise ClusterError on rank 0 if all ranks wait for each other. Not collective; looks every 0.1 s at most.

        begun: time.monotonic() at which this rank's wait began.
        """
        now = time.monotonic()
        if now < self.next_check:
            return
        self.next_check = now + _CHECK_SECONDS
        if now - begun > _LONG_SECONDS and self.sent != begun:
            self.sent = begun
            send_short(self.comm, describe_wait().encode(), [0], _WAITS)
        status = MPI.Status()
        while self.comm.Iprobe(status=status):
            self.receive(status, begun)
        if self.answers is None and len(self.places) == self.comm.size:
            self.answers = {}
            send_short(self.comm, b"", range(self.comm.size), _ASKS)

    def receive(self, status: MPI.Status, begun: float) -> None:
        """Receive a message, and answer it; on rank 0, raise ClusterError if it was the last answer."""
        message = bytearray(status.Get_count(MPI.BYTE))
        rank, tag = status.Get_source(), status.Get_tag()
        self.comm.Recv([message, MPI.BYTE], rank, tag)
        if tag == _WAITS:
            self.places[rank] = bytes(message).rstrip(b"\0").decode(errors="replace")
        elif tag == _ASKS:
            send_short(self.comm, b"", [0], _STILL if begun == self.sent else _NO_MORE)
        elif self.answers is not None:
            self.answers[rank] = tag == _STILL
            if len(self.answers) == self.comm.size:
                self.end_round(self.answers)

    def end_round(self, answers: dict[int, bool]) -> None:
        """Raise ClusterError where all ranks still wait, in different calls."""
        places, self.answers = dict(self.places), None
        for rank, is_still in answers.items():
            if not is_still:
                del self.places[rank]
        if len(self.places) < self.comm.size:
            return
        self.places.clear()
        ranks_of_place: dict[str, list[int]] = {}
        for rank, place in sorted(places.items()):
            ranks_of_place.setdefault(place, []).append(rank)
        if len(ranks_of_place) > 1:
            text = ", ".join(f"{format_who(ranks)} in {place}" for place, ranks in ranks_of_place.items())
            raise ClusterError(f"all ranks wait for each other, {text}: all ranks of a group make the same calls")


@contextlib.contextmanager
def open_stalls(comm: MPI.Comm) -> Iterator[Stalls]:
    """Open what finds ranks that wait for each other. Collective over comm, both ends, but for an end by an exception.

    Within open_failures(), by which the other ranks learn of the error.
    """
    barrier(comm)
    stalls = Stalls(comm.Dup())
    with call_at_pauses(stalls.check):
        yield stalls
        barrier(stalls.comm)
    stalls.comm.Free()


def format_who(ranks: list[int]) -> str:
    """Format some ranks: rank 2, or ranks 0-1."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {format_ranges(ranks)}"


def describe_wait() -> str:
    """Format what this thread waits in: the layer's stage if any, this package's function, the user's file:line."""
    called, at = "", ""
    for frame, line in traceback.walk_stack(None):
        code = frame.f_code
        if not is_library(code.co_filename):
            return f"{called}{at} ({pathlib.Path(code.co_filename).name}:{line})"
        if code.co_filename.startswith(f"{PACKAGE}/"):
            called = code.co_qualname
            lane = frame.f_locals.get("lane") if called == "Lanes.drive" else None
            at = at or (f", {lane.at[0]} of layer {lane.at[1]}, micro-batch {lane.micro_batch}" if lane else "")
    return f"{called}{at}"
