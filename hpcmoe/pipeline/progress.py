"""What goes on while this rank waits: messages of all dispatchers, and whatever else is to be poked."""

from collections.abc import Callable

from hpcmoe.clock import Clock, Timer
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.errors import ConfigError
from hpcmoe.pulse import open_pulse
from hpcmoe.wait import Backoff


class Progress:
    """The progress of a rank's exchanges, and of what is done beside them."""

    def __init__(self, dispatchers: list[TokenDispatcher], clock: Clock) -> None:
        self.dispatchers, self.clock = dispatchers, clock
        self.pokes: list[Callable[[], bool]] = []  # advance what else goes on, and return True if any of it has moved
        self.is_closed = False
        self.pulse = open_pulse()

    def poke(self) -> bool:
        """Advance messages and tasks without waiting, and return True if anything moved."""
        moved = [dispatcher.poke() for dispatcher in self.dispatchers]
        return any([*moved, *(poke() for poke in self.pokes)])

    def wait(self, timer: Timer, backoff: Backoff) -> None:
        """Pause, a few times at most, until something may have changed since the last poke."""
        with self.clock.measure(timer, pauses=True):
            if len(self.dispatchers) == 1:
                self.dispatchers[0].wait_for_change(backoff)
            else:
                backoff.pause()

    def drain(self) -> None:
        """Wait until this rank has done all that others want of it."""
        backoff = Backoff()
        with self.clock.measure(Timer.WAITING):
            while not all(dispatcher.is_idle for dispatcher in self.dispatchers):
                if self.poke():
                    backoff.reset()
                else:
                    self.wait(Timer.WAITING, backoff)

    def check_open(self) -> None:
        """Raise ConfigError after close()."""
        if self.is_closed:
            raise ConfigError("hpcmoe: this group is closed: its layers work inside of its `with` block alone")
