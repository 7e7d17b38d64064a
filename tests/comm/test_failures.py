"""A rank that leaves by an exception does not keep the others waiting: all end, each with the reason, in any case."""

import re

import numpy as np
import pytest
from launch import mpirun

from hpcmoe.comm.failures import find_user_line, format_failure, list_neighbours, open_failures
from hpcmoe.errors import ClusterError, PeerError
from hpcmoe.wait import Backoff, barrier, call_at_pauses, wait_all

SCRIPT = """
import os, signal, sys, time
from mpi4py import MPI
from hpcmoe.comm.failures import open_failures
from hpcmoe.errors import ClusterError
from hpcmoe.wait import barrier, wait_all

world = MPI.COMM_WORLD
with open_failures(world) as failures:
    failures.place = "dispatch of layer 2"
    if world.rank == 1:
        if sys.argv[1] == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        if sys.argv[1] == "shared":  # as by the ranks of a smaller group
            error = ClusterError("no such layer")
            error.shared = True
            raise error
        raise ValueError("no\\nnumber")
    if sys.argv[2] == "loop":
        while True:
            failures.check()
    if sys.argv[2] == "barrier":
        barrier(world)
    if sys.argv[2] == "receive":
        wait_all([world.irecv(source=1, tag=7)])
"""


@pytest.mark.parametrize("waits", ["loop", "barrier", "receive", "close"])
@pytest.mark.parametrize(
    ("leaves", "reason"),
    [("raise", r"ValueError: no"), ("interrupt", "KeyboardInterrupt"), ("shared", "ClusterError: no such layer")],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.full), 4])
def test_all_ranks_end_with_the_reason(tmp_path, ranks, leaves, reason, waits):
    """Whatever they wait for; no rank aborts another, and MPI ends by itself."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    ended = mpirun(ranks, script, leaves, waits, timeout_seconds=60)
    told = rf"PeerError: \[rank 1 of {ranks}, \S+\] {reason} \(train.py:\d+\); this rank was in dispatch of layer 2$"
    assert len(re.findall(told, ended.errors, re.MULTILINE)) == ranks - 1, ended
    if leaves != "interrupt":  # after which Python ends by the signal, and mpirun may print what it thinks of that
        assert ended.status == 1, ended


def raised(error):
    """An error as it is caught."""
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_reason_is_one_line_that_fits_into_a_message():
    long = format_failure("[rank 3 of 16, node07]", raised(ValueError("é" * 600)), "")
    assert len(long) <= 512 and re.search(rb"\.\.\. \(test_failures\.py:\d+\)$", long)
    text = format_failure("[rank 3 of 16, node07]", ClusterError("one\ntwo\x1b"), "combine of layer 3").decode()
    assert text == "[rank 3 of 16, node07] ClusterError: one (combine of layer 3)"
    assert format_failure("[rank 0 of 2, n]", KeyboardInterrupt(), "") == b"[rank 0 of 2, n] KeyboardInterrupt"


def test_the_line_is_the_users_own_and_not_the_librarys():
    def fail():
        np.linalg.inv(np.zeros((2, 2)))

    with pytest.raises(np.linalg.LinAlgError) as caught:
        fail()
    assert find_user_line(caught.tb) == f"test_failures.py:{fail.__code__.co_firstlineno + 1}"


@pytest.mark.parametrize("size", [1, 2, 3, 16, 1000])
def test_what_neighbours_forward_reaches_all_in_few_steps(size):
    known, steps = {5 % size}, 0
    while len(known) < size:
        known |= {other for rank in known for other in list_neighbours(rank, size)}
        steps += 1
    assert steps <= size.bit_length() and 5 % size not in list_neighbours(5 % size, size)


def test_a_hook_is_called_at_pauses_in_its_block_alone():
    calls = []
    with call_at_pauses(lambda _: calls.append("outer")):
        with call_at_pauses(lambda _: calls.append("inner")):
            Backoff().pause()
        Backoff().pause()
    Backoff().pause()
    assert calls == ["outer", "inner", "outer"]


@pytest.mark.mpi
def test_a_block_that_ends_in_order_says_nothing(comm):
    for _ in range(3):  # one after the other, and in one another
        with open_failures(comm) as outer, open_failures(comm) as inner:
            outer.check()
            inner.check()
            barrier(comm)


@pytest.mark.mpi
def test_failures_are_raised_again_at_every_wait_and_do_not_reach_the_next_block(comm):
    if comm.size == 1:
        pytest.skip("a rank alone has no peers")

    def work():
        with open_failures(comm) as failures:
            if comm.rank == comm.size - 1:
                raise KeyError("a")
            for _ in range(2):
                with pytest.raises(PeerError, match=rf"\[rank {comm.size - 1} of {comm.size}, \S+\] KeyError: 'a'"):
                    wait_all([failures.comm.Irecv(bytearray(1), comm.rank, 99)])
            raise failures.error

    with pytest.raises((PeerError, KeyError)):
        work()
    with open_failures(comm) as failures:
        barrier(comm)
        assert failures.error is None
