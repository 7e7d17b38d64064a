"""Micro-batches take turns: each is plain torch code in a thread of its own, and one of them works at a time.

A lane is such a thread. What it waits for is a stage: a generator that yields True after a piece of work, and False
while there is nothing to do. A lane hands its turn on there, and nowhere else. To whom depends on the kind alone:

    serial   one micro-batch after the other, in the caller's thread
    overlap  in a fixed circle, after each stage behind which rows travel: the same order on every rank at every run
    arrival  whoever has rows goes on; first those that send and fetch, then one piece of an expert's work
"""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from hpcmoe.clock import Clock, Stage, Timer
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.errors import HpcmoeError
from hpcmoe.wait import Backoff

KINDS = ("serial", "overlap", "arrival")
_HEAVY = (Stage.COMPUTE, Stage.COMPUTE_BACKWARD)  # experts' work, which may wait while others send and fetch
_HAND_ON = (Stage.DISPATCH, Stage.COMPUTE, Stage.COMBINE_BACKWARD, Stage.COMPUTE_BACKWARD)  # rows travel after these

Result = TypeVar("Result")
Modes = list[Callable[[], AbstractContextManager]]


class Lane:
    """A thread that takes some micro-batches through the network, and where it is."""

    def __init__(self, micro_batches: range = range(1)) -> None:
        self.micro_batches, self.micro_batch = micro_batches, micro_batches.start
        self.at: tuple[Stage, int] | None = None  # stage and layer of what was last worked on
        self.pieces: Iterator[bool] | None = None  # of the stage that it waits for, while others have the turn
        self.error: Exception | None = None  # of that stage
        self.timers = [Timer.DENSE]  # what its seconds count for, innermost last
        self.turn = threading.Semaphore(0)

    @property
    def is_heavy(self) -> bool:
        """Return True if the lane is at its experts' work."""
        return self.at is not None and self.at[0] in _HEAVY


class EndedError(BaseException):
    """Ends a lane where another has failed: not an Exception, which a user's code may catch."""


class Lanes:
    """The lanes of a group of ranks, and what goes on while they wait."""

    def __init__(
        self,
        dispatchers: list[TokenDispatcher],
        clock: Clock,
        kind: str,
        bind_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """dispatchers progress wherever a lane waits; bind_thread is the first call of a lane's thread."""
        if kind not in KINDS:
            raise ValueError(f"unknown schedule {kind}")
        self.dispatchers, self.clock, self.kind, self.bind_thread = dispatchers, clock, kind, bind_thread
        self.pokes: list[Callable[[], bool]] = []  # advance what else goes on, and return True if any of it has moved
        self.check: Callable[[], None] = lambda: None  # raises what other ranks have to tell, wherever one waits
        self.contexts = WeakSet[Any]()  # what forward passes have left for backward passes
        self.observe: Callable[[Iterable[Any]], None] | None = None  # is shown them after each stage
        self.current = threading.local()
        self.caller = Lane()  # the thread outside all lanes
        self.lanes: list[Lane] = []  # that have not ended, in the order of the circle
        self.failure: BaseException | None = None
        self.threads: ThreadPoolExecutor | None = None

    @property
    def lane(self) -> Lane:
        """Return this thread's lane."""
        return getattr(self.current, "lane", self.caller)

    @property
    def micro_batch(self) -> int:
        """Return the number of this thread's micro-batch, 0 outside run()."""
        return self.lane.micro_batch

    def run(self, step: Callable[[int], Result], num_micro_batches: int, in_flight: int) -> list[Result]:
        """Call step(micro_batch) for each micro-batch, at most in_flight of them under way -> the results in order.

        What a step raises ends all lanes, and is raised with its stage, layer and micro-batch. Collective over the
        group.
        """
        in_flight = 1 if self.kind == "serial" else min(in_flight, num_micro_batches)
        results: dict[int, Result] = {}
        if in_flight > 1:
            self.run_threads([Lane(range(k, num_micro_batches, in_flight)) for k in range(in_flight)], step, results)
        else:
            self.run_lane(Lane(range(num_micro_batches)), step, results)
        self.drain()
        return [results[number] for number in range(num_micro_batches)]

    def run_lane(self, lane: Lane, step: Callable[[int], Result], results: dict[int, Result]) -> None:
        """Take a lane's micro-batches through the network, one after the other, in this thread."""
        outside = self.clock.switch(lane.timers)
        self.current.lane = lane
        try:
            with torch.autograd.set_multithreading_enabled(False):  # backward runs in this thread too
                for number in lane.micro_batches:
                    lane.micro_batch = number
                    with located_errors(lane):
                        results[number] = step(number)
        finally:
            del self.current.lane
            self.clock.switch(outside)

    def run_threads(self, lanes: list[Lane], step: Callable[[int], Result], results: dict[int, Result]) -> None:
        """Take several lanes' micro-batches through the network, each in a thread, while the caller waits."""
        # Start the threads, and give the first of them the turn.
        self.lanes, self.failure, caller_timers = list(lanes), None, self.clock.running
        self.threads = self.threads or ThreadPoolExecutor(len(lanes), "lane")
        modes = capture_modes()
        threads = [
            self.threads.submit(contextvars.copy_context().run, self.work, lane, step, results, modes) for lane in lanes
        ]
        lanes[0].turn.release()

        # Wait for the last of them; a signal's exception ends them.
        try:
            self.caller.turn.acquire()
        except BaseException as error:
            self.failure = self.failure or error
            self.caller.turn.acquire()
        for thread in threads:
            thread.result()
        self.clock.switch(caller_timers)
        if self.failure is not None:
            raise self.failure

    def work(self, lane: Lane, step: Callable[[int], Result], results: dict[int, Result], modes: Modes) -> None:
        """Run a lane when it first has the turn, and hand this on at its end."""
        lane.turn.acquire()
        try:
            with contextlib.ExitStack() as entered:
                self.bind_thread()
                for mode in modes:
                    entered.enter_context(mode())
                self.stop_if_failed()
                self.run_lane(lane, step, results)
        except EndedError:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        place = self.lanes.index(lane)
        self.lanes.remove(lane)
        try:
            successor = self.choose(place)
        except BaseException as error:
            self.failure = self.failure or error
            successor = self.choose(place)
        successor.turn.release()

    def run_stage(self, stage: Stage, layer: int, pieces: Iterator[bool]) -> None:
        """Run a stage to its end; meanwhile, or behind it, other lanes go on as the kind says."""
        lane = self.lane
        if self.lanes and self.kind == "arrival":
            lane.at, lane.pieces = (stage, layer), pieces
            self.hand_on(lane)
            if lane.error is not None:
                raise lane.error
        else:
            with self.stage(stage, layer):
                self.drive(stage, pieces)
            if self.lanes and stage in _HAND_ON:
                self.hand_on(lane)
        if self.observe is not None:
            self.observe(self.contexts)

    @contextlib.contextmanager
    def stage(self, stage: Stage, layer: int) -> Iterator[None]:
        """Count the seconds of the with-block to a stage of a layer, and name this in what goes wrong."""
        self.lane.at = stage, layer
        with self.clock.measure(stage.report_as):
            yield

    def drive(self, stage: Stage, pieces: Iterator[bool]) -> None:
        """Run a stage to its end in this thread, while no other lane goes on."""
        backoff = Backoff()
        while True:
            moved = self.poke()  # before anything is looked at
            worked = next(pieces, None)
            if worked is None:
                return
            if moved or worked:
                backoff.reset()
            else:
                self.wait(stage.wait_as, backoff)

    def drain(self) -> None:
        """Wait until this rank has done all that others want of it."""
        backoff = Backoff()
        with self.clock.measure(Timer.WAITING):
            while not all(dispatcher.is_idle for dispatcher in self.dispatchers):
                if self.poke():
                    backoff.reset()
                else:
                    self.wait(Timer.WAITING, backoff)

    def end_exchange(self) -> None:
        """Serve the other ranks to the end where no lane will wait soon: what the caller does next is not known."""
        if self.lane is self.caller:
            self.drain()

    def poke(self) -> bool:
        """Advance messages and tasks without waiting, and return True if anything moved."""
        moved = [dispatcher.poke() for dispatcher in self.dispatchers]
        return any([*moved, *(poke() for poke in self.pokes)])

    def wait(self, timer: Timer, backoff: Backoff) -> None:
        """Pause, a few times at most, until something may have changed since the last poke."""
        self.stop_if_failed()
        self.check()
        with self.clock.measure(timer):
            if len(self.dispatchers) == 1:
                self.dispatchers[0].wait_for_change(backoff)
            else:
                backoff.pause()

    def stop_if_failed(self) -> None:
        """Raise EndedError where another lane has failed."""
        if self.failure is not None and self.lane is not self.caller:
            raise EndedError

    def hand_on(self, lane: Lane) -> None:
        """Hand this thread's turn on, and wait until it comes back."""
        successor = self.choose(self.lanes.index(lane) + 1)
        if successor is not lane:
            successor.turn.release()
            lane.turn.acquire()
            self.clock.switch(lane.timers)
        self.stop_if_failed()

    def choose(self, place: int) -> Lane:
        """Choose the lane that goes on: the next in the circle, or the first that has what it waits for."""
        if not self.lanes:
            return self.caller
        following = self.lanes[place % len(self.lanes)]
        return following if self.failure is not None or self.kind == "overlap" else self.advance_until_ready()

    def advance_until_ready(self) -> Lane:
        """Advance what all lanes wait for, until one of them need not wait any longer."""
        backoff = Backoff()
        while True:
            ready = next((lane for lane in self.lanes if lane.pieces is None), None)
            if ready is not None:
                return ready
            moved = self.poke()  # before anything is looked at
            light, heavy = ([lane for lane in self.lanes if lane.is_heavy == which] for which in (False, True))
            if self.advance(light, all_of_them=True) or self.advance(heavy, all_of_them=False) or moved:
                backoff.reset()
            else:
                stage, _ = self.lanes[0].at or (Stage.COMBINE, 0)
                self.wait(stage.wait_as, backoff)

    def advance(self, lanes: list[Lane], all_of_them: bool) -> bool:
        """Advance what these lanes wait for by a piece, all or the first that can, and return True if any did."""
        moved = False
        for lane in lanes:
            if (all_of_them or not moved) and lane.pieces is not None and lane.at is not None:
                with self.clock.measure(lane.at[0].report_as):
                    moved |= advance_lane(lane)
        return moved

    def close(self) -> None:
        """End the threads."""
        if self.threads is not None:
            self.threads.shutdown()


def advance_lane(lane: Lane) -> bool:
    """Do the next piece of what a lane waits for -> whether there was one; at the end it waits no longer."""
    assert lane.pieces is not None
    try:
        worked = next(lane.pieces, None)
    except Exception as error:
        lane.error, worked = error, None
    if worked is None:
        lane.pieces = None
    return worked is not False


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
    """Capture this thread's modes of torch -> what enters them in another."""
    casting = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return [
        *[torch.inference_mode] * torch.is_inference_mode_enabled(),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        *(functools.partial(torch.autocast, device, torch.get_autocast_dtype(device)) for device in casting),
    ]
