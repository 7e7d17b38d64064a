"""Ctrl-C and termination as an exception that is raised until it ends the program, but never during clean-up."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

REPEAT_SECONDS = 0.5  # between two exceptions, until one ends the block
TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # MPICH takes the last for itself
POSTPONED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = signal.Signals(number)

    def __str__(self):
        return "interrupted" if self.number == signal.SIGINT else f"ended by {name_signal(self.number)}"

    @property
    def status(self) -> int:
        """Return the exit status, as shells have it: 130 after Ctrl-C."""
        return 128 + self.number


def name_signal(number: int) -> str:
    """Format a signal's number and name: signal 15 (SIGTERM)."""
    return f"signal {number:d} ({signal.Signals(number).name})"


@contextlib.contextmanager
def repeated_interrupts() -> Iterator[None]:
    """Raise Interrupted in the block at Ctrl-C or SIGTERM, repeatedly until it ends the block. Main thread only.

    Numba loses one that comes while it determines the types of a call's arguments, and an import may convert one to
    another exception. Later signals are ignored: the process is ending.
    """
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        if number in TERMINATION_SIGNALS:
            received.append(number)
            ignore_signals()
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)
        raise Interrupted(received[0])

    # Install the handler, but leave ignored what the parent process ignored, as under nohup; never Ctrl-C.
    numbers = list_not_ignored(*TERMINATION_SIGNALS, signal.SIGALRM)
    before = {number: signal.signal(number, interrupt) for number in {signal.SIGINT, *numbers}}
    report, sys.unraisablehook = sys.unraisablehook, ignore_lost_interrupts(sys.unraisablehook)
    try:
        yield
    except Exception as error:
        if received:
            raise Interrupted(received[0]) from error
        raise
    finally:
        stop_repeating()
        sys.unraisablehook = report
        for number, handler in before.items():
            if not received or number == signal.SIGALRM:
                signal.signal(number, handler)


@contextlib.contextmanager
def postponed_interrupts(grace_seconds: float) -> Iterator[list[int]]:
    """Note the first signal that asks the block to end -> the list where it is noted. Within repeated_interrupts().

    The block is to end by itself. A second Ctrl-C, or grace_seconds after the first signal, raises Interrupted.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM or (asked and number == signal.SIGINT):
            ended_by = asked[0] if number == signal.SIGALRM else number
            restore_signals(before)
            before[ended_by](ended_by, frame)
        elif not asked:
            asked.append(number)
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)

    numbers = {signal.SIGINT, *list_not_ignored(*POSTPONED_SIGNALS, signal.SIGALRM)}
    before: dict[int, Any] = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        if signal.getsignal(signal.SIGALRM) == note:
            stop_repeating()
            restore_signals(before)


def restore_signals(handlers: dict[int, Any]) -> None:
    """Install the handlers of signals, by number."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def exit_on_signals(end: Callable[[Interrupted], None]) -> Iterator[None]:
    """Call end(Interrupted), which does not return, at a signal in the block: C++ code may not pass on an exception.

    So do imports of torch: its bindings import Python modules, and abort the process where one raises.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        ignore_signals()
        end(Interrupted(number))

    before = {number: signal.signal(number, interrupt) for number in list_not_ignored(*TERMINATION_SIGNALS)}
    try:
        yield
    finally:
        restore_signals(before)


def list_not_ignored(*numbers: int) -> list[int]:
    """List the signals that are not ignored."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def ignore_lost_interrupts(report: Callable) -> Callable:
    """Return a hook that ignores interrupts lost in a destructor: the next one comes soon."""
    return lambda lost: None if issubclass(lost.exc_type, KeyboardInterrupt) else report(lost)


def ignore_signals() -> None:
    """Ignore Ctrl-C and termination from now on."""
    for number in TERMINATION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_repeating() -> None:
    """Raise no further Interrupted: clean-up has begun."""
    signal.setitimer(signal.ITIMER_REAL, 0)
