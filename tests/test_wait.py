"""Waiting gives the core away, ends as soon as there is something, and ends in time when there is nothing."""

import itertools
import time
from types import SimpleNamespace

import mpi4py
import numpy as np
import pytest

from hpcmoe import wait


@pytest.fixture
def pauses(monkeypatch):
    """Record each pause instead of taking it: 0 for a yield, which others use, else the seconds of a sleep."""
    taken, clock = [], itertools.count(0.0, 1e-3)
    monkeypatch.setattr(wait.os, "sched_yield", lambda: taken.append(0.0))
    monkeypatch.setattr(wait.time, "sleep", taken.append)
    monkeypatch.setattr(wait.time, "perf_counter", lambda: next(clock))
    return taken


def test_pauses_are_yields_then_sleeps_that_grow_to_a_bound(pauses):
    backoff = wait.Backoff()
    for _ in range(40):
        backoff.pause()
    assert pauses[:32] == [0.0] * 32
    assert pauses[32:] == pytest.approx([50e-6, 65e-6, 84.5e-6, 109.85e-6, 142.805e-6, 185.6465e-6, 200e-6, 200e-6])


def test_while_nobody_wants_the_core_sleep_comes_late(pauses, monkeypatch):
    monkeypatch.setattr(wait.time, "perf_counter", lambda: 0.0)
    backoff = wait.Backoff()
    for _ in range(32 * 16 + 1):
        backoff.pause()
    assert pauses == [0.0] * (32 * 16) + [50e-6]


def test_after_a_completion_pauses_are_short_again(pauses):
    backoff = wait.Backoff()
    for _ in range(40):
        backoff.pause()
    backoff.reset()
    for _ in range(33):
        backoff.pause()
    assert pauses[40:] == [0.0] * 32 + [50e-6]


def test_waiting_for_all_pauses_until_nothing_is_active_and_shortly_after_each_completion(pauses, monkeypatch):
    answers = iter([[]] * 34 + [[0]] + [[]] * 33 + [None])
    monkeypatch.setattr(
        mpi4py, "MPI", SimpleNamespace(Request=SimpleNamespace(Testsome=lambda requests: next(answers)))
    )
    assert wait.wait_all([]) is True
    assert pauses == [0.0] * 32 + [50e-6, pytest.approx(65e-6)] + [0.0] * 32 + [50e-6]


def receives_from_self(comm, count):
    """Post receives of one number each, tags 0, 1, ... -> (requests, arrays)."""
    arrays = [np.zeros(1) for _ in range(count)]
    return [comm.Irecv(array, comm.rank, tag) for tag, array in enumerate(arrays)], arrays


def send_to_self(comm, tag):
    comm.Send(np.full(1, tag + 0.5), comm.rank, tag)


def test_wait_all_says_whether_all_came_in_time(comm):
    requests, arrays = receives_from_self(comm, 2)
    send_to_self(comm, 0)
    started = time.monotonic()
    assert wait.wait_all(requests, timeout_seconds=0.2) is False
    assert 0.2 <= time.monotonic() - started < 100.0
    send_to_self(comm, 1)
    assert wait.wait_all(requests) is True
    assert [array[0] for array in arrays] == [0.5, 1.5]
    assert wait.wait_all([]) is True


def test_waiting_leaves_most_of_the_core_to_others(comm):
    requests, _ = receives_from_self(comm, 1)
    started, busy = time.monotonic(), time.process_time()
    wait.wait_all(requests, timeout_seconds=0.5)
    assert time.process_time() - busy < 0.5 * (time.monotonic() - started)
    send_to_self(comm, 0)
    wait.wait_all(requests)


@pytest.mark.mpi
def test_a_barrier_holds_until_the_last_rank_or_gives_up(comm):
    if comm.rank > 0:
        assert not wait.barrier(comm, 0.05)
        comm.send("gave up", 0)
    else:
        assert [comm.recv(source=rank) for rank in range(1, comm.size)] == ["gave up"] * (comm.size - 1)
        assert wait.barrier(comm)  # the others are in it already


@pytest.mark.mpi
def test_values_reach_every_rank_from_any_root(comm):
    for root in range(comm.size):
        assert wait.broadcast(comm, {"from": comm.rank}, root) == {"from": root}
    assert wait.gather_to_all(comm, comm.rank**2) == [rank**2 for rank in range(comm.size)]
