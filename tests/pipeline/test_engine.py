"""The engine calls each stage of a schedule with what the stage before it left."""

import pytest
import torch

from hpcmoe.clock import Clock
from hpcmoe.pipeline.engine import STAGE_NAMES, Engine
from hpcmoe.pipeline.schedule import BACKWARD, FORWARD, Op, make_schedule


class FakeLayer:
    """Adds its letter to what passes through; every stage but the first and last must find its own flight."""

    def __init__(self, letter, calls):
        self.letter, self.calls = letter, calls

    def route(self, flight, x, load):
        assert load == f"load {self.letter}"
        self.calls.append((flight.layer, flight.micro_batch, flight.berth, flight.training, torch.is_grad_enabled()))
        flight.x = x

    def dispatch(self, flight):
        flight.x += ">"

    def compute(self, flight):
        flight.x += self.letter

    def combine(self, flight):
        return flight.x + "<"

    def combine_backward(self, flight, slope):
        flight.slope = slope + ">"

    def compute_backward(self, flight):
        flight.slope += self.letter

    def route_backward(self, flight, probability_slope, z_slope):
        assert (probability_slope, z_slope) == (flight.layer, flight.micro_batch)
        return flight.slope + "<"


class FakeNetwork:
    """Two layers, a and b."""

    def __init__(self):
        self.calls, self.tops, self.bottoms = [], {}, {}
        self.layers = [FakeLayer(letter, self.calls) for letter in "ab"]
        self.load = ["load a", "load b"]

    def embed(self, micro_batch):
        return f"{micro_batch}:"

    def head(self, micro_batch, x, flights):
        assert [(flight.layer, flight.micro_batch) for flight in flights] == [(0, micro_batch), (1, micro_batch)]
        self.tops[micro_batch] = x
        return f"{micro_batch}!"

    def routing_slopes(self, layer, micro_batch):
        return layer, micro_batch

    def embed_backward(self, micro_batch, slope):
        self.bottoms[micro_batch] = slope


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_every_micro_batch_passes_up_and_in_training_down(training, in_flight):
    network = FakeNetwork()
    engine = Engine(network, Clock(), in_flight)
    engine.run(make_schedule(2, 3, in_flight, training), training)
    assert network.tops == {m: f"{m}:>a<>b<" for m in range(3)}
    assert network.bottoms == ({m: f"{m}!>b<>a<" for m in range(3)} if training else {})
    assert sorted(network.calls) == sorted(
        (layer, m, m % in_flight, training, training) for layer in range(2) for m in range(3)
    )
    assert engine.values == engine.flights == {}  # nothing is left for the next step


def test_each_op_is_timed_and_then_shown():
    network, seen = FakeNetwork(), []
    engine = Engine(network, Clock(), 1)
    schedule = make_schedule(2, 1, 1, True)
    engine.run(schedule, True, lambda flights: seen.append(len(flights)))
    assert seen == [0] + [1] * 4 + [2] * 7 + [1] * 3 + [0] * 2  # a flight lasts from route to route_backward
    assert set(engine.clock.take()) == {"dense", "route", "dispatch", "compute", "combine"}


def test_every_stage_has_a_name_to_be_booked_under():
    assert set(STAGE_NAMES) == {"embed", *FORWARD, "head", *BACKWARD, "embed_backward"}


def test_an_unknown_stage_is_refused(monkeypatch):
    monkeypatch.setitem(STAGE_NAMES, "polish", "dense")
    with pytest.raises(ValueError, match="polish"):
        Engine(FakeNetwork(), Clock(), 1).run([Op("polish", 0, 0)], True)
