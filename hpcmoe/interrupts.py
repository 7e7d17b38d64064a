"""Ctrl-C and termination as an exception that gets out of whatever swallows it; what then tidies up is left alone."""

import contextlib
import signal
import sys
from collections.abc import Callable

REPEAT_SECONDS = 0.5  # between two exceptions, until one has got out
TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    """Return a signal's number and name: signal 15 (SIGTERM)."""
    return f"signal {number:d} ({signal.Signals(number).name})"


@contextlib.contextmanager
def repeated_interrupts():
    """Within, raise Interrupted at Ctrl-C or SIGTERM, again and again until it has got out: in the main thread alone.

    Numba loses one that comes while it looks at the types of a call's arguments, and an import may turn one into
    another exception. Once one has come, further signals are ignored: the process is ending.
    """
    received = []

    def interrupt(number, _):
        if number in TERMINATION_SIGNALS:
            received.append(number)
            ignore_signals()
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)
        raise Interrupted(received[0])

    # A signal that whoever started the process had ignored, as nohup does, stays ignored; Ctrl-C is asked for by hand.
    numbers = [
        n for n in (*TERMINATION_SIGNALS, signal.SIGALRM) if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    complain, sys.unraisablehook = sys.unraisablehook, ignore_lost_interrupts(sys.unraisablehook)
    try:
        yield
    except Exception as error:
        if received:
            raise Interrupted(received[0]) from error
        raise
    finally:
        stop_repeating()
        sys.unraisablehook = complain
        for number, handler in before.items():
            if not received or number == signal.SIGALRM:
                signal.signal(number, handler)


@contextlib.contextmanager
def exit_on_signals(end: Callable[[Interrupted], None]):
    """Within, have a signal call end(Interrupted), which does not return: code in C++ may not bear an exception.

    So it is as torch is imported: its bindings import Python's modules, and abort the process where one raises.
    """

    def interrupt(number, _):
        ignore_signals()
        end(Interrupted(number))

    before = {n: signal.signal(n, interrupt) for n in TERMINATION_SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_lost_interrupts(complain):
    """Return a hook that passes over interrupts lost in a destructor: the next one comes soon."""
    return lambda lost: None if issubclass(lost.exc_type, KeyboardInterrupt) else complain(lost)


def ignore_signals() -> None:
    """Ignore Ctrl-C and termination from now on."""
    for number in TERMINATION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_repeating() -> None:
    """Raise no further Interrupted: the last one has reached what tidies up."""
    signal.setitimer(signal.ITIMER_REAL, 0)
