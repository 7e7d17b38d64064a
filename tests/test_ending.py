"""A run that is asked to end, by a signal, the clock or a file, does so in order, and goes on from there."""

import os
import signal
import sys
import time

import pytest
from launch import HANG_SECONDS, MPIRUN, Running, mpirun
from mpi4py import MPI
from test_commands import main_command, series
from test_endings import find_rank

from hpcmoe.ending import STOP, Ending, end_in_order
from hpcmoe.errors import CheckpointError
from hpcmoe.interrupts import POSTPONED_SIGNALS, Interrupted, postponed_interrupts, repeated_interrupts
from hpcmoe.resuming import find_newest_whole
from hpcmoe.sections import RestartConfig
from hpcmoe.write.steps import list_checkpoints

STEPS = "6"
LONG = {"run.steps": "100000", "write.checkpoint_every": "3", "train.validate_every": "0"}


@pytest.fixture(autouse=True)
def own_signals():
    """Give the signals back to pytest after the test."""
    before = {number: signal.getsignal(number) for number in (*POSTPONED_SIGNALS, signal.SIGHUP, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", POSTPONED_SIGNALS)
def test_a_first_signal_only_asks_and_a_second_ctrl_c_ends(number):
    with pytest.raises(Interrupted) as ended, repeated_interrupts(), postponed_interrupts(60) as asked:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it
        assert asked == [number]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    assert ended.value.status == 130


def test_what_takes_longer_than_the_grace_is_ended_by_the_first_signal():
    begun = time.monotonic()
    with pytest.raises(Interrupted) as ended, repeated_interrupts(), postponed_interrupts(0.2):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)
    assert ended.value.status == 138 and time.monotonic() - begun < 10


def test_after_an_end_in_order_signals_act_as_before():
    with repeated_interrupts():
        outside = signal.getsignal(signal.SIGTERM)
        with postponed_interrupts(0.2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == outside
        time.sleep(0.4)  # no alarm is left


def test_the_clock_and_a_file_ask_the_rank_that_watches_them(tmp_path):
    restart = RestartConfig(wall_seconds=1e9, grace_seconds=1.0)
    with repeated_interrupts(), end_in_order(restart, tmp_path) as ending:
        assert not ending.asks()
        (tmp_path / STOP).touch()
        ending.looked = 0.0
        assert ending.find_reason() == f"{tmp_path / STOP} is there"
    assert not (tmp_path / STOP).exists()  # else the next start would end too
    with repeated_interrupts(), end_in_order(RestartConfig(wall_seconds=1.5, grace_seconds=1.4), tmp_path) as ending:
        assert "wall_seconds are over" in ending.find_reason()  # this process is older
    with repeated_interrupts(), end_in_order(RestartConfig(wall_seconds=1.5, grace_seconds=1.4), None) as ending:
        assert not ending.asks()


def test_all_end_when_one_is_asked():
    ending = Ending()
    ending.agree(0.0)
    assert not ending.is_agreed
    ending.agree(1.0)
    ending.agree(0.0)
    assert ending.is_agreed


def end_run_by(output, act, **settings):
    """Start a run of many steps, act on it once it trains -> how it ended."""
    running = Running(MPIRUN, "-n", 2, sys.executable, *main_command(output, {**LONG, **settings}))
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not list((output / "run").glob("checkpoint-*/master.h5")):
            assert time.monotonic() < deadline and running.process.poll() is None
            time.sleep(0.05)
        act(running)
        return running.wait()
    finally:
        running.kill()


@pytest.mark.parametrize(
    "act, why",
    [
        (lambda running, _: os.kill(find_rank(running, "1").pid, signal.SIGTERM), "rank 1: signal 15 (SIGTERM)"),
        (lambda running, _: os.kill(running.process.pid, signal.SIGUSR1), "signal 10 (SIGUSR1)"),
        pytest.param(lambda _, folder: (folder / STOP).touch(), "stop is there", marks=pytest.mark.full),
    ],
    ids=["a rank", "the launcher", "a file"],
)
def test_a_run_that_is_asked_ends_with_a_checkpoint_and_goes_on_with_the_same_losses(act, why, tmp_path):
    ended = end_run_by(tmp_path, lambda running: act(running, tmp_path / "run"))
    assert ended.status == 75 and why in ended.errors and "--resume auto goes on" in ended.errors, ended
    step = max(list_checkpoints(tmp_path / "run"))
    assert list(series(tmp_path, "train/loss")) == list(range(1, step + 1))  # the checkpoint is of the last step
    assert not (tmp_path / "run" / "run.lock").exists()

    more = {**LONG, "run.steps": str(step + 2)}
    again = mpirun(2, *main_command(tmp_path, more), "--resume", "auto")
    whole = mpirun(2, *main_command(tmp_path, {**more, "run.output": str(tmp_path / "whole")}))
    assert again.status == whole.status == 0, again
    assert series(tmp_path, "train/loss") == series(tmp_path / "whole", "train/loss")


def test_resume_auto_begins_goes_on_skips_what_is_damaged_and_ends(tmp_path):
    settings = {"run.steps": STEPS, "write.checkpoint_every": "2", "write.checkpoints_kept": "3"}
    command = [*main_command(tmp_path, settings), "--resume", "auto"]
    first = mpirun(1, *command)
    assert first.status == 0, first
    over = mpirun(1, *command)
    assert over.status == 0 and "nothing is left to do" in over.errors, over

    # Damage the newest: the one before it is taken, and nothing has moved away.
    losses = series(tmp_path, "train/loss")
    with open(tmp_path / "run" / "checkpoint-6" / "rank0000.h5", "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    again = mpirun(1, *command)
    assert again.status == 0 and "checkpoint-4, step 4" in again.errors and "checkpoint-6/rank0000.h5" in again.errors
    assert series(tmp_path, "train/loss") == losses and not (tmp_path / "run.1").exists()


def test_where_no_checkpoint_is_whole_nothing_begins_anew(tmp_path):
    assert (
        find_newest_whole(MPI.COMM_SELF, tmp_path) is None
        and find_newest_whole(MPI.COMM_SELF, tmp_path / "none") is None
    )
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        find_newest_whole(MPI.COMM_SELF, tmp_path)
