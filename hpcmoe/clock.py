"""Where the seconds of a step went: a running total for each timer, an inner stage's time taken off the outer's."""

import enum
import time


class Timer(enum.StrEnum):
    """What a step's seconds are reported under, in the order of the report."""

    DATA = "data"
    DENSE = "dense"
    ROUTE = "route"
    DISPATCH = "dispatch"
    COMPUTE = "compute"
    COMBINE = "combine"
    OPTIMIZER = "optimizer"
    WAITING = "waiting"


class Stage(enum.StrEnum):
    """A stage of a micro-batch: its name, the timer of its work, and the timer of the time spent waiting for it."""

    report_as: Timer
    wait_as: Timer

    DENSE = "dense", Timer.DENSE, Timer.DENSE
    ROUTE = "route", Timer.ROUTE, Timer.ROUTE
    DISPATCH = "dispatch", Timer.DISPATCH, Timer.DISPATCH
    COMPUTE = "compute", Timer.COMPUTE, Timer.DISPATCH
    COMBINE = "combine", Timer.COMBINE, Timer.COMBINE
    COMBINE_BACKWARD = "combine_backward", Timer.COMBINE, Timer.COMBINE
    COMPUTE_BACKWARD = "compute_backward", Timer.COMPUTE, Timer.DISPATCH
    ROUTE_BACKWARD = "route_backward", Timer.DENSE, Timer.COMBINE

    def __new__(cls, name: str, report_as: Timer, wait_as: Timer) -> "Stage":
        """Make a member whose value is its name."""
        member = str.__new__(cls, name)
        member._value_, member.report_as, member.wait_as = name, report_as, wait_as
        return member


class Clock:
    """Adds up wall-clock seconds by timer."""

    def __init__(self) -> None:
        self.seconds: dict[Timer, float] = {}
        self.running: list[Timer] = []
        self.since = 0.0

    def measure(self, timer: Timer) -> "Measure":
        """Count the time of the with-block to this timer, and to no timer around it."""
        return Measure(self, timer)

    def charge(self) -> None:
        """Add the time since the last change to the timer that has been running."""
        now = time.perf_counter()
        if self.running:
            timer = self.running[-1]
            self.seconds[timer] = self.seconds.get(timer, 0.0) + now - self.since
        self.since = now

    def switch(self, timers: list[Timer]) -> list[Timer]:
        """Switch to another thread's timers, innermost last, and return those that were running."""
        self.charge()
        before, self.running = self.running, timers
        return before

    def pop_seconds(self) -> dict[Timer, float]:
        """Return the totals since the last call, and start again from zero."""
        self.charge()
        totals, self.seconds = self.seconds, {}
        return totals


class Measure:
    """A with-block whose time counts to a timer: written out, for each token that is decoded passes through dozens."""

    __slots__ = ("clock", "timer")

    def __init__(self, clock: Clock, timer: Timer) -> None:
        self.clock, self.timer = clock, timer

    def __enter__(self) -> None:
        """Begin to count."""
        self.clock.charge()
        self.clock.running.append(self.timer)

    def __exit__(self, *_: object) -> None:
        """Count, and go back to the timer around it."""
        self.clock.charge()
        self.clock.running.pop()
