"""The engine calls each stage with what the stage before it left, and goes on in another lane where one must wait."""

import random
import traceback
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hpcmoe.pipeline.engine import Engine, Lane
from hpcmoe.pipeline.schedule import Op, make_schedule

from hpcmoe.clock import Clock, Timer
from hpcmoe.errors import ClusterError

KINDS = ["serial", "overlap", "arrival"]


class FakeDispatcher:
    """Pokes a few times before it has nothing left to do."""

    def __init__(self, left=3):
        self.clock, self.left, self.pokes, self.waits = Clock(), left, 0, 0

    def wait_for_change(self, backoff):
        self.waits += 1

    @property
    def is_idle(self):
        return self.left == 0

    def poke(self):
        self.pokes += 1
        moved, self.left = self.left > 0, max(self.left - 1, 0)
        return moved


class FakeLayer:
    """Adds its letter to what passes through; every stage but the first and last must find its own context.

    A stage waits as often as `delays` says, before it works.
    """

    def __init__(self, letter, calls, delays):
        self.letter, self.calls, self.delays = letter, calls, delays

    def wait(self, context):
        for _ in range(self.delays(context.micro_batch)):
            yield False

    def route(self, context, x, load):
        assert load == f"load {self.letter}"
        self.calls.append((context.layer, context.micro_batch, context.training, torch.is_grad_enabled()))
        context.x = x

    def dispatch(self, context):
        yield from self.wait(context)
        context.x += ">"
        yield True

    def compute(self, context):
        yield from self.wait(context)
        context.x += self.letter
        yield True
        yield from self.wait(context)
        context.x += "'"
        yield True

    def combine(self, context):
        yield from self.wait(context)
        context.output = context.x + "<"
        yield True

    def combine_backward(self, context, grad):
        yield from self.wait(context)
        context.grad_output = grad + ">"
        yield True

    def compute_backward(self, context):
        yield from self.wait(context)
        context.grad_output += self.letter
        yield True

    def route_backward(self, context, grad_probability, grad_z):
        assert (grad_probability, grad_z) == (context.layer, context.micro_batch)
        yield from self.wait(context)
        context.output = context.grad_output + "<"
        yield True


class FakeNetwork:
    """Two layers, a and b."""

    def __init__(self, delays=lambda micro_batch: 0):
        self.calls, self.tops, self.bottoms, self.asked = [], {}, {}, Counter()
        self.layers = [FakeLayer(letter, self.calls, delays) for letter in "ab"]
        self.load = ["load a", "load b"]
        self.pokes = 0

    def embed(self, micro_batch):
        return f"{micro_batch}:"

    def head(self, micro_batch, x, contexts):
        assert [(context.layer, context.micro_batch) for context in contexts] == [(0, micro_batch), (1, micro_batch)]
        self.tops[micro_batch] = x
        return f"{micro_batch}!"

    def poll_routing_grads(self, micro_batch):
        self.asked[micro_batch] += 1
        return self.asked[micro_batch] > 2

    def routing_grads(self, layer, micro_batch):
        assert self.asked[micro_batch] > 2, "asked before they are there"
        return layer, micro_batch

    def embed_backward(self, micro_batch, grad):
        self.bottoms[micro_batch] = grad

    def poke(self):
        self.pokes += 1
        return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_micro_batch_passes_up_and_in_training_down(kind, training, in_flight, seed):
    delays = random.Random(seed)
    network = FakeNetwork(lambda micro_batch: 0 if seed is None else delays.choice([0, 0, 3, 40]))
    dispatcher = FakeDispatcher()
    engine = Engine(network, dispatcher)
    for _ in range(2):
        engine.run(make_schedule(kind, 2, 5, in_flight, training), training)
        assert list(network.tops) == list(range(5))  # heads in order, on every rank the same
        assert network.tops == {m: f"{m}:>a'<>b'<" for m in range(5)}
        assert network.bottoms == ({m: f"{m}!>b<>a<" for m in range(5)} if training else {})
        assert sorted(network.calls) == sorted((layer, m, training, training) for layer in range(2) for m in range(5))
        assert engine.values == engine.contexts == {}  # nothing is left for the next step
        assert dispatcher.is_idle
        network.calls.clear(), network.tops.clear(), network.bottoms.clear()
        dispatcher.left = 3


def test_a_lane_that_waits_holds_no_other_up():
    """The first micro-batch waits until the second is all the way through its layers; its head then waits its turn."""
    second_at_head, network = [], FakeNetwork()
    network.layers[0].wait = lambda context: wait_for_the_other(context, network, second_at_head)
    Engine(network, FakeDispatcher()).run(make_schedule("arrival", 2, 2, 2, False), False)
    assert list(network.tops) == [0, 1] and second_at_head == ["seen"]


def wait_for_the_other(context, network, seen):
    """The first micro-batch goes on when the second has left the last layer's route behind it."""
    for _ in range(10_000):
        if context.micro_batch == 1 or any(call[:2] == (1, 1) for call in network.calls):
            break
        yield False
    else:
        raise AssertionError("the second lane never went on")
    if context.micro_batch == 0 and not seen:
        seen.append("seen")


def test_sending_and_fetching_go_before_an_experts_next_piece():
    """Of two lanes, one at its experts: the other's light stages are all done between two pieces of it."""
    done = []

    class Layer(FakeLayer):
        def compute(self, context):
            for piece in range(4):
                done.append((context.micro_batch, piece))
                yield True
            context.x += self.letter + "'"

        def dispatch(self, context):
            done.append((context.micro_batch, "dispatch"))
            yield from super().dispatch(context)

    network = FakeNetwork()
    network.layers = [Layer(letter, network.calls, lambda micro_batch: 0) for letter in "ab"]
    Engine(network, FakeDispatcher()).run(make_schedule("arrival", 2, 2, 2, False), False)
    first, second = (done.index((m, "dispatch")) for m in (0, 1))
    assert max(first, second) < min(done.index((m, 0)) for m in (0, 1)) + 2
    assert network.tops == {m: f"{m}:>a'<>b'<" for m in range(2)}


def test_what_others_want_is_done_before_a_step_ends():
    dispatcher = FakeDispatcher(left=10_000)
    Engine(FakeNetwork(), dispatcher).run(make_schedule("serial", 2, 1, 1, False), False)
    assert dispatcher.is_idle and dispatcher.pokes >= 10_000


def test_a_lane_ends_an_op_when_its_pieces_are_over():
    lane = Lane(["a", "b"], lambda op: iter([True, False] if op == "a" else []))
    assert [lane.step() for _ in range(3)] == [True, False, True] and lane.op == "b"
    assert lane.step() and lane.op is None


def test_each_op_is_timed_and_then_shown():
    network, seen = FakeNetwork(), []
    engine = Engine(network, FakeDispatcher())
    engine.run(make_schedule("serial", 2, 1, 1, True), True, lambda contexts: seen.append(len(contexts)))
    assert seen == [0] + [1] * 4 + [2] * 7 + [1] * 3 + [0] * 2  # a context lasts from route to route_backward
    assert set(engine.clock.pop_seconds()) == {"dense", "route", "dispatch", "compute", "combine", "waiting"}


@pytest.mark.parametrize("kind", [RuntimeError, ClusterError])
def test_an_error_tells_its_stage_layer_and_micro_batch(kind):
    """As CUDA's errors, which the device tells of when it likes, and NCCL's; the rank is told by whoever ends it."""
    network = FakeNetwork()
    network.layers[1].compute = lambda context: fail(kind, context)
    with pytest.raises(kind) as seen:
        Engine(network, FakeDispatcher()).run(make_schedule("serial", 2, 3, 1, True), True)
    told = "".join(traceback.format_exception_only(seen.value))
    assert "in stage compute of layer 1, micro-batch 0" in told and "illegal memory access" in told


def fail(kind, context):
    """A stage whose second piece fails."""
    yield True
    raise kind("CUDA error: an illegal memory access was encountered")


def test_an_unknown_stage_is_refused():
    polish = SimpleNamespace(report_as=Timer.DENSE, wait_as=Timer.DENSE)
    with pytest.raises(ValueError, match="unknown stage"):
        Engine(FakeNetwork(), FakeDispatcher()).run([[Op(polish, 0, 0)]], True)
