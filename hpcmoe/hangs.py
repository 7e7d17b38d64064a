"""Ranks that hang, as the others see it: a rank that waits looks whether the node's watcher has named one."""

import contextlib
from collections.abc import Iterator

from hpcmoe.errors import ClusterError
from hpcmoe.pulse import open_pulse
from hpcmoe.wait import call_at_pauses


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
