"""Lanes' threads work as the caller's own would: under its modes, ended by the first error, and by close()."""

import contextvars
import itertools
import signal
import threading
import time
import traceback

import pytest
import torch
from lanes_by_hand import FORWARD, Layer, open_network

from hpcmoe.clock import Stage
from hpcmoe.errors import ClusterError
from hpcmoe.pipeline.lanes import SCHEDULES

IN_THREADS = [kind for kind in SCHEDULES if kind != "serial"]
VARIABLE = contextvars.ContextVar("VARIABLE", default="of nobody")


def list_threads():
    """List the lanes' threads that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("lane")}


def break_at(network, place, error):
    """Have the second piece of a stage (stage, layer, micro-batch) fail; `failed` lists the pieces done until then."""
    inner, network.failed = network.pieces, []

    def pieces(*at):
        yield from inner(*at) if at != place else [True]
        if at == place:
            network.failed = list(network.trace)
            raise error

    network.pieces = pieces
    return lambda: setattr(network, "pieces", inner)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError, ClusterError])
@pytest.mark.parametrize("stage", [Stage.COMPUTE, Stage.COMPUTE_BACKWARD])
def test_an_error_ends_all_lanes_and_tells_its_stage_layer_and_micro_batch(kind, in_flight, error, stage):
    """As CUDA's errors, which the device tells of when it likes, and NCCL's; the rank is told by whoever ends it.

    Forward and backward it passes through a torch.autograd.Function. The next run finds nothing of it.
    """
    with open_network(kind, left=3) as network:
        repair = break_at(network, (stage, 1, 1), error("CUDA error: an illegal memory access was encountered"))
        for _ in range(2):
            with pytest.raises(error) as seen:
                network.run(4, in_flight)
            told = "".join(traceback.format_exception_only(seen.value))
            assert f"in stage {stage.value} of layer 1, micro-batch 1" in told and "illegal memory access" in told
            assert 0 < len(network.failed) >= len(network.trace) - 8  # of 96: what comes before the lane's turn
        repair()
        seen = None  # its traceback holds the lanes' contexts
        for again in (1, in_flight):
            network.delays = lambda micro_batch: 40  # all of them wait
            assert [number for number, _ in network.run(4, again)] == list(range(4))


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("where", ["before the first stage", "after the last"])
def test_an_error_outside_all_stages_ends_all_lanes(kind, where):
    with open_network(kind, lambda micro_batch: 3) as network:

        def step(micro_batch):
            if where == "after the last" or micro_batch != 1:
                network.step(micro_batch)
            if micro_batch == 1:
                raise KeyError("no such key")

        with pytest.raises(KeyError, match="no such key"):
            network.lanes.run(step, 4, 2)


@pytest.mark.parametrize("kind", IN_THREADS)
def test_code_that_catches_all_exceptions_ends_with_the_others(kind):
    """The first lane fails while the second is inside try: except Exception, as a user's code may be."""
    with open_network(kind, lambda micro_batch: 3) as network:
        break_at(network, (Stage.COMPUTE, 0, 0), RuntimeError("the first"))
        caught = []

        def step(micro_batch):
            try:
                network.step(micro_batch)
            except Exception:
                caught.append(micro_batch)
                raise

        with pytest.raises(RuntimeError, match="the first"):
            network.lanes.run(step, 2, 2)
        assert caught == [0]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_an_error_that_is_caught_is_over(kind):
    """A stage's error reaches its own lane; if this goes on, so do all."""
    with open_network(kind) as network, torch.no_grad():
        repair = break_at(network, (Stage.DISPATCH, 0, 1), RuntimeError("once"))

        def step(micro_batch):
            try:
                return network.step(micro_batch)[0]
            except RuntimeError:
                repair()
                return network.step(micro_batch)[0]

        assert network.lanes.run(step, 3, 2) == [0, 1, 2]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("stage", [Stage.COMPUTE, Stage.COMPUTE_BACKWARD])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_all_lanes_and_the_process_lives_on(kind, stage, times):
    """The signal's exception is raised in the caller while lanes work, forward or in autograd; one may come twice."""
    with open_network(kind) as network:
        polls, deadline = itertools.count(), time.monotonic() + 60

        def holds(*at):
            if at != (stage, 1, 1):
                return False
            if next(polls) < times:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return time.monotonic() < deadline

        network.holds = holds
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                network.run(4, 2)
        finally:
            signal.signal(signal.SIGINT, before)
        assert next(polls) > 0 and time.monotonic() < deadline and not network.lanes.lanes
        network.holds = lambda *_: False
        assert len(network.run(4, 2)) == 4


@pytest.mark.parametrize("kind", IN_THREADS)
def test_threads_are_kept_from_step_to_step_and_ended_by_close(kind):
    before = list_threads()
    with open_network(kind) as network:
        started = []
        network.lanes.bind_thread = lambda: started.append(threading.current_thread())
        for in_flight in (2, 2, 4, 3):  # more than there were, then fewer
            assert len(network.run(5, in_flight)) == 5
        assert len(started) == 2 + 2 + 4 + 3 and len(list_threads() - before) <= 2 + 4
        assert threading.main_thread() not in started
        network.run(2, 2)
        assert set(started[-2:]) <= set(started[:-2])
    assert list_threads() <= before


@pytest.mark.parametrize(
    ("kind", "in_flight", "num_micro_batches"), [("serial", 4, 4), ("overlap", 1, 4), ("arrival", 4, 1)]
)
def test_one_at_a_time_needs_no_thread(kind, in_flight, num_micro_batches):
    before = list_threads()
    with open_network(kind) as network:
        ran_in = network.lanes.run(lambda micro_batch: threading.current_thread(), num_micro_batches, in_flight)
        assert set(ran_in) == {threading.main_thread()} and list_threads() <= before


@pytest.mark.parametrize("kind", SCHEDULES)
def test_autograd_works_in_the_lanes_own_thread(kind):
    """Otherwise two lanes' backward passes would wait for each other inside autograd."""
    with open_network(kind) as network:
        seen = []
        inner = network.pass_stages
        network.pass_stages = lambda *at: (seen.append((network.lanes.micro_batch, threading.get_ident())), inner(*at))

        def step(micro_batch):
            network.step(micro_batch)
            return threading.get_ident()

        of_lane = network.lanes.run(step, 4, 2)
    assert len(seen) == 4 * 4 and all(of_lane[micro_batch] == thread for micro_batch, thread in seen)
    assert len(set(of_lane)) == (1 if kind == "serial" else 2)


MODES = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_lanes_work_under_the_callers_modes(kind, mode):
    def modes(micro_batch=0):
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_num_threads(),
            VARIABLE.get(),
        )

    token, outside = VARIABLE.set("of the caller"), modes()
    try:
        with open_network(kind) as network, MODES[mode]():
            assert network.lanes.run(modes, 4, 2) == [modes()] * 4
            _, x = network.run(2, 2)[1]
            assert x.is_inference() == (mode == "inference_mode")
    finally:
        VARIABLE.reset(token)
    assert modes() == (*outside[:-1], "of nobody")


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_stages_work_under_the_same_modes_in_whoever_s_thread(kind, mode):
    """They write into buffers: a graph must not grow there, not even where a lane that has ended works for others."""
    with open_network(kind, lambda micro_batch: 2 * micro_batch) as network, MODES[mode]():
        expected = (False, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), VARIABLE.get())
        seen, inner = [], network.pieces

        def pieces(*at):
            for worked in inner(*at):
                seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
                seen[-1] += torch.is_autocast_enabled("cpu"), VARIABLE.get()
                yield worked

        network.pieces = pieces
        for num_micro_batches in (3, 4, 5):
            network.run(num_micro_batches, 3)
    assert len(seen) > 100 and set(seen) == {expected}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_lane_knows_its_micro_batch(kind):
    with open_network(kind) as network:
        assert network.lanes.run(lambda micro_batch: network.lanes.micro_batch, 5, 2) == list(range(5))
        assert network.lanes.micro_batch == 0  # outside


@pytest.mark.parametrize("kind", IN_THREADS)
def test_a_thread_that_cannot_be_bound_is_an_error(kind):
    with open_network(kind) as network:

        def bind():
            raise RuntimeError("no such device")

        network.lanes.bind_thread = bind
        with pytest.raises(RuntimeError, match="no such device"):
            network.run(3, 2)
        assert network.trace == []


def test_a_layer_may_be_called_twice_in_a_step_and_backward_twice_in_a_lane():
    """Gradient accumulation inside a lane: two losses, each with its own way back."""
    with open_network("overlap") as network:

        def step(micro_batch):
            for _ in range(2):
                Layer.apply(network.weight * micro_batch, network, 0).sum().backward()

        network.lanes.run(step, 3, 2)
    assert network.weight.grad.tolist() == [2 * 2.0 * (0 + 1 + 2)] * 3
    assert len(network.turns()) == 3 * 2 * 2 * len(FORWARD)
