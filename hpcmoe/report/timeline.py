"""A timeline of some steps: what each lane of each rank did when, and the messages between them, on rank 0's clock.

The file is JSON in Chrome's Trace Event Format, which Perfetto opens too: processes are ranks, threads are lanes,
complete events ("X") are what was done, flow events ("s", "f") lead from a message's sender to its receiver.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcmoe.clock import NO_LANE, LaneSpan, Timer
from hpcmoe.comm.cuda import StreamSpan
from hpcmoe.errors import CheckpointError

_FIRST_STREAM = 10_000  # number of a GPU's first stream, beyond all lanes
_FIRST_MESSAGES = 5_000  # of the threads that show messages under way
_JOIN_SECONDS = 20e-6  # of two spans of one kind and lane, between which less than that went by
_MICRO = 1e6
TraceEvent = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """What a rank's clock is ahead of rank 0's, in seconds, as measured at two moments of its own."""

    moments: tuple[float, float]
    ahead: tuple[float, float]

    def to_root(self, moment: float) -> float:
        """Return a moment of this rank's clock by rank 0's, drift included."""
        first, last = self.moments
        share = (moment - first) / (last - first) if last > first else 0.0
        return moment - self.ahead[0] - share * (self.ahead[1] - self.ahead[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSpan:
    """One message of rows as a rank has seen it, by rank 0's clock."""

    sends: bool
    source: int  # ranks of the run
    target: int
    tag: int
    number: int  # among those of the same ranks and tag
    num_bytes: int
    begin: float
    end: float  # NaN where it had not ended

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Return what its sender and its receiver both know it by."""
        return self.source, self.target, self.tag, self.number


@dataclass(slots=True, kw_only=True)
class RankTrace:
    """What one rank did in the steps of the trace, by rank 0's clock."""

    rank: int
    host: str
    spans: list[LaneSpan]
    messages: list[MessageSpan] = field(default_factory=list)
    streams: list[StreamSpan] = field(default_factory=list)
    steps: list[tuple[int, float, float]] = field(default_factory=list)  # number, begin, end


def join_spans(spans: Iterable[LaneSpan]) -> Iterator[LaneSpan]:
    """Join spans of one kind and lane that follow each other almost at once; of time without a lane, all stay."""
    last: dict[int, LaneSpan] = {}
    for timer, lane, begin, end in spans:
        before = last.get(lane)
        if before is not None and before[0] == timer and begin - before[3] < _JOIN_SECONDS:
            last[lane] = timer, lane, before[2], end
            continue
        if before is not None:
            yield before
        last[lane] = timer, lane, begin, end
    yield from last.values()


def make_events(traces: Sequence[RankTrace]) -> Iterator[TraceEvent]:
    """Yield the events of some ranks' traces; times are microseconds since the first of all."""
    origin = min((span[2] for trace in traces for span in trace.spans), default=0.0)
    flows = match_messages(traces)
    numbers = {key: number for number, key in enumerate(flows, 1)}
    for trace in traces:
        yield from name_tracks(trace)
        for step, begin, end in trace.steps:
            yield make_slice(f"step {step}", "step", trace.rank, 0, (begin - origin, end - origin))
        for timer, lane, begin, end in join_spans(trace.spans):
            yield make_slice(str(timer), "lane", trace.rank, lane_track(lane), (begin - origin, end - origin))
        for name, stream, begin, end in trace.streams:
            yield make_slice(name, "gpu", trace.rank, _FIRST_STREAM + stream, (begin - origin, end - origin))

        # A message is a slice on a track of its direction, and an end of an arrow where both its ends are known.
        for message, track in spread_over_tracks(trace.messages):
            when = message.begin - origin, (message.end if message.end == message.end else message.begin) - origin
            other = message.target if message.sends else message.source
            yield {
                **make_slice(f"{'to' if message.sends else 'from'} rank {other}", "message", trace.rank, track, when),
                "args": {"bytes": message.num_bytes, "tag": message.tag},
            }
            if message.key in numbers:
                arrow = {"cat": "message", "name": "rows", "id": numbers[message.key], "pid": trace.rank, "tid": track}
                moment = round(_MICRO * (when[0] if message.sends else when[1]), 3)
                yield {"ph": "s" if message.sends else "f", "bp": "e", "ts": moment, **arrow}


def lane_track(lane: int) -> int:
    """Return the number of a lane's track; 0 is the steps', 1 that of what belongs to no lane."""
    return lane - NO_LANE + 1


def spread_over_tracks(messages: Iterable[MessageSpan]) -> Iterator[tuple[MessageSpan, int]]:
    """Yield messages with tracks on which no two overlap: slices of a track must lie in each other."""
    busy_until: dict[bool, list[float]] = {True: [], False: []}
    for message in sorted(messages, key=lambda message: message.begin):
        ends = busy_until[message.sends]
        track = next((track for track, end in enumerate(ends) if end <= message.begin), len(ends))
        ends[track : track + 1] = [message.end if message.end == message.end else message.begin]
        yield message, _FIRST_MESSAGES + 2 * track + (not message.sends)


def name_tracks(trace: RankTrace) -> Iterator[TraceEvent]:
    """Yield the names of a rank's tracks."""
    names = {0: "steps", 1: "outside lanes"}
    names |= {lane_track(lane): f"lane {lane}" for _, lane, _, _ in trace.spans if lane != NO_LANE}
    names |= {_FIRST_STREAM + stream: f"GPU stream {stream}" for _, stream, _, _ in trace.streams}
    names |= {
        track: "messages sent" if message.sends else "messages received"
        for message, track in spread_over_tracks(trace.messages)
    }
    about = {"ph": "M", "pid": trace.rank, "ts": 0}
    yield {**about, "tid": 0, "name": "process_name", "args": {"name": f"rank {trace.rank}, {trace.host}"}}
    yield {**about, "tid": 0, "name": "process_sort_index", "args": {"sort_index": trace.rank}}
    for track, name in names.items():
        yield {**about, "tid": track, "name": "thread_name", "args": {"name": name}}
        yield {**about, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}


def make_slice(name: str, category: str, rank: int, track: int, seconds: tuple[float, float]) -> TraceEvent:
    """Make a complete event, seconds (begin, end)."""
    begin, end = (round(_MICRO * moment, 3) for moment in seconds)
    return {
        "ph": "X", "name": name, "cat": category, "pid": rank, "tid": track, "ts": begin,
        "dur": round(max(end - begin, 0.0), 3),
    }  # fmt: skip


def match_messages(traces: Sequence[RankTrace]) -> dict[tuple[int, int, int, int], tuple[float, float]]:
    """Match each message's two ends -> by key, microseconds at which it was sent and had been received.

    What seems to have come before it left, by clocks that differ a little, is left out.
    """
    halves: dict[bool, dict[tuple[int, int, int, int], MessageSpan]] = {True: {}, False: {}}
    for trace in traces:
        for message in trace.messages:
            if message.end == message.end:
                halves[message.sends][message.key] = message
    sent, received = halves[True], halves[False]
    ends = {key: (_MICRO * sent[key].begin, _MICRO * received[key].end) for key in sent if key in received}
    return {key: (begin, end) for key, (begin, end) in ends.items() if begin <= end}


def compute_hidden_share(traces: Sequence[RankTrace]) -> float | None:
    """Compute which share of the transfers is hidden behind the experts' work -> 0 to 1, None without transfers.

    On each rank transfers go on while any message from or to it is under way, from its start at the sender to its
    arrival; hidden is what passes while the rank computes, of the shorter of the two: were a step nothing but these,
    1 - (step - longer) / shorter.
    """
    flows = match_messages(traces)
    hidden = possible = 0.0
    for trace in traces:
        keys = [message.key for message in trace.messages if message.key in flows]
        transfers = unite([(flows[key][0] / _MICRO, flows[key][1] / _MICRO) for key in keys])
        work = unite([(begin, end) for timer, _, begin, end in trace.spans if timer == Timer.COMPUTE])
        shorter = min(measure_union(transfers), measure_union(work))
        hidden += measure_union(transfers) + measure_union(work) - measure_union(unite([*transfers, *work]))
        possible += shorter
    return min(max(hidden / possible, 0.0), 1.0) if possible > 0 else None


def unite(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join intervals (begin, end) where they overlap -> disjoint ones in order."""
    united: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if united and begin <= united[-1][1]:
            united[-1] = united[-1][0], max(end, united[-1][1])
        else:
            united.append((begin, end))
    return united


def measure_union(intervals: Iterable[tuple[float, float]]) -> float:
    """Sum the lengths of disjoint intervals."""
    return float(sum(end - begin for begin, end in intervals))


def choose_ranks(num_ranks: int, most: int) -> list[int]:
    """Choose the ranks that a trace shows: all, or `most` of them, evenly spread; rank 0 always."""
    return sorted({int(rank) for rank in np.arange(min(num_ranks, most)) * num_ranks / min(num_ranks, most)})


def write_timeline(path: Path, traces: Sequence[RankTrace]) -> None:
    """Write the file; what is there is replaced whole. Raises CheckpointError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with gzip.open(partial, "wt", encoding="utf-8", compresslevel=5) as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for number, event in enumerate(make_events(traces)):
                file.write(",\n" * (number > 0) + json.dumps(event, separators=(",", ":")))
            file.write("\n]}\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
