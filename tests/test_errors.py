"""Ranks fail together where all can know why, and alone, loudly and at once, where only one knows."""

import signal
import textwrap
from types import SimpleNamespace

import pytest
from launch import mpirun

from hpcmoe.errors import (
    DRAIN_SECONDS,
    WAIT_FOR_ROOT_SECONDS,
    CheckpointError,
    ClusterError,
    ConfigError,
    attempt,
    exit_with,
    keep_on_root,
    on_all,
    on_root,
)
from hpcmoe.interrupts import TERMINATION_SIGNALS, Interrupted

PROGRAM = """
import time

from mpi4py import MPI

from hpcmoe import errors
from hpcmoe.errors import ClusterError, ConfigError, exit_with, on_all, on_root
from hpcmoe.wait import barrier

comm = MPI.COMM_WORLD
errors.EXIT_BARRIER_SECONDS = {exit_barrier_seconds}

def refuse():
    raise ConfigError("first error\\nsecond error")

def body():
{body}

try:
    body()
    barrier(comm)
except Exception as error:
    exit_with(comm, error, "node07")
"""


@pytest.fixture
def own_signals():
    """Give the signals that end a program back to pytest after the test."""
    before = {number: signal.getsignal(number) for number in TERMINATION_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fail(error):
    raise error


def run_failing(body, exit_barrier_seconds=5.0):
    """Run a program on three ranks that fails in body."""
    program = PROGRAM.format(
        body=textwrap.indent(textwrap.dedent(body), "    "), exit_barrier_seconds=exit_barrier_seconds
    )
    return mpirun(3, "-c", program)


@pytest.mark.mpi
def test_on_root_runs_on_rank_0_alone_and_tells_all(comm):
    ran_on = []
    assert on_root(comm, lambda: ran_on.append(comm.rank) or f"by {comm.rank}") == "by 0"
    assert ran_on == ([0] if comm.rank == 0 else [])


@pytest.mark.mpi
def test_what_is_kept_on_root_is_there_alone_and_its_error_is_everywhere(comm):
    assert keep_on_root(comm, lambda: f"of {comm.rank}") == ("of 0" if comm.rank == 0 else None)
    with pytest.raises(ConfigError, match="^no such file$") as failed:
        keep_on_root(comm, lambda: fail(ConfigError("no such file")))
    assert failed.value.shared


@pytest.mark.mpi
def test_on_root_fails_on_all_ranks_with_the_same_error(comm):
    with pytest.raises(ClusterError, match="^no such node$") as failed:
        on_root(comm, lambda: fail(ClusterError("no such node")))
    assert failed.value.shared


@pytest.mark.mpi
def test_on_all_gives_each_rank_its_own_result(comm):
    assert on_all(comm, lambda: comm.rank * 10) == comm.rank * 10


@pytest.mark.mpi
def test_on_all_fails_everywhere_with_the_lowest_failing_ranks_error(comm):
    first = comm.size // 2
    kinds = {first: CheckpointError}
    with pytest.raises(CheckpointError) as failed:
        on_all(comm, lambda: fail(kinds.get(comm.rank, ConfigError)("disk full")) if comm.rank >= first else "fine")
    assert str(failed.value) == f"[rank {first} of {comm.size}] disk full"
    assert failed.value.shared


def test_other_exceptions_pass_through_and_are_not_shared(comm):
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        on_root(comm, lambda: 1 / 0)
    assert attempt(lambda: 3) == (3, None)
    assert not ConfigError("fresh").shared


def test_a_shared_error_is_said_once_and_ends_all_with_2():
    ended = run_failing("on_root(comm, refuse)")
    assert ended.status == 2, ended
    assert ended.lines("hpcmoe:") == ["hpcmoe: first error", "hpcmoe: second error"], ended
    assert ended.lines("[rank") == [] and "Traceback" not in ended.errors, ended


def test_an_error_of_one_rank_that_all_were_told_is_said_once_too():
    ended = run_failing("on_all(comm, lambda: comm.rank == 1 and refuse())")
    assert ended.status == 2, ended
    assert ended.lines("hpcmoe:") == ["hpcmoe: [rank 1 of 3] first error", "hpcmoe: second error"], ended
    assert ended.lines("[rank") == [] and "Traceback" not in ended.errors, ended


def test_a_rank_that_does_not_follow_a_shared_error_is_aborted():
    body = """
        if comm.rank == 1:
            time.sleep(1000)
        errors.raise_or_return(None, ConfigError("gone"))
    """
    ended = run_failing(body, exit_barrier_seconds=0.5)
    assert ended.status == 2, ended
    assert ended.lines("hpcmoe:") == ["hpcmoe: gone"], ended


def test_an_error_of_one_rank_names_it_on_each_line_and_aborts_the_others():
    ended = run_failing("comm.rank == 1 and refuse()")
    assert ended.status == 2, ended
    assert ended.lines("[rank") == [f"[rank 1 of 3, node07] {nth} error" for nth in ("first", "second")], ended
    assert "Traceback" not in ended.errors, ended


def test_a_bug_shows_its_traceback_with_its_rank_on_each_line():
    ended = run_failing("comm.rank == 2 and [][3]")
    assert ended.status == 1, ended
    said = ended.lines("[rank 2 of 3, node07] ")
    assert said[0].endswith("Traceback (most recent call last):"), ended
    assert said[-1].endswith("IndexError: list index out of range"), ended
    assert len(said) > 3 and "Traceback" not in "".join(set(ended.lines("")) - set(said)), ended


@pytest.mark.parametrize(
    "error, status",
    [
        (ConfigError("bad"), 2),
        (ZeroDivisionError(), 1),
        (KeyboardInterrupt(), 130),
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGTERM), 143),
    ],
)
def test_what_was_said_has_time_to_come_out_before_all_are_aborted(monkeypatch, capsys, own_signals, error, status):
    """Of 150 runs whose ranks aborted at once, two lost every line."""
    heard = []

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr("hpcmoe.errors.time.sleep", lambda seconds: heard.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as ended:
        exit_with(SimpleNamespace(rank=0, size=2, Abort=end), error, "node07")
    (seconds, said), *rest = heard
    assert seconds == DRAIN_SECONDS and said.endswith("\n") and not rest and ended.value.code == status


@pytest.mark.parametrize(
    "number, words", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by signal 15 (SIGTERM)")]
)
def test_an_interrupt_is_rank_0s_to_tell_and_another_rank_speaks_when_it_does_not(
    monkeypatch, capsys, own_signals, number, words
):
    waited = []

    def end(status):
        waited.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("hpcmoe.errors.time.sleep", waited.append)
    for rank, said in ((0, f"hpcmoe: {words}\n"), (1, f"[rank 1 of 2, node07] {words}\n")):
        with pytest.raises(SystemExit):
            exit_with(SimpleNamespace(rank=rank, size=2, Abort=end), Interrupted(number), "node07")
        assert capsys.readouterr().err == said
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert waited == [DRAIN_SECONDS, 128 + number, WAIT_FOR_ROOT_SECONDS, DRAIN_SECONDS, 128 + number]
