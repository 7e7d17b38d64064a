"""An end in order: what asks a run to end after a step, upon which its ranks agree in the sum of that step."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from hpcmoe.interrupts import name_signal, postponed_interrupts
from hpcmoe.sections import RestartConfig

STOP = "stop"  # the file in a run's folder
_LOOK_SECONDS = 1.0  # between two looks for it, which may be on a network's file system


class Ending:
    """What asks this rank to end: a signal; the clock and a file, where it watches them."""

    def __init__(self, asked: Sequence[int] = (), folder: Path | None = None, deadline: float | None = None) -> None:
        """asked: signals; folder: where a file `stop` may appear; deadline: by time.monotonic()."""
        self.asked, self.stop, self.deadline = asked, None if folder is None else folder / STOP, deadline
        self.is_agreed = False
        self.looked, self.has_stop = 0.0, False

    def find_reason(self) -> str | None:
        """Return what asks this rank to end, None where nothing does."""
        now = time.monotonic()
        if self.asked:
            return name_signal(self.asked[0])
        if self.deadline is not None and now > self.deadline:
            return "[restart] wall_seconds are over, less grace_seconds"
        if self.stop is not None and now - self.looked > _LOOK_SECONDS:
            self.looked, self.has_stop = now, self.has_stop or self.stop.exists()
        return f"{self.stop} is there" if self.has_stop else None

    def asks(self) -> bool:
        """Return True if this rank has been asked to end."""
        return self.find_reason() is not None

    def agree(self, num_asked: float) -> None:
        """Note how many ranks have been asked to end, the same number on all: if any, the run ends after this step."""
        self.is_agreed = self.is_agreed or num_asked > 0


@contextlib.contextmanager
def end_in_order(restart: RestartConfig, folder: Path | None) -> Iterator[Ending]:
    """Have signals in the block ask for an end in order -> Ending. Within repeated_interrupts().

    folder: of the run, on the one rank that is to watch it, and the clock; the file `stop` that asked is removed.
    """
    deadline = None
    if folder is not None and restart.wall_seconds > 0:
        age_seconds = time.time() - psutil.Process().create_time()
        deadline = time.monotonic() + restart.wall_seconds - restart.grace_seconds - age_seconds
    with postponed_interrupts(restart.grace_seconds) as asked:
        ending = Ending(asked, folder, deadline)
        yield ending
        if ending.has_stop and ending.stop is not None:
            ending.stop.unlink(missing_ok=True)
