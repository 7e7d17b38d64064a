"""The watcher names the first rank that died, also when it is asked late, who hangs and where; it is silent at ends."""

import contextlib
import faulthandler
import mmap
import os
import pathlib
import resource
import signal
import subprocess
import time

import pytest
from launch import HANG_SECONDS

from hpcmoe.pulse import Pulse
from hpcmoe.watch import Files
from hpcmoe.watcher import STACK_SIGNAL, describe_end, read_end


@pytest.fixture
def ranks():
    """Start three processes that stand for ranks."""
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def pulses():
    """Open the pages of three ranks in this process, whose stack signal is as before at the end."""
    opened = [Pulse() for _ in range(3)]
    yield opened
    faulthandler.unregister(STACK_SIGNAL)
    for pulse in opened:
        os.close(pulse.file)


def watch(ranks, pulses=None, launcher=None):
    """Start a watcher over processes, as start_watch does."""
    with contextlib.ExitStack() as opened:
        files = Files(opened)
        words = [files.open_launcher(launcher and launcher.pid)]
        for rank, process in enumerate(ranks):
            page = files.open_page(os.getpid(), pulses[rank].file) if pulses else -1
            words.append(f"{rank}:{process.pid}:{files.open_process(process.pid)}:{page}")
        return files.start_watcher("here", 3, words, stderr=subprocess.PIPE, text=True)


def await_signals(watcher):
    """Wait until a watcher takes signals: it then ignores Ctrl-C."""
    ignored = 0
    while not ignored & 1 << (signal.SIGINT - 1):
        status = pathlib.Path(f"/proc/{watcher.pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)


def test_names_the_first_that_died_even_before_it_runs(ranks):
    watcher = watch(ranks)
    watcher.send_signal(signal.SIGSTOP)  # it is late: all are dead when it looks
    for rank in (1, 0, 2):
        ranks[rank].kill()
        time.sleep(0.05)
    watcher.send_signal(signal.SIGCONT)
    (line,) = watcher.communicate(timeout=HANG_SECONDS)[1].splitlines()
    assert line.startswith("[rank 1 of 3, here]") and f"process {ranks[1].pid} " in line
    assert line.endswith("the first of this node's ranks: signal 9 (SIGKILL); killed, out of memory?")


def test_names_a_rank_that_was_gone_before_anything_was_opened(ranks):
    ranks[2].kill()
    ranks[2].wait()
    (line,) = watch(ranks).communicate(timeout=HANG_SECONDS)[1].splitlines()
    assert line.startswith("[rank 2 of 3, here]") and line.endswith("the first of this node's ranks")


def test_asked_by_a_failing_rank_it_names_who_was_dead_before(ranks):
    watcher = watch(ranks)
    await_signals(watcher)
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
    await_signals(watcher)
    watcher.send_signal(number)
    assert watcher.communicate(timeout=HANG_SECONDS)[1] == ""


def test_ends_the_ranks_whose_launcher_has_ended(ranks):
    launcher = subprocess.Popen(["sleep", "1000"])
    watcher = watch(ranks, launcher=launcher)
    launcher.kill()
    (line,) = watcher.communicate(timeout=HANG_SECONDS)[1].splitlines()
    assert line.endswith(f"process {launcher.pid}, which started ranks 0, 1, 2, ended: so do they")
    assert [rank.wait(HANG_SECONDS) for rank in ranks] == [-signal.SIGKILL] * 3
    launcher.wait()


def beat(pulses, watcher, seconds):
    """Count for ranks 0 and 2, until the watcher ends or the time is over; rank 1 stands still."""
    deadline = time.monotonic() + seconds
    while watcher.poll() is None and time.monotonic() < deadline:
        pulses[0].wait(1.0)
        pulses[2].beat()
        time.sleep(0.01)


def test_names_who_hangs_and_where_and_ends_it_last(ranks, pulses):
    for number, pulse in enumerate(pulses):
        pulse.begin_run(0.3)
        pulse.end_step(0.1)
        pulse.begin_step(7)
        pulse.work("compute", 3, number)
    watcher = watch(ranks, pulses)
    while not pulses[0].read_end():
        beat(pulses, watcher, 0.05)
    ranks[0].kill()
    ranks[2].kill()
    text = pulses[0].read_end()
    assert text == pulses[2].read_end()
    assert text.startswith("[rank 1 of 3, here] hangs: it neither works nor waits since ")
    assert text.endswith(f" s, in compute of layer 3, micro-batch 1, step 7; process {ranks[1].pid} is asleep")
    lines = watcher.communicate(timeout=HANG_SECONDS)[1].splitlines()
    assert len(lines) == 1 and text.partition("hangs")[2] in lines[0]  # a `sleep` has died of the stack signal


@pytest.mark.parametrize("reason", ["0: never", "is busy", "nobody waits", "is suspended with its launcher"])
def test_who_may_stand_still_is_waited_for(ranks, pulses, reason):
    launcher, busy = subprocess.Popen(["sleep", "1000"]), pulses[1].busy("compilation")
    for pulse in pulses:
        pulse.begin_run(0.0 if reason == "0: never" else 0.3)
        pulse.end_step(0.1)
    if reason == "is busy":
        busy.__enter__()
    if reason == "nobody waits":
        pulses[1].watch_gaps(0.3)
    if reason == "is suspended with its launcher":
        launcher.send_signal(signal.SIGSTOP)
        ranks[1].send_signal(signal.SIGSTOP)
    watcher = watch(ranks, pulses, launcher)
    await_signals(watcher)
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        pulses[0].wait(time.monotonic())
        pulses[2].beat()
        time.sleep(0.01)
    watcher.terminate()
    assert watcher.communicate(timeout=HANG_SECONDS)[1] == ""
    launcher.kill()
    launcher.wait()


def test_who_is_busy_and_stopped_hangs(ranks, pulses):
    for pulse in pulses:
        pulse.begin_run(0.3)
    ranks[1].send_signal(signal.SIGSTOP)
    watcher = watch(ranks, pulses)
    while not pulses[0].read_end():
        beat(pulses, watcher, 0.05)
    assert pulses[0].read_end().endswith(f"in the start; process {ranks[1].pid} is stopped by a signal")
    for rank in ranks:
        rank.kill()
    watcher.communicate(timeout=HANG_SECONDS)


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
