"""Ranks that hang, as the others see it: a rank that waits looks whether the node's watcher has named one."""

import contextlib
from collections.abc import Iterator

from mpi4py import MPI

from hpcmoe.environment import read_environment
from hpcmoe.errors import ClusterError
from hpcmoe.pulse import open_pulse
from hpcmoe.start import find_host, find_launcher_process
from hpcmoe.wait import barrier, call_at_pauses
from hpcmoe.watch import find_watch, start_watch


@contextlib.contextmanager
def counted_waits() -> Iterator[None]:
    """Count each look of this thread's waits in the block for the watcher, and raise ClusterError where it says so."""
    pulse = open_pulse()

    def look(moved: float) -> None:
        pulse.wait(moved)
        if text := pulse.read_end():
            raise ClusterError(f"ends with a rank that hangs: {text}")

    with call_at_pauses(look):
        yield


@contextlib.contextmanager
def watched_group(comm: MPI.Comm, hang_seconds: float) -> Iterator[None]:
    """Watch a group of the library's in the block, unless a program's watcher does. Collective over comm, both ends.

    hang_seconds: in which a rank for which others wait does nothing of hpcmoe's; 0: nobody watches.
    """
    if find_watch().is_on or not hang_seconds:
        yield
        return
    environ = read_environment()
    start_watch(comm, find_host(environ) or MPI.Get_processor_name(), find_launcher_process(environ))
    try:
        with counted_waits():
            open_pulse().watch_gaps(hang_seconds)
            yield
            barrier(comm)
    except BaseException as error:
        find_watch().end(error)
        raise
    find_watch().stop()
