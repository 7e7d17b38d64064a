"""Ranks that wait for each other for ever all learn who waits where; whoever computes is waited for."""

import re
import time

import pytest
from launch import mpirun

from hpcmoe.comm import stalls
from hpcmoe.comm.failures import open_failures
from hpcmoe.comm.stalls import format_places, open_stalls
from hpcmoe.errors import ClusterError, PeerError
from hpcmoe.pulse import open_pulse
from hpcmoe.wait import barrier, wait_all

SCRIPT = """
import sys, time
import torch
import hpcmoe
from hpcmoe.comm import stalls

stalls._LONG_SECONDS = 0.8
case, schedule, folder = sys.argv[1:]
torch.manual_seed(0)
with hpcmoe.open(schedule=schedule, in_flight=2) as group:
    last = group.rank == group.size - 1
    model = torch.nn.Sequential(*(hpcmoe.MoE(8, 16, 4, group=group) for _ in range(2)))

    def step(x):
        loss = model(x).square().mean()
        if not (case == "no backward" and last):
            loss.backward()
        return loss.detach()

    def train(num_micro_batches):
        list(group.lanes(step, torch.randn(num_micro_batches, 6, 8)))
        group.sum_gradients(model)

    if case == "sleeps":
        for seconds in (2.5, 0.0, 2.5):  # the last rank, then none, then the first, which asks
            time.sleep(seconds * (last or seconds == 0.0))
            train(2)
            last = group.rank == 0
        time.sleep(2.5 * last)
    elif case == "leaves":
        if not last:
            train(2)
    elif case == "saves" and last:
        group.save(folder, model)
    else:
        train(3 if case == "one more" and last else 2)
print("ended in order")
"""
WITHOUT = r"(, without rows of ranks? [\d, -]+)?"
EXCHANGE = rf"(MoE\.forward|Lanes\.work), \w+ of layer \d, micro-batch \d{WITHOUT}( \(train\.py:\d+\))?"
SUMS = r"Group\.sum_gradients \(train\.py:\d+\)"
PLACES = {  # of the last rank, and of the others
    "leaves": (r"the end of the group \(train\.py:\d+\)", EXCHANGE),
    "saves": (r"Group\.save \(train\.py:\d+\)", EXCHANGE),
    "one more": (EXCHANGE, SUMS),
    "no backward": (EXCHANGE, rf"\S+, \w+ of layer 1, micro-batch 0{WITHOUT} \(train\.py:\d+\)"),
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("stalls") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    ("case", "ranks", "schedule"),
    [
        ("leaves", 4, "arrival"),
        ("saves", 3, "overlap"),
        ("one more", 2, "serial"),
        pytest.param("no backward", 3, "serial", marks=pytest.mark.full),
        pytest.param("one more", 3, "arrival", marks=pytest.mark.full),
        pytest.param("leaves", 2, "overlap", marks=pytest.mark.full),
    ],
)
def test_all_ranks_end_with_who_waits_where(script, tmp_path, case, ranks, schedule):
    ended = mpirun(ranks, script, case, schedule, tmp_path / "saved", timeout_seconds=60)
    of_last, of_others = PLACES[case]
    who = "rank 0" if ranks == 2 else f"ranks 0-{ranks - 2}"
    told = rf"Error: .*all ranks wait for each other, {who} in {of_others}, rank {ranks - 1} in {of_last}: all ranks of"
    assert len(re.findall(told, ended.errors)) >= ranks, (told, ended.errors[-2000:])
    assert ended.status == 1 and ended.seconds < 30 and not ended.output, ended


def test_who_computes_for_long_is_waited_for(script, tmp_path):
    ended = mpirun(3, script, "sleeps", "overlap", tmp_path, timeout_seconds=60)
    assert ended.status == 0 and ended.output.count("ended in order") == 3 and not ended.errors, ended


def test_ranks_of_one_place_are_named_together():
    text = format_places(["loads", "save", "loads", "loads"])
    assert text == "all ranks wait for each other, ranks 0, 2-3 in loads, rank 1 in save"


@pytest.mark.mpi
def test_ranks_that_meet_for_different_calls_all_know_it(comm):
    if comm.size == 1:
        pytest.skip("a rank alone meets nobody")
    with open_failures(comm), open_stalls(comm) as opened:
        for _ in range(2):
            opened.meet("loads", lambda: False)
            with pytest.raises(ClusterError, match="all ranks wait for each other, .*: all ranks of a group make the"):
                meet_otherwise(opened) if comm.rank == 0 else opened.meet("loads", lambda: False)


def meet_otherwise(opened):
    """Meet for another call, at another line."""
    opened.meet("save", lambda: False)


@pytest.mark.mpi
def test_a_slow_end_leaves_no_message_for_whoever_opens_next(comm, monkeypatch):
    monkeypatch.setattr(stalls, "_LONG_SECONDS", 0.3)
    for _ in range(3):
        with open_failures(comm), open_stalls(comm):
            if comm.rank == 0:
                time.sleep(1.0)
        own = comm.Dup()  # takes the number of the first of the two communicators
        with open_failures(comm) as failures, open_stalls(comm) as opened:
            barrier(comm)
            assert failures.error is None and not opened.comm.Iprobe() and not failures.comm.Iprobe()
        own.Free()


@pytest.fixture
def limit():
    """Let a rank hang after half a second."""
    open_pulse().begin_run(0.5)
    open_pulse().end_step(0.1)
    yield
    open_pulse().set_limit(0.0)


def await_nothing(comm):
    """Wait for a message that nobody sends."""
    request = comm.Irecv(bytearray(1), comm.rank, 1)
    try:
        wait_all([request])
    finally:
        request.Cancel()
        request.Wait()


@pytest.mark.mpi
@pytest.mark.usefixtures("limit")
def test_ranks_that_all_wait_in_one_call_miss_a_message(comm):
    said = "in wait_all .test_stalls.*: a message is missing" if comm.rank == 0 else "message is missing"
    with pytest.raises((ClusterError, PeerError), match=said), open_failures(comm), open_stalls(comm, 0.0):
        await_nothing(comm)
    barrier(comm)


@pytest.mark.mpi
@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("silent", ["first", "last"])
def test_a_rank_that_does_not_answer_is_named_by_rank_0_or_its_deputy(comm, monkeypatch, silent):
    if comm.size == 1:
        pytest.skip("a rank alone meets nobody")
    rank = 0 if silent == "first" else comm.size - 1
    monkeypatch.setattr(stalls, "_MORE_SECONDS", 0.2)
    monkeypatch.setattr(stalls, "find_deputy", lambda _: 1 if silent == "first" else None)
    with (
        pytest.raises(
            (ClusterError, PeerError), match=rf"rank {rank} of {comm.size}: no answer for [12] s, while others"
        ),
        open_failures(comm),
        open_stalls(comm, 0.0),
    ):
        if comm.rank == rank:
            time.sleep(3.0)
        await_nothing(comm)
    barrier(comm)


@pytest.mark.mpi
@pytest.mark.usefixtures("limit")
def test_who_works_between_its_answers_is_waited_for(comm, monkeypatch):
    monkeypatch.setattr(stalls, "_MORE_SECONDS", 2.0)
    with open_failures(comm), open_stalls(comm, 0.0) as opened:
        deadline = time.monotonic() + 3.5
        while comm.rank == comm.size - 1 and time.monotonic() < deadline:
            opened.poke_answers()
            time.sleep(0.01)
        barrier(comm)
