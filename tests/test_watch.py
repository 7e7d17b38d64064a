"""The watcher names the first rank that died, also when it is asked late, and is silent when all ends in order."""

import contextlib
import mmap
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
from launch import HANG_SECONDS

from hpcmoe.watch import WATCHER
from hpcmoe.watcher import describe_end, read_end


@pytest.fixture
def ranks():
    """Start three processes that stand for ranks."""
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def count_watched(pid):
    """Count the processes that a process watches; it may close any of its files meanwhile."""
    num_watched = 0
    for file in pathlib.Path("/proc", str(pid), "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            num_watched += "pidfd" in os.readlink(file)
    return num_watched


def watch(ranks):
    """Start a watcher over processes, and wait until it watches."""
    words = [f"{rank}:{process.pid}" for rank, process in enumerate(ranks)]
    command = [sys.executable, "-S", str(WATCHER), "here", "3", *words]
    watcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while count_watched(watcher.pid) < len(ranks):
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
    assert line.endswith("the first of this node's ranks: signal 9 (SIGKILL); killed, out of memory?")


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


def read_past_the_end(folder):
    """Read a page of a mapped file that has been cut off."""
    with (folder / "short").open("w+b") as file:
        file.truncate(10000)
        with mmap.mmap(file.fileno(), 10000) as mapped:
            file.truncate(0)
            mapped[5000]


ENDS = {
    "signal 15 (SIGTERM)": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "signal 11 (SIGSEGV)": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "signal 24 (SIGXCPU)": lambda _: os.kill(os.getpid(), signal.SIGXCPU),
    "signal 40": lambda _: os.kill(os.getpid(), 40),
    "signal 6 (SIGABRT)": lambda _: os.abort(),
    "signal 7 (SIGBUS)": read_past_the_end,
    "signal 9 (SIGKILL); killed, out of memory?": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "exit status 3": lambda _: os._exit(3),
    "exit status 0": lambda _: os._exit(0),
}


@pytest.mark.parametrize("said", ENDS)
def test_an_end_is_read_before_the_parent_asks_and_after(tmp_path, said):
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
            signal.signal(number, signal.SIG_DFL)  # of pytest's faulthandler
        ENDS[said](tmp_path)
        os._exit(99)
    file = os.pidfd_open(pid)
    os.waitid(os.P_PIDFD, file, os.WEXITED | os.WNOWAIT)
    assert describe_end(read_end(file, pid)) == f": {said}"
    os.waitpid(pid, 0)
    assert describe_end(read_end(file, pid)) in (f": {said}", "")  # Linux before 6.15 does not tell
    os.close(file)
