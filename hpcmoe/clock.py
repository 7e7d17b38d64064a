"""Where the seconds of a step went: one running total a stage, the inner stage's time taken off the outer's."""

import contextlib
import time


class Clock:
    """Adds up wall-clock seconds by stage name."""

    def __init__(self):
        self.seconds = {}
        self.running = []
        self.since = 0.0

    @contextlib.contextmanager
    def stage(self, name):
        """Count the time of the with-block to this stage, and to no stage around it."""
        self.charge()
        self.running.append(name)
        try:
            yield
        finally:
            self.charge()
            self.running.pop()

    def charge(self):
        """Book the time since the last change to the stage that has been running."""
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def pop_seconds(self):
        """Return the totals since the last call -> dict stage: seconds, and start again from zero."""
        self.charge()
        totals, self.seconds = self.seconds, {}
        return totals
