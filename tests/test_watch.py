"""The watcher names the first rank that died, also when it is asked late, and is silent when all ends in order."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from launch import HANG_SECONDS

from hpcmoe.watch import WATCHER


@pytest.fixture
def ranks():
    """Start three processes that stand for ranks."""
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def watch(ranks):
    """Start a watcher over processes, and wait until it watches."""
    words = [f"{rank}:{process.pid}" for rank, process in enumerate(ranks)]
    command = [sys.executable, "-S", str(WATCHER), "here", "3", *words]
    watcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    files = pathlib.Path("/proc", str(watcher.pid), "fd")
    while sum("pidfd" in os.readlink(file) for file in files.iterdir()) < len(ranks):
        time.sleep(0.01)
    time.sleep(0.1)  # from there to its wait
    return watcher


def test_names_the_first_that_died(ranks):
    watcher = watch(ranks)
    watcher.send_signal(signal.SIGSTOP)  # it is late: all are dead when it looks
    for rank in (1, 0, 2):
        ranks[rank].kill()
        time.sleep(0.05)
    watcher.send_signal(signal.SIGCONT)
    (line,) = watcher.communicate(timeout=HANG_SECONDS)[1].splitlines()
    assert line.startswith("[rank 1 of 3, here]") and f"process {ranks[1].pid} " in line


def test_asked_by_a_failing_rank_it_names_who_was_dead_before(ranks):
    watcher = watch(ranks)
    watcher.send_signal(signal.SIGSTOP)
    ranks[2].kill()
    time.sleep(0.05)
    watcher.send_signal(signal.SIGUSR1)
    watcher.send_signal(signal.SIGCONT)
    (line,) = watcher.communicate(timeout=HANG_SECONDS)[1].splitlines()
    assert line.startswith("[rank 2 of 3, here]")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_says_nothing_of_the_living(ranks, number):
    watcher = watch(ranks)
    watcher.send_signal(number)
    assert watcher.communicate(timeout=HANG_SECONDS)[1] == ""
