"""The steps of [run] trace, as all ranks saw them: recorded, brought to rank 0's clock, written by rank 0."""

import contextlib
import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.transport import MessageLog
from hpcmoe.config import RunConfig
from hpcmoe.errors import on_root
from hpcmoe.report.timeline import (
    Clocks,
    MessageSpan,
    RankTrace,
    choose_ranks,
    compute_hidden_share,
    write_timeline,
)
from hpcmoe.wait import broadcast, gather_to_all, wait_all

_NUM_PINGS = 20  # of each rank, the quickest counts
_TAG = 17
log = logging.getLogger(__name__)


class Tracing:
    """Records the steps that [run] trace names, and nothing of the others."""

    def __init__(self, run: RunConfig, mesh: Mesh, dispatcher: Any, device: Any) -> None:
        """dispatcher: with its clock and transport; device: a Device."""
        self.steps, self.path = run.traced_steps or range(0), Path(run.output, run.name, "trace.json.gz")
        self.world, self.group, self.dispatcher, self.device = mesh.world, mesh.group, dispatcher, device
        self.ranks = choose_ranks(mesh.world.size, run.trace_ranks)
        self.recording = contextlib.ExitStack()
        self.is_on = False
        self.hidden_share: float | None = None
        self.step_times = list[tuple[int, float, float]]()
        self.messages = MessageLog()
        self.streams: list[Any] = []
        self.ahead = list[tuple[float, float]]()  # a moment, and what this rank's clock was ahead of rank 0's then

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the step of the with-block where it is one of those. Collective over world at the first and last."""
        if number not in self.steps:
            yield
            return
        if not self.is_on:
            self.start()
        begin = time.perf_counter()
        yield
        self.step_times.append((number, begin, time.perf_counter()))
        if number == self.steps[-1]:
            self.finish()

    def start(self) -> None:
        """Start to record on the ranks that are shown, their clocks aligned. Collective over world."""
        self.is_on = True
        self.ahead.append(self.align())
        if self.world.rank in self.ranks:
            self.streams = self.recording.enter_context(self.device.record_streams())
            self.dispatcher.clock.spans = []
            self.dispatcher.transport.log = self.messages

    def finish(self) -> None:
        """Stop recording, and write the timeline, unless nothing was recorded. Collective over world."""
        if not self.is_on:
            return
        self.is_on = False
        self.dispatcher.clock.charge()
        spans, self.dispatcher.clock.spans = self.dispatcher.clock.spans or [], None
        self.dispatcher.transport.log = None
        self.recording.close()
        self.ahead.append(self.align())
        traces = self.gather(self.make_trace(spans))

        def write() -> float | None:
            write_timeline(self.path, traces)
            return compute_hidden_share(traces)

        self.hidden_share = on_root(self.world, write)
        log.info("%s: timeline of steps %d to %d on %d ranks, for ui.perfetto.dev",
                 self.path, self.steps[0], self.step_times[-1][0], len(self.ranks))  # fmt: skip

    def make_trace(self, spans: list[Any]) -> RankTrace:
        """Convert what this rank recorded to rank 0's clock. Collective over the group."""
        (first, ahead_first), (last, ahead_last) = self.ahead
        to_root = Clocks(moments=(first, last), ahead=(ahead_first, ahead_last)).to_root
        rank_of_peer, own = gather_to_all(self.group, self.world.rank), self.world.rank
        messages = []
        for sends, peer, tag, number, num_bytes, begin, end in self.messages.rows:
            ends = (own, rank_of_peer[int(peer)]) if sends else (rank_of_peer[int(peer)], own)
            messages.append(MessageSpan(
                sends=bool(sends), source=ends[0], target=ends[1], tag=int(tag), number=int(number),
                num_bytes=int(num_bytes), begin=to_root(begin), end=to_root(end),
            ))  # fmt: skip
        return RankTrace(
            rank=own,
            host=read_host_name(),
            spans=[(timer, lane, to_root(begin), to_root(end)) for timer, lane, begin, end in spans],
            messages=messages,
            streams=[(name, stream, to_root(begin), to_root(end)) for name, stream, begin, end in self.streams],
            steps=[(step, to_root(begin), to_root(end)) for step, begin, end in self.step_times],
        )

    def gather(self, own: RankTrace) -> list[RankTrace]:
        """Gather the traces of the ranks that are shown, one after the other, on rank 0. Collective over world."""
        if self.world.rank == 0:
            return [own, *(pickle.loads(self.receive_bytes(rank)) for rank in self.ranks[1:])]
        if self.world.rank in self.ranks:
            data = np.frombuffer(pickle.dumps(own), np.uint8)
            wait_all([self.world.Isend(np.array([len(data)]), 0, _TAG), self.world.Isend(data, 0, _TAG)])
        return []

    def receive_bytes(self, rank: int) -> bytes:
        """Receive a rank's trace as bytes."""
        size = np.zeros(1, np.int64)
        wait_all([self.world.Irecv(size, rank, _TAG)])
        data = np.empty(size[0], np.uint8)
        wait_all([self.world.Irecv(data, rank, _TAG)])
        return data.tobytes()

    def align(self) -> tuple[float, float]:
        """Measure what this rank's clock is ahead of rank 0's -> (moment, seconds). Collective over world."""
        ahead = align_clocks(self.world, self.ranks)
        return time.perf_counter(), ahead


def align_clocks(world: MPI.Comm, ranks: list[int]) -> float:
    """Measure by ping-pong what this rank's clock is ahead of rank 0's -> s; 0 on ranks that are not in `ranks`.

    Of several exchanges the quickest counts: half of its time is the most that the answer may be wrong by. Ranks take
    turns, so that none waits for rank 0 to answer another. Collective over world.
    """
    box, ahead = np.zeros(1), 0.0
    if world.rank == 0:
        for rank in ranks[1:]:
            answers = list[tuple[float, float]]()
            for _ in range(_NUM_PINGS):
                sent = time.perf_counter()
                wait_all([world.Isend(box, rank, _TAG)])
                wait_all([world.Irecv(box, rank, _TAG)])
                received = time.perf_counter()
                answers.append((received - sent, float(box[0]) - (sent + received) / 2))
            wait_all([world.Isend(np.array([min(answers)[1]]), rank, _TAG)])
    elif world.rank in ranks:
        for _ in range(_NUM_PINGS):
            wait_all([world.Irecv(box, 0, _TAG)])
            wait_all([world.Isend(np.array([time.perf_counter()]), 0, _TAG)])
        wait_all([world.Irecv(box, 0, _TAG)])
        ahead = float(box[0])
    broadcast(world, None)
    return ahead
