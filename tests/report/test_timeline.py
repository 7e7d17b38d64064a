"""The timeline keeps to the rules of Chrome's format, its arrows go forward, and the hidden share is what overlaps."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.clock import Timer
from hpcmoe.errors import CheckpointError
from hpcmoe.report.timeline import (
    Clocks,
    MessageSpan,
    RankTrace,
    choose_ranks,
    compute_hidden_share,
    make_events,
    write_timeline,
)

KEYS = {"X": {"name", "cat", "pid", "tid", "ts", "dur"}, "M": {"name", "pid", "tid", "args"}}
KEYS |= dict.fromkeys("sf", {"name", "cat", "id", "pid", "tid", "ts"})


def make_message(sends, source, target, begin, end, number=0):
    return MessageSpan(
        sends=sends, source=source, target=target, tag=4, number=number, num_bytes=100, begin=begin, end=end
    )


def make_traces(compute=(0.0, 4.0), sent=(1.0, 3.0), received=(0.5, 3.5)):
    """Rank 0 sends rank 1 a message while both compute."""
    spans = [(Timer.DENSE, -1, -1.0, 0.0), (Timer.COMPUTE, 0, *compute)]
    return [
        RankTrace(
            rank=0, host="a", spans=spans, messages=[make_message(True, 0, 1, *sent)], steps=[(5, -1.0, 5.0)],
            streams=[("gemm", 7, 0.5, 0.7)],
        ),
        RankTrace(rank=1, host="b", spans=spans, messages=[make_message(False, 0, 1, *received)]),
    ]  # fmt: skip


def check_format(events):
    """Check events against the rules of the Trace Event Format."""
    slices, flows = {}, {}
    for event in events:
        assert set(event) >= KEYS[event["ph"]] and all(type(event[key]) is int for key in ("pid", "tid"))
        assert math.isfinite(event["ts"])
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] in "sf":
            flows.setdefault(event["id"], {})[event["ph"]] = event

    # Slices of a track do not overlap; each arrow has both ends, forward in time, each on a slice of its track.
    for of_track in slices.values():
        of_track.sort()
        assert all(before[1] <= after[0] + 0.01 for before, after in zip(of_track, of_track[1:], strict=False))
    for ends in flows.values():
        assert set(ends) == {"s", "f"} and ends["s"]["ts"] <= ends["f"]["ts"] and ends["f"]["bp"] == "e"
        for end in ends.values():
            of_track = slices[end["pid"], end["tid"]]
            assert any(begin - 0.01 <= end["ts"] <= over + 0.01 for begin, over in of_track)
    return slices, flows


def test_tracks_are_ranks_and_lanes_and_messages_are_arrows(tmp_path):
    write_timeline(tmp_path / "trace.json.gz", make_traces())
    with gzip.open(tmp_path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    slices, flows = check_format(events)
    assert {rank for rank, _ in slices} == {0, 1} and len(flows) == 1
    names = {event["args"]["name"] for event in events if event["name"] in ("process_name", "thread_name")}
    assert names >= {"rank 0, a", "rank 1, b", "lane 0", "outside lanes", "steps", "GPU stream 7", "messages sent"}
    assert min(event["ts"] for event in events) == 0
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"step 5", "compute", "gemm", "to rank 1"}


moments = st.tuples(st.floats(0, 9), st.floats(0, 9)).map(sorted)


@given(compute=moments, sent=moments, received=moments, others=st.lists(moments, max_size=5))
def test_whatever_comes_keeps_to_the_format(compute, sent, received, others):
    traces = make_traces(compute, sent, received)
    traces[0].messages += [make_message(True, 0, 2, *times, number=n) for n, times in enumerate(others)]
    traces[0].messages.append(make_message(True, 0, 1, 2.0, math.nan, number=1))
    check_format(list(make_events(traces)))
    share = compute_hidden_share(traces)
    assert share is None or 0 <= share <= 1


@pytest.mark.parametrize(
    ("compute", "sent", "share"),
    [
        ((0, 4), (1, 3), 1.0),
        ((0, 4), (4, 6), 0.0),
        ((0, 4), (2, 6), 0.5),
        ((1, 2), (0, 8), 1.0),
        ((0, 3), (2, 9), 1 / 3),
    ],
)
def test_the_hidden_share_is_what_overlaps_of_the_shorter(compute, sent, share):
    traces = make_traces(compute, sent, (0.0, sent[1]))
    assert compute_hidden_share(traces) == pytest.approx(share)
    (whole,) = {max(compute[1], sent[1]) - min(compute[0], sent[0])}
    work, transfers = compute[1] - compute[0], sent[1] - sent[0]
    assert 1 - (whole - max(work, transfers)) / min(work, transfers) == pytest.approx(share)  # as the bench has it


def test_without_messages_nothing_is_said_of_them():
    assert compute_hidden_share([RankTrace(rank=0, host="a", spans=[(Timer.COMPUTE, 0, 0.0, 1.0)])]) is None
    assert list(make_events([])) == []


@given(ahead=st.floats(-1e3, 1e3), drift=st.floats(-1e-4, 1e-4), moment=st.floats(0, 100))
def test_clocks_are_aligned_with_their_drift(ahead, drift, moment):
    def of_rank(moment):
        return moment + ahead + drift * moment

    clocks = Clocks(moments=(of_rank(0), of_rank(100)), ahead=(ahead, ahead + drift * 100))
    assert clocks.to_root(of_rank(moment)) == pytest.approx(moment, abs=1e-6)


@pytest.mark.parametrize(("size", "most"), [(1, 64), (4, 64), (64, 64), (65, 64), (4096, 64), (10, 3), (5, 1)])
def test_as_many_ranks_are_shown_as_may_be_rank_0_among_them(size, most):
    ranks = choose_ranks(size, most)
    assert len(ranks) == min(size, most) and ranks[0] == 0 and ranks[-1] < size
    assert np.ptp(np.diff(ranks)) <= 1 if len(ranks) > 2 else True


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"trace.json.gz: cannot be written: No such file"):
        write_timeline(tmp_path / "missing" / "trace.json.gz", make_traces())
