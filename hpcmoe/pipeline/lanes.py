"""Micro-batches take turns: each is plain torch code in a thread of its own, and one of them works at a time.

A lane is such a thread. What it waits for are stages: generators that yield True after a piece of work, and False while
there is nothing to do. They need no thread of their own: a lane posts them, and whoever has the turn works on them, so
that the turn goes to another thread as rarely as can be. The order of work depends on the kind alone:

    serial   one micro-batch after the other, in the caller's thread
    overlap  in a fixed circle, a stage of each lane, then the next of each: the same order at every run
    arrival  whoever has rows goes on; first those that send and fetch, then one piece of an expert's work
"""

import contextlib
import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from hpcmoe.clock import Clock, Stage, Timer
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.errors import HpcmoeError
from hpcmoe.pipeline.cores import Place
from hpcmoe.wait import Backoff

KINDS = ("serial", "overlap", "arrival")
_HEAVY = (Stage.COMPUTE, Stage.COMPUTE_BACKWARD)  # experts' work, which may wait while others send and fetch

Result = TypeVar("Result")
Modes = list[Callable[[], AbstractContextManager]]
Stages = Sequence[tuple[Stage, Iterator[bool]]]


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

    def await_turn(self) -> None:
        """Wait until this lane, the calling thread's, may go on."""
        self.turn.acquire()
        self.place.release()


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
        self.contexts = WeakSet[Any]()  # what forward passes have left for backward passes
        self.observe: Callable[[Iterable[Any]], None] | None = None  # is shown them after each stage
        self.current = threading.local()
        self.caller = Lane()  # the thread outside all lanes
        self.lanes: list[Lane] = []  # that have not ended, in the order of the circle
        self.failure: BaseException | None = None
        self.threads, self.num_threads = ThreadPoolExecutor(1), 0

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
        if self.num_threads < len(lanes):
            self.close()
            self.threads, self.num_threads = ThreadPoolExecutor(len(lanes), "lane"), len(lanes)
        modes = capture_modes()
        threads = [
            self.threads.submit(contextvars.copy_context().run, self.work, lane, step, results, modes) for lane in lanes
        ]
        self.caller.place.enter()
        self.give_turn(lanes[0])

        # Wait for the last of them; a signal's exception ends them.
        try:
            self.caller.await_turn()
        except BaseException as error:
            self.failure = self.failure or error
            self.caller.await_turn()
        for thread in threads:
            thread.result()
        self.clock.switch(caller_timers)
        if self.failure is not None:
            raise self.failure

    def work(self, lane: Lane, step: Callable[[int], Result], results: dict[int, Result], modes: Modes) -> None:
        """Run a lane when it first has the turn, and hand this on at its end."""
        lane.place.enter()
        lane.await_turn()
        with self.keep_failure(), contextlib.ExitStack() as entered:
            self.bind_thread()
            for mode in modes:
                entered.enter_context(mode())
            self.stop_if_failed()
            self.run_lane(lane, step, results)

        # Go on for the others where they need no threads of their own; whatever fails, one of these must go on.
        place, successor = self.lanes.index(lane), None
        self.lanes.remove(lane)
        with self.keep_failure():
            successor = self.choose(place)
        self.give_turn(successor or self.choose(place))

    @contextlib.contextmanager
    def keep_failure(self) -> Iterator[None]:
        """Keep the first exception of any lane, which ends all of them."""
        try:
            yield
        except EndedError:
            pass
        except BaseException as error:
            self.failure = self.failure or error

    def run_stages(self, layer: int, stages: Stages) -> None:
        """Run stages of a layer to their ends; between them, or meanwhile, other lanes go on as the kind says."""
        lane = self.lane
        lane.layer, lane.stages = layer, deque(stages)
        if not self.lanes or self.kind == "overlap":
            self.drive(lane)
        while lane.stages:
            if self.lanes:
                self.hand_on(lane)
            if lane.stages:
                self.drive(lane)
        error, lane.error = lane.error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def stage(self, stage: Stage, layer: int) -> Iterator[None]:
        """Count the seconds of the with-block to a stage of a layer, and name this in what goes wrong."""
        self.lane.at = stage, layer
        with self.clock.measure(stage.report_as):
            yield

    def drive(self, lane: Lane) -> None:
        """Run the next stage that a lane waits for to its end, while no other lane goes on."""
        stage, left, backoff = lane.stages[0][0], len(lane.stages), Backoff()
        while len(lane.stages) == left:
            moved = self.poke()  # before anything is looked at
            if self.advance(lane) or moved:
                backoff.reset()
            else:
                self.wait(stage.wait_as, backoff)

    def advance(self, lane: Lane) -> bool:
        """Do the next piece of what a lane waits for -> whether there was one."""
        stage, pieces = lane.stages[0]
        lane.at = stage, lane.layer
        try:
            with self.clock.measure(stage.report_as):
                worked = next(pieces, None)
        except Exception as error:
            lane.error = error
            lane.stages.clear()
            return True
        if worked is None:
            lane.stages.popleft()
            if self.observe is not None:
                self.observe(self.contexts)
        return worked is not False

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
            self.give_turn(successor)
            lane.await_turn()
            self.clock.switch(lane.timers)
        self.stop_if_failed()

    def give_turn(self, lane: Lane) -> None:
        """Let a lane's thread go on, on this thread's core; until it does nobody works."""
        self.clock.switch([Timer.WAITING])
        lane.place.call_here()
        lane.turn.release()

    def choose(self, place: int) -> Lane:
        """Work on what lanes have posted, until one of them needs its thread -> that lane; the caller's at the end.

        place: of the lane in the circle whose turn it is.
        """
        if not self.lanes:
            return self.caller
        while self.failure is None:
            lane = self.lanes[place % len(self.lanes)]
            if self.kind == "arrival":
                return self.advance_until_ready()
            if len(lane.stages) <= 1:  # behind its last stage comes what its thread has to do
                return lane
            self.drive(lane)
            place += 1
        return self.lanes[0]

    def advance_until_ready(self) -> Lane:
        """Advance what all lanes wait for, until one of them need not wait any longer -> that lane."""
        backoff = Backoff()
        while True:
            ready = next((lane for lane in self.lanes if not lane.stages), None)
            if ready is not None:
                return ready
            moved = self.poke()  # before anything is looked at
            light = [self.advance(lane) for lane in self.lanes if not lane.is_heavy]
            if any(light) or any(self.advance(lane) for lane in self.lanes if lane.is_heavy) or moved:
                backoff.reset()
            else:
                self.wait(self.lanes[0].stages[0][0].wait_as, backoff)

    def close(self) -> None:
        """End the threads."""
        self.threads.shutdown()


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
