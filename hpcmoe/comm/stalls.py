"""Ranks that have all waited for seconds, in different calls, wait for each other for ever: rank 0 raises an error.

A rank that waits for long sends rank 0 where it is. Once all have, rank 0 asks each whether that wait goes on: if all
say so, none was at work when it asked. Ranks in the same call may wait for as long as a hang takes (hpcmoe.pulse): then
a message is missing. A rank that works answers too, between two pieces; one that does not, though rank 0 waits for
twice as long as a hang takes, hangs with its node, whose watcher (hpcmoe.watcher) would else have named it. Where rank
0 itself does, the first rank of another node sees it.
"""

import contextlib
import math
import pathlib
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from mpi4py import MPI

from hpcmoe.comm.failures import PACKAGE, is_library, send_short
from hpcmoe.errors import ClusterError, share
from hpcmoe.messages import format_ranges
from hpcmoe.pulse import open_pulse
from hpcmoe.wait import barrier, broadcast, call_at_pauses, gather_to_all, wait_all

_LONG_SECONDS = 8.0  # after which a rank sends where it waits
_MORE_SECONDS = 10.0  # than a hang takes, until a rank that does not answer is one: its own watcher comes first
_CHECK_SECONDS = 0.1  # between two probes
_WORK_SECONDS = 0.5  # without a wait, after which a rank works
_END = "the end of the group"
_WITHOUT = ", without rows of "  # whose rows a place waits for
_WAITS, _ASKS, _STILL, _NO_MORE = range(4)  # tags: to rank 0, from it, and two answers


class Stalls:
    """Where the ranks of a group have waited for long, as one of them, the root, learns."""

    def __init__(self, comm: MPI.Comm, long_seconds: float = 0.0, root: int = 0) -> None:
        """comm: nobody else's messages are in it; long_seconds: until a rank sends where it is; 0: a hang's."""
        self.comm, self.root, self.next_check, self.long_seconds = comm, root, 0.0, long_seconds
        self.pulse, self.deputy = open_pulse(), cast("Stalls | None", None)  # of another node, for rank 0's
        self.begun = 0.0  # this rank's wait
        self.sent: float | None = None  # when the wait began of which the root knows
        self.places: dict[int, str] = {}  # on the root, by rank
        self.is_new, self.asked = False, 0.0  # of the places; when the root asked last
        self.has_sent = False  # anything
        self.answers: dict[int, bool] | None = None  # while the root asks, by rank: still in the same wait

    def check(self, begun: float) -> None:
        """Raise ClusterError on the root if all ranks wait, or one hangs. Not collective; looks every 0.1 s at most.

        begun: time.monotonic() at which this rank's wait began.
        """
        now = time.monotonic()
        if now < self.next_check:
            return
        self.next_check, self.begun = now + _CHECK_SECONDS, begun
        if self.deputy is not None:
            self.deputy.check(begun)
        if self.sent != begun and 0 < self.seconds < now - begun:
            self.sent = begun
            self.send([self.root], _WAITS, describe_wait())
        self.receive_all()
        if self.comm.rank == self.root:
            self.request_answers(now)

    def poke_answers(self) -> bool:
        """Send the root this rank's answers, if it has not waited for a while -> False: nothing has moved."""
        now = time.monotonic()
        if now >= self.next_check + _WORK_SECONDS:
            self.next_check, self.begun = now + _CHECK_SECONDS, 0.0
            self.receive_all()
            if self.deputy is not None:
                self.deputy.poke_answers()
        return False

    @property
    def seconds(self) -> float:
        """Return after how long a rank sends where it waits, 0: never."""
        return self.long_seconds or self.pulse.limit_seconds

    def sees_hang(self, now: float) -> bool:
        """Return True if this rank has waited as long as a hang takes, and no long work is due meanwhile."""
        return 0 < self.pulse.limit_seconds < now - self.begun and not self.pulse.is_busy

    def request_answers(self, now: float) -> None:
        """Request of all ranks whether they still wait, once all have for long, or while it seems that one hangs.

        Raises ClusterError where one does not answer in as much time again: its node's watcher would have named it.
        """
        hangs, limit = self.sees_hang(now), self.pulse.limit_seconds
        if self.answers is None:
            if (self.is_new and len(self.places) == self.comm.size) or (hangs and now - self.asked > limit):
                self.answers, self.asked, self.is_new = {}, now, False
                self.send(range(self.comm.size), _ASKS)
        elif hangs and now - self.asked > limit + _MORE_SECONDS:
            silent = [rank for rank in range(self.comm.size) if rank not in self.answers]
            raise ClusterError(
                f"{format_who(silent)} of {self.comm.size}: no answer for {now - self.asked:.0f} s, while others wait: "
                "hangs, or its node or network does"
            )

    def receive_all(self) -> None:
        """Receive what has come, and answer it; on the root, raise ClusterError if it was the last answer."""
        status = MPI.Status()
        while self.comm.Iprobe(status=status):
            self.receive(status)

    def receive(self, status: MPI.Status) -> None:
        """Receive a message, and answer it."""
        message = bytearray(status.Get_count(MPI.BYTE))
        rank, tag = status.Get_source(), status.Get_tag()
        self.comm.Recv([message, MPI.BYTE], rank, tag)
        self.process(rank, tag, bytes(message).rstrip(b"\0").decode(errors="replace"))

    def process(self, rank: int, tag: int, text: str) -> None:
        """Process what a rank has sent, and answer it."""
        if tag == _WAITS:
            self.places[rank], self.is_new = text, True
        elif tag == _ASKS:
            self.send([self.root], _STILL if self.begun == self.sent else _NO_MORE)
        elif self.answers is not None:
            self.answers[rank] = tag == _STILL
            if len(self.answers) == self.comm.size:
                self.end_round(self.answers)

    def end_round(self, answers: dict[int, bool]) -> None:
        """Raise ClusterError where all ranks still wait, in different calls, or in one for as long as a hang takes."""
        self.answers = None
        for rank, is_still in answers.items():
            if not is_still:
                self.places.pop(rank, None)
        if len(self.places) < self.comm.size:
            return
        places = [place for _, place in sorted(self.places.items())]
        if self.long_seconds and len({place.partition(_WITHOUT)[0] for place in places}) > 1:
            raise ClusterError(f"{format_places(places)}: all ranks of a group make the same calls")
        if self.sees_hang(time.monotonic()):
            raise ClusterError(f"{format_places(places)}: a message is missing")

    def send(self, ranks: Sequence[int], tag: int, text: str = "") -> None:
        """Send some ranks a message, whether they wait for it or not; this one may be among them."""
        others = [rank for rank in ranks if rank != self.comm.rank]
        if others:
            self.has_sent = True
            send_short(self.comm, text.encode(), others, tag)
        if len(others) < len(ranks):
            self.process(self.comm.rank, tag, text)

    def meet(self, call: str, poke: Callable[[], bool]) -> None:
        """Wait for all ranks to make the same call, with poke() meanwhile.

        Collective over the group. Raises ClusterError on all ranks where their calls differ.
        """
        own = zlib.crc32(call.encode())
        extremes = np.array([own, -own], np.int64)
        wait_all([self.comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX)], poke=poke)
        if extremes[0] != -extremes[1]:
            places = format_places(self.comm.allgather(describe_wait()))
            raise share(ClusterError(f"{places}: all ranks of a group make the same calls"))

    def close(self) -> None:
        """Free the communicator, unless a message may still be under way in it. Collective over the group."""
        if self.deputy is not None:
            self.deputy.close()
        has_sent = np.array([self.has_sent], np.uint8)
        wait_all([self.comm.Iallreduce(MPI.IN_PLACE, has_sent, MPI.MAX)])
        if not has_sent[0]:
            self.comm.Free()


@contextlib.contextmanager
def open_stalls(comm: MPI.Comm, long_seconds: float | None = None) -> Iterator[Stalls]:
    """Open what finds ranks that wait for each other. Collective over comm, both ends, but for an end by an exception.

    long_seconds: as Stalls takes it, 8 by default. Within open_failures(), by which the other ranks learn of the error.
    """
    barrier(comm)
    stalls, deputy = Stalls(comm.Dup(), _LONG_SECONDS if long_seconds is None else long_seconds), find_deputy(comm)
    if deputy is not None:
        stalls.deputy = Stalls(comm.Dup(), math.inf, deputy)
    with call_at_pauses(stalls.check):
        yield stalls
        barrier(stalls.comm)
    stalls.close()  # no rank sends any more


def find_deputy(comm: MPI.Comm) -> int | None:
    """Find the first rank that is not on rank 0's node, None where there is none. Collective over comm."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    leaders = sorted(set(gather_to_all(comm, broadcast(node, comm.rank))))
    node.Free()
    return leaders[1] if len(leaders) > 1 else None


def format_places(places: Sequence[str]) -> str:
    """Format who waits in which place, by rank."""
    ranks_of_place: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks_of_place.setdefault(place, []).append(rank)
    text = ", ".join(f"{format_who(ranks)} in {place}" for place, ranks in ranks_of_place.items())
    return f"all ranks wait for each other, {text}"


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
            called = _END if called in ("Group.finish", _END) else code.co_qualname
            if not at and called in ("Lanes.drive", "Lanes.advance_until_ready"):
                lane = frame.f_locals.get("lane") or frame.f_locals["self"].lanes[0]
                at = f", {lane.at[0]} of layer {lane.at[1]}, micro-batch {lane.micro_batch}" if lane.at else ""
                at += describe_absent(lane)
    return f"{called}{at}"


def describe_absent(lane: Any) -> str:
    """Format whose rows the stage is without that a lane waits in, "" where it does not know."""
    frame = lane.stages[0][1].gi_frame if lane.stages else None
    known = {} if frame is None else frame.f_locals
    handle = getattr(known.get("context"), "handle", None)
    if handle is None or not (missing := known["self"].dispatcher.find_missing(handle)):
        return ""
    is_part = known["self"].dispatcher.transport.size < MPI.COMM_WORLD.size
    return f"{_WITHOUT}{format_who(missing)}" + " of its expert-parallel group" * is_part
