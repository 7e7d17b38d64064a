"""Waiting without stealing the core: the one loop in which any rank waits for MPI."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

# Measured with 16 ranks on 2 cores: a GEMM beside 15 waiting ranks slows 1.1 times, a wake-up takes 1.2 ms.
# A blocking Recv there slowed the GEMM 8.9 times.
_YIELDS_BEFORE_SLEEP = 32  # that give the core to somebody
_AT_ONCE_SECONDS = 5e-6  # a yield that comes back so soon has given it to nobody,
_YIELDS_TO_NOBODY = 16  # and so many of these count as one
_FIRST_SLEEP_SECONDS = 50e-6
_LONGEST_SLEEP_SECONDS = 200e-6
_SLEEP_GROWTH = 1.3


class BackgroundTask(Protocol):
    """Work in the background that progresses when it is polled."""

    @property
    def done(self) -> bool:
        """Return True if nothing of it is left."""

    def poke(self) -> bool:
        """Advance without waiting. Return True if anything moved."""


_Task = TypeVar("_Task", bound=BackgroundTask)


_HOOKS: ContextVar[tuple[Callable[[float], object], ...]] = ContextVar("hooks", default=())


@contextlib.contextmanager
def call_at_pauses(hook: Callable[[float], object]) -> Iterator[None]:
    """Call hook(when the wait last moved, by time.monotonic()) at every pause of this thread's waits in the block.

    What it raises ends the wait.
    """
    _HOOKS.set((*_HOOKS.get(), hook))
    try:
        yield
    finally:
        _HOOKS.set(tuple(other for other in _HOOKS.get() if other is not hook))


class Backoff:
    """Yield the core a few times, more often while nobody else wants it, then sleep a little longer at each pause."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over with short pauses, as after each completion."""
        self.moved = time.monotonic()
        self.yields_left: float = _YIELDS_BEFORE_SLEEP
        self.sleep_seconds = _FIRST_SLEEP_SECONDS

    def pause(self) -> None:
        """Yield the core, or sleep; but first call what call_at_pauses has."""
        for hook in _HOOKS.get():
            hook(self.moved)
        if self.yields_left > 0:
            begin = time.perf_counter()
            os.sched_yield()
            alone = time.perf_counter() - begin < _AT_ONCE_SECONDS
            self.yields_left -= 1 / _YIELDS_TO_NOBODY if alone else 1
        else:
            time.sleep(self.sleep_seconds)
            self.sleep_seconds = min(self.sleep_seconds * _SLEEP_GROWTH, _LONGEST_SLEEP_SECONDS)


def poke_all(tasks: list[_Task]) -> bool:
    """Poke each task of a list, and drop those that are done. Return True if anything moved."""
    moved = False
    for task in tasks:
        moved |= task.poke()
    tasks[:] = [task for task in tasks if not task.done]
    return moved


def wait_all(
    requests: list[MPI.Request], timeout_seconds: float | None = None, poke: Callable[[], bool] | None = None
) -> bool:
    """Wait until every request is done, with poke() meanwhile. Return False if the time ran out first."""
    from mpi4py import MPI  # here, so that commands without ranks start without MPI

    backoff = Backoff()
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while (done := MPI.Request.Testsome(requests)) is not None:
        if done:
            backoff.reset()
        elif deadline is not None and time.monotonic() > deadline:
            return False
        elif poke is None or not poke():
            backoff.pause()
    return True


def until_done(requests: list[MPI.Request]) -> Iterator[bool]:
    """Yield False while any request is under way."""
    from mpi4py import MPI  # as above

    while not MPI.Request.Testall(requests):
        yield False


def barrier(comm: MPI.Comm, timeout_seconds: float | None = None) -> bool:
    """Wait for all ranks. Collective over comm. Return False if the time ran out first."""
    return wait_all([comm.Ibarrier()], timeout_seconds)


def broadcast(comm: MPI.Comm, value: Any, root: int = 0) -> Any:
    """Return root's value on every rank (pickled: for set-up alone). Collective over comm."""
    barrier(comm)  # early ranks wait here, and not inside the blocking bcast
    return comm.bcast(value, root)


def gather_to_all(comm: MPI.Comm, value: Any) -> list[Any]:
    """Return all ranks' values on every rank (pickled: for set-up alone). Collective over comm."""
    barrier(comm)
    return comm.allgather(value)
