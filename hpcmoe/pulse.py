"""The pulse of this process: it counts what is done, and says what that is, where the node's watcher reads it."""

import contextlib
import faulthandler
import functools
import mmap
import os
from collections.abc import Iterator

from hpcmoe.watcher import (
    AWAITED,
    BUSY,
    COUNT,
    ENDS,
    LAYER,
    LIMIT_MS,
    MICRO_BATCH,
    NAME,
    PAGE_BYTES,
    STACK_SIGNAL,
    STEP,
    TEXT,
    WAITS_SINCE_MS,
)

_START_SECONDS = 600.0  # of a hang while no step has been measured
_LEAST_SECONDS, _STEPS = 60.0, 20.0  # of a hang afterwards: so many of the slowest step, but not less than these
_MOST_SECONDS = 1e9
_NAME_BYTES = NAME.stop - NAME.start


class Pulse:
    """The page that the watcher reads (hpcmoe.watcher), and what sees to it that it has an entry."""

    def __init__(self) -> None:
        self.file: int | None = None  # None: nobody reads it
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
            self.file = os.memfd_create("hpcmoe-pulse")
            os.ftruncate(self.file, PAGE_BYTES)
            os.lseek(self.file, PAGE_BYTES, os.SEEK_SET)
            faulthandler.register(STACK_SIGNAL, self.file, all_threads=True)
        self.map = mmap.mmap(-1 if self.file is None else self.file, PAGE_BYTES)
        self.words = memoryview(self.map).cast("q")
        self.at = "", 0, 0  # stage, layer and micro-batch of what was last worked on
        self.slowest_seconds, self.sets_limit = 0.0, False
        self.name("the program's start")

    def beat(self) -> None:
        """Count a piece of work."""
        self.words[COUNT] += 1

    def wait(self, moved: float) -> None:
        """Count a look while this process waits, since `moved` by time.monotonic()."""
        self.words[COUNT] += 1
        self.words[WAITS_SINCE_MS] = int(moved * 1000)

    def work(self, stage: str, layer: int, micro_batch: int) -> None:
        """Count a piece of work of a stage."""
        self.words[COUNT] += 1
        if (stage, layer, micro_batch) != self.at:
            self.at = stage, layer, micro_batch
            self.map[NAME] = stage.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
            self.words[LAYER], self.words[MICRO_BATCH], self.words[WAITS_SINCE_MS] = layer, micro_batch, 0

    def name(self, what: str) -> None:
        """Record what is done from now on, outside the layers."""
        self.work(what, -1, 0)

    def watch_gaps(self, seconds: float) -> None:
        """Set after how many seconds without a count this process hangs, if another rank waits meanwhile.

        0: never. What lies between two calls of a library is its user's.
        """
        self.words[AWAITED] = True
        self.set_limit(seconds)

    def begin_run(self, hang_seconds: float | None) -> None:
        """Start a run, busy until its first step is over; None: the limit comes from the steps' times."""
        self.slowest_seconds, self.sets_limit = 0.0, hang_seconds is None
        self.words[AWAITED], self.words[BUSY] = False, 1
        self.name("the start")
        self.set_limit(_START_SECONDS if hang_seconds is None else hang_seconds)

    def begin_step(self, step: int) -> None:
        """Start a step."""
        self.words[STEP] = step
        self.name("the step's begin")

    def end_step(self, seconds: float) -> None:
        """End a step that has taken some seconds: whatever is compiled has been."""
        self.words[BUSY] = 0
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        if self.sets_limit:
            self.set_limit(max(_LEAST_SECONDS, _STEPS * self.slowest_seconds))

    def end_run(self) -> None:
        """End the steps: what follows may take long."""
        self.words[BUSY] = 1
        self.name("the end of the run")

    @property
    def limit_seconds(self) -> float:
        """Return after how long this process hangs, 0 where that is not looked for."""
        return self.words[LIMIT_MS] / 1000

    @property
    def is_busy(self) -> bool:
        """Return True if this process may take long without a sign."""
        return self.words[BUSY] > 0

    def set_limit(self, seconds: float) -> None:
        """Set after how many seconds without a count this process hangs, 0: never."""
        self.words[LIMIT_MS] = int(min(seconds, _MOST_SECONDS) * 1000)
        self.beat()

    def read_end(self) -> str:
        """Return why the watcher wants this process to end, "" where it does not."""
        num_bytes = self.words[ENDS]
        return bytes(self.map[TEXT.start : TEXT.start + num_bytes]).decode(errors="replace") if num_bytes else ""

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Announce to the watcher that the block may take long without a sign: a load, a checkpoint, a compilation."""
        before = self.at
        self.words[BUSY] += 1
        self.name(what)
        try:
            yield
        finally:
            self.words[BUSY] -= 1
            self.work(*before)


@functools.cache
def open_pulse() -> Pulse:
    """Return the pulse of this process, which begins at the first call."""
    return Pulse()


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Announce to the watcher that the block, or function, may take long without a sign (Pulse.busy)."""
    with open_pulse().busy(what):
        yield
