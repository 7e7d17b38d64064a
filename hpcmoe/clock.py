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


NO_LANE = -1  # of what no micro-batch is the cause of
MOST_SPANS = 200_000  # that are kept, some 30 MB
LaneSpan = tuple[Timer, int, float, float]  # what was done, its lane, when it began and ended by time.perf_counter()


class Clock:
    """Adds up wall-clock seconds by timer."""

    def __init__(self) -> None:
        self.seconds: dict[Timer, float] = {}
        self.running: list[Timer] = []
        self.since = 0.0
        self.lane, self.pauses = NO_LANE, False  # whose work runs, and whether it only waits
        self.spans: list[LaneSpan] | None = None  # of all that ran, while somebody wants to know

    def measure(self, timer: Timer, lane: int | None = None, pauses: bool = False) -> "Measure":
        """Count the time of the with-block to this timer, and to no timer around it.

        lane: whose work it is, where that is not the lane around it; pauses: nothing is done in it.
        """
        return Measure(self, timer, lane, pauses)

    def charge(self) -> None:
        """Add the time since the last change to the timer that has been running."""
        now = time.perf_counter()
        if self.running:
            timer = self.running[-1]
            self.seconds[timer] = self.seconds.get(timer, 0.0) + now - self.since
            if self.spans is not None:
                self.add_span(Timer.WAITING if self.pauses else timer, now)
        self.since = now

    def add_span(self, timer: Timer, now: float) -> None:
        """Add the time since the last change to the spans, as a longer last one where that is of the same."""
        assert self.spans is not None  # who calls has looked
        if self.spans and self.spans[-1][:2] == (timer, self.lane) and self.spans[-1][3] == self.since:
            self.spans[-1] = timer, self.lane, self.spans[-1][2], now
        elif len(self.spans) < MOST_SPANS:
            self.spans.append((timer, self.lane, self.since, now))

    def switch(self, timers: list[Timer], lane: int = NO_LANE) -> list[Timer]:
        """Switch to another thread's timers, innermost last, and return those that were running."""
        self.charge()
        before, self.running, self.lane = self.running, timers, lane
        return before

    def pop_seconds(self) -> dict[Timer, float]:
        """Return the totals since the last call, and start again from zero."""
        self.charge()
        totals, self.seconds = self.seconds, {}
        return totals


class Measure:
    """A with-block whose time counts to a timer: written out, for each token that is decoded passes through dozens."""

    __slots__ = ("clock", "lane", "outer", "pauses", "timer")

    def __init__(self, clock: Clock, timer: Timer, lane: int | None = None, pauses: bool = False) -> None:
        self.clock, self.timer, self.lane, self.pauses = clock, timer, lane, pauses

    def __enter__(self) -> None:
        """Start to count."""
        clock = self.clock
        clock.charge()
        clock.running.append(self.timer)
        self.outer, clock.pauses = clock.lane, self.pauses
        if self.lane is not None:
            clock.lane = self.lane

    def __exit__(self, *_: object) -> None:
        """Count, and go back to the timer around it."""
        self.clock.charge()
        self.clock.running.pop()
        self.clock.pauses = False
        if self.lane is not None:
            self.clock.lane = self.outer
