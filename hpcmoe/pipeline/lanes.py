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
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from hpcmoe.clock import Clock, Stage, Timer
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.pipeline.lane import EndedError, Lane, Modes, capture_modes, located_errors
from hpcmoe.pipeline.progress import Progress
from hpcmoe.pipeline.random_states import RandomStates
from hpcmoe.wait import Backoff

SCHEDULES = ("serial", "overlap", "arrival")

_Result = TypeVar("_Result")
Stages = Sequence[tuple[Stage, Iterator[bool]]]


class Lanes(Progress):
    """The lanes of a group of ranks, and what goes on while they wait."""

    def __init__(
        self,
        dispatchers: list[TokenDispatcher],
        clock: Clock,
        kind: str,
        bind_thread: Callable[[], None] = lambda: None,
        generators: Sequence[torch.Generator] = (torch.default_generator,),
    ) -> None:
        """dispatchers progress wherever a lane waits; bind_thread is the first call of a lane's thread.

        generators: those of which a micro-batch gets random numbers of its own.
        """
        if kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {kind}")
        super().__init__(dispatchers, clock)
        self.kind, self.bind_thread = kind, bind_thread
        self.random = RandomStates(generators)
        self.contexts = WeakSet[Any]()  # what forward passes have left for backward passes
        self.observe: Callable[[Iterable[Any]], None] | None = None  # is shown them after each stage
        self.current = threading.local()
        self.caller = Lane()  # the thread outside all lanes
        self.lanes: list[Lane] = []  # that have not ended, in the order of the circle
        self.failure: BaseException | None = None
        self.ended = threading.Event()  # of all lanes of the last run
        self.ended.set()
        self.threads = ThreadPoolExecutor(sys.maxsize, "lane")  # starts one only where none is idle

    @property
    def lane(self) -> Lane:
        """Return this thread's lane."""
        return getattr(self.current, "lane", self.caller)

    @property
    def micro_batch(self) -> int:
        """Return the number of this thread's micro-batch, 0 outside run()."""
        return self.lane.micro_batch

    def run(self, step: Callable[[int], _Result], num_micro_batches: int, in_flight: int) -> list[_Result]:
        """Call step(micro_batch) for each micro-batch, at most in_flight of them under way -> the results in order.

        What a step raises ends all lanes, and is raised with its stage, layer and micro-batch. torch's random numbers
        of a micro-batch are the same whichever are in flight. Collective over the group.
        """
        self.check_open()
        in_flight = 1 if self.kind == "serial" else min(in_flight, num_micro_batches)
        results: dict[int, _Result] = {}
        with self.random.draw_seeds(num_micro_batches):
            if in_flight > 1:
                lanes = [Lane(range(k, num_micro_batches, in_flight)) for k in range(in_flight)]
                self.run_threads(lanes, step, results)
            else:
                self.run_lane(Lane(range(num_micro_batches)), step, results)
        self.drain()
        return [results[number] for number in range(num_micro_batches)]

    def run_lane(self, lane: Lane, step: Callable[[int], _Result], results: dict[int, _Result]) -> None:
        """Pass a lane's micro-batches through the network, one after the other, in this thread."""
        outside = self.clock.switch(lane.timers, lane.number)
        self.current.lane = lane
        try:
            with torch.autograd.set_multithreading_enabled(False):  # backward runs in this thread too
                for number in lane.micro_batches:
                    lane.micro_batch = number
                    self.random.seed(number)
                    with located_errors(lane):
                        results[number] = step(number)
        finally:
            del self.current.lane
            self.clock.switch(outside)

    def run_threads(self, lanes: list[Lane], step: Callable[[int], _Result], results: dict[int, _Result]) -> None:
        """Pass several lanes' micro-batches through the network, each in a thread, while the caller waits."""
        self.ended.wait()  # for what a signal has left behind
        caller_timers, modes, ended, self.failure = self.clock.running, capture_modes(), threading.Event(), None
        may_start = threading.Lock()  # whoever takes it decides: the lanes start, or never will

        def start() -> None:
            """Start the others from the first lane's thread, which no signal's exception can reach."""
            if not may_start.acquire(blocking=False):
                return
            self.ended, self.lanes = ended, lanes[:1]
            with self.keep_failure():
                for lane in lanes[1:]:
                    self.threads.submit(contextvars.copy_context().run, self.work, lane, step, results, modes)
                    self.lanes.append(lane)
            self.give_turn(lanes[0])
            self.work(lanes[0], step, results, modes)

        # Wait for the last lane's end, or for the end that a signal puts to them; several may come.
        def submit() -> None:
            self.threads.submit(contextvars.copy_context().run, start)
            ended.wait()

        self.join(submit, ended, may_start)
        self.clock.switch(caller_timers)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def join(self, act: Callable[[], object], ended: threading.Event, may_start: threading.Lock) -> None:
        """Call act, and wait for the lanes' ends; a signal's exception, of which several may come, ends them."""
        try:
            act()
        except BaseException as error:
            self.failure = self.failure or error
            if not may_start.acquire(blocking=False):
                self.join(ended.wait, ended, may_start)

    def work(self, lane: Lane, step: Callable[[int], _Result], results: dict[int, _Result], modes: Modes) -> None:
        """Run a lane when it first has the turn, and hand this on at its end."""
        lane.place.enter()
        lane.await_turn()
        with contextlib.ExitStack() as entered:
            with self.keep_failure():
                self.bind_thread()
                for mode in modes:
                    entered.enter_context(mode())
                self.stop_if_failed()
                self.run_lane(lane, step, results)
            self.leave(lane)  # under the modes too: what others have posted may be worked on

    def leave(self, lane: Lane) -> None:
        """Remove a lane from the circle, and hand its turn on: whatever fails here, one of the others must go on."""
        place, successor = self.lanes.index(lane), None
        self.lanes.remove(lane)
        if self.lanes:
            with self.keep_failure():
                successor = self.choose(place)
            self.give_turn(successor or self.choose(place))
        else:
            self.ended.set()

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
        self.check_open()
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
        self.check_open()
        self.lane.at = stage, layer
        self.pulse.work(stage, layer, self.lane.micro_batch)
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
        """Run the next piece of what a lane waits for -> whether there was one."""
        stage, pieces = lane.stages[0]
        lane.at = stage, lane.layer
        self.pulse.work(stage, lane.layer, lane.micro_batch)
        try:
            with self.clock.measure(stage.report_as, lane.number), torch.no_grad():  # in whoever's thread
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

    def end_exchange(self) -> None:
        """Finish what the other ranks want where no lane will wait soon: what the caller does next is not known."""
        if self.lane is self.caller:
            self.drain()

    def wait(self, timer: Timer, backoff: Backoff) -> None:
        """Pause, unless another lane has failed meanwhile."""
        self.stop_if_failed()
        super().wait(timer, backoff)

    def stop_if_failed(self) -> None:
        """Raise EndedError where another lane has failed."""
        if self.failure is not None and self.lane is not self.caller:
            raise EndedError

    def hand_on(self, lane: Lane) -> None:
        """Pass this thread's turn on, and wait until it comes back."""
        successor = self.choose(self.lanes.index(lane) + 1)
        if successor is not lane:
            states = self.random.read()
            self.give_turn(successor)
            lane.await_turn()
            self.random.set(states)
            self.clock.switch(lane.timers, lane.number)
        self.stop_if_failed()

    def give_turn(self, lane: Lane) -> None:
        """Pass the turn to a lane's thread; what that takes counts as waiting."""
        self.clock.switch([Timer.WAITING])
        lane.give_turn()

    def choose(self, place: int) -> Lane:
        """Run what lanes have posted, until one of them needs its thread -> that lane.

        place: of the lane in the circle whose turn it is.
        """
        while self.failure is None:
            lane = self.lanes[place % len(self.lanes)]
            if self.kind == "arrival":
                return self.advance_until_ready()
            if len(lane.stages) <= 1:  # behind its last stage comes what its thread has to do
                return lane
            self.drive(lane)
            if lane.error is not None:
                return lane
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
        """End the threads; nothing runs after this."""
        self.is_closed = True
        self.threads.shutdown(wait=not self.lanes)  # after an error some may wait for ever
