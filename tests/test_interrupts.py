"""Ctrl-C and SIGTERM get out of whatever swallows them, once, and leave what tidies up alone."""

import os
import signal
import sys
import time

import pytest
from launch import run

from hpcmoe import interrupts, start
from hpcmoe.interrupts import TERMINATION_SIGNALS, Interrupted, exit_on_signals, repeated_interrupts


@pytest.fixture(autouse=True)
def own_signals(monkeypatch):
    """Repeat soon, and give the signals back to pytest after the test."""
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0.02)
    before = {number: signal.getsignal(number) for number in (*TERMINATION_SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stay():
    """Wait for what comes; AssertionError when nothing does."""
    time.sleep(30)
    raise AssertionError


@pytest.mark.parametrize("number, status, words", [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by signal 15 (SIGTERM)"),
    (signal.SIGHUP, 129, "ended by signal 1 (SIGHUP)"),
])  # fmt: skip
def test_a_signal_is_one_exception_that_knows_its_status(number, status, words):
    with pytest.raises(Interrupted) as ended, repeated_interrupts():
        os.kill(os.getpid(), number)
        stay()
    assert ended.value.status == status and str(ended.value) == words


def test_one_that_is_swallowed_comes_again():
    swallowed = []
    with pytest.raises(Interrupted), repeated_interrupts():
        for _ in range(3):
            try:
                os.kill(os.getpid(), signal.SIGINT) if not swallowed else stay()
                stay()
            except Interrupted:
                swallowed.append(True)
        stay()
    assert len(swallowed) == 3


def test_one_that_was_turned_into_another_exception_is_an_interrupt_still():
    with pytest.raises(Interrupted), repeated_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            stay()
        except Interrupted as lost:
            raise ImportError("numpy: cannot be imported") from lost


def test_one_that_is_lost_in_a_destructor_comes_again_and_is_not_complained_of(capsys):
    class Doomed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            stay()

    hook = sys.unraisablehook
    with pytest.raises(Interrupted), repeated_interrupts():
        Doomed()
        stay()
    assert capsys.readouterr().err == "" and sys.unraisablehook is hook


def test_what_tidies_up_is_left_alone():
    with pytest.raises(Interrupted), repeated_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            stay()
        except Interrupted:
            interrupts.stop_repeating()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            raise
    time.sleep(0.1)


def test_without_a_signal_all_is_as_before():
    before = [signal.getsignal(number) for number in TERMINATION_SIGNALS]
    with pytest.raises(ZeroDivisionError), repeated_interrupts():
        _ = 1 / 0
    assert [signal.getsignal(number) for number in TERMINATION_SIGNALS] == before


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with repeated_interrupts():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("module", ["main", "place", "check"])
def test_ctrl_c_while_a_program_imports_is_one_line(module):
    """The moment is the import of NumPy, which each of them needs."""
    program = f"""
import importlib.abc, os, runpy, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["hpcmoe.{module}"]
runpy.run_module("hpcmoe.{module}", run_name="__main__")
"""
    ended = run(sys.executable, "-c", program)
    assert ended.status == 130 and ended.errors == "hpcmoe: interrupted\n" and ended.output == "", ended


@pytest.mark.parametrize(
    ("number", "rank", "status", "said"),
    [
        (signal.SIGINT, "0", 130, "hpcmoe: interrupted\n"),
        (signal.SIGINT, "1", 130, f"[rank 1, {os.uname().nodename}] interrupted\n"),
        (signal.SIGTERM, "0", 143, "hpcmoe: ended by signal 15 (SIGTERM)\n"),
        (signal.SIGTERM, "1", 143, f"[rank 1, {os.uname().nodename}] ended by signal 15 (SIGTERM)\n"),
        (signal.SIGHUP, "0", 129, "hpcmoe: ended by signal 1 (SIGHUP)\n"),
    ],
)
def test_a_signal_before_the_first_import_is_one_line_too(monkeypatch, capsys, number, rank, status, said):
    for seconds in ("_WAIT_FOR_ROOT_SECONDS", "DRAIN_SECONDS"):
        monkeypatch.setattr(start, seconds, 0.0)
    for launcher in start.LAUNCHERS:
        monkeypatch.delenv(launcher.rank, raising=False)
    heard, told = os.pipe()
    for key, value in {"PMI_RANK": rank, "PMI_FD": str(told), start.HYDRA_KEY: "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "_exit", sys.exit)
    start.prepare_process()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
        stay()
    assert ended.value.code == status and capsys.readouterr().err == said
    assert os.read(heard, 100) == b"cmd=abort exitcode=%d\n" % status  # else the others wait for it in MPI_Init
    os.close(heard)
    os.close(told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_where_nothing_may_raise_the_end_is_called(number):
    ends = []
    with repeated_interrupts():
        with exit_on_signals(ends.append):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert [end.number for end in ends] == [number]
        assert signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL)


def test_what_whoever_started_it_ignores_stays_ignored(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    start.prepare_process()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == start.exit_on_signal
