"""One lane: the thread of some micro-batches, where it is, under which modes of torch it works, how it ends."""

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from hpcmoe.clock import Stage, Timer
from hpcmoe.errors import HpcmoeError
from hpcmoe.pipeline.cores import Place

_HEAVY = (Stage.COMPUTE, Stage.COMPUTE_BACKWARD)  # experts' work, which may wait while others send and fetch

Modes = list[Callable[[], AbstractContextManager]]


class Lane:
    """A thread that takes some micro-batches through the network, and where it is."""

    def __init__(self, micro_batches: range = range(1)) -> None:
        self.micro_batches, self.micro_batch = micro_batches, micro_batches.start
        self.at: tuple[Stage, int] | None = None  # stage and layer of what was last worked on
        self.layer, self.stages = 0, deque[tuple[Stage, Iterator[bool]]]()  # that its thread waits for
        self.error: Exception | None = None  # of one of these
        self.timers = [Timer.DENSE]  # what its seconds count for, innermost last
        self.turn, self.place = threading.Lock(), Place()  # the lock is free while the lane may go on
        self.turn.acquire()

    @property
    def is_heavy(self) -> bool:
        """Return True if the lane is at its experts' work."""
        return len(self.stages) > 0 and self.stages[0][0] in _HEAVY

    @property
    def number(self) -> int:
        """Return the lane's place among those that began with it."""
        return self.micro_batches.start

    def give_turn(self) -> None:
        """Pass the turn to this lane's thread, which goes on where the caller stops, on its core."""
        self.place.call_here()
        self.turn.release()

    def await_turn(self) -> None:
        """Wait until this lane, the calling thread's, may go on."""
        self.turn.acquire()
        self.place.release()


class EndedError(BaseException):
    """Ends a lane where another has failed: not an Exception, which a user's code may catch."""


@contextlib.contextmanager
def located_errors(lane: Lane) -> Iterator[None]:
    """Add to whatever goes wrong which stage saw it; a device reports it some time after its cause."""
    try:
        yield
    except Exception as error:
        if lane.at is None:
            raise
        place = f"in stage {lane.at[0]} of layer {lane.at[1]}, micro-batch {lane.micro_batch}"
        if isinstance(error, HpcmoeError):
            raise type(error)(f"{place}: {error}") from error
        error.add_note(place)
        raise


def capture_modes() -> Modes:
    """Collect this thread's modes of torch -> what enters them in another."""
    casting = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    default = torch.get_default_device()
    return [
        *[functools.partial(torch.device, default)] * (default.type != "cpu"),
        *[torch.inference_mode] * torch.is_inference_mode_enabled(),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        *(functools.partial(torch.autocast, device, torch.get_autocast_dtype(device)) for device in casting),
    ]
