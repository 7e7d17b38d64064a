"""Runs a schedule: takes every lane as far as it can go, and carries what one stage leaves for the next."""

import contextlib
from typing import Protocol

import torch

from hpcmoe.errors import HpcmoeError
from hpcmoe.experts.layer import LayerContext
from hpcmoe.pipeline.schedule import Op
from hpcmoe.wait import Backoff


class Network(Protocol):
    """What an engine runs: MoE layers between an embedding and a head."""

    layers: list
    load: object  # [L, E], tokens of each expert / expected, as measured in earlier steps

    def embed(self, micro_batch):
        """Return the first layer's x [T, H]."""

    def head(self, micro_batch, x, contexts):
        """Take the last layer's x [T, H] and all layers' contexts -> the gradient of x, when training."""

    def poll_routing_grads(self, micro_batch):
        """Whether routing_grads can be told without waiting."""

    def routing_grads(self, layer, micro_batch):
        """Return the routing losses' gradients with respect to probability_sum [E] and z_sum []."""

    def embed_backward(self, micro_batch, grad):
        """Take the gradient with respect to the first layer's x [T, H]."""

    def complete_op(self, op):
        """Hear that an op of training is done."""

    def poke(self):
        """Let what goes on beside the schedule progress -> whether any of it has ended."""


class Lane:
    """One lane of a schedule, as far as it has come."""

    def __init__(self, ops, do):
        self.ops, self.do = iter(ops), do
        self.going_on()

    def going_on(self):
        """Turn to the next op."""
        self.op = next(self.ops, None)
        self.pieces = iter(()) if self.op is None else self.do(self.op)

    def step(self):
        """Do the next piece of work, if there is one to do -> whether there was."""
        worked = next(self.pieces, None)
        if worked is None:
            self.going_on()
            return True
        return worked


class Engine:
    """One step of a network, by a schedule."""

    def __init__(self, network, dispatcher, num_in_flight):
        self.network, self.dispatcher, self.clock = network, dispatcher, dispatcher.clock
        self.num_in_flight = num_in_flight
        self.values = {}  # micro-batch: what travels between layers, x on the way up and its gradient on the way down
        self.contexts = {}  # (layer, micro-batch): LayerContext
        self.num_heads = 0  # micro-batches that have passed the head, in order: it begins a sum over all ranks
        self.at = Op("start", 0, 0)  # what was last worked on

    def run(self, schedule, training, observe=None):
        """Do all ops of the schedule; show observe() the contexts after each. Collective over ep and tp."""
        self.num_heads = 0
        with torch.set_grad_enabled(training), self.located_errors():
            lanes = [Lane(ops, lambda op: self.do(op, training, observe)) for ops in schedule]
            self.go(lanes)
            self.drain()
        self.values.clear()
        self.contexts.clear()

    @contextlib.contextmanager
    def located_errors(self):
        """Add to whatever goes wrong which stage saw it; a device tells of it some time after its cause."""
        try:
            yield
        except Exception as error:
            stage, layer, micro_batch = self.at
            place = f"in stage {stage} of layer {layer}, micro-batch {micro_batch}"
            if isinstance(error, HpcmoeError):
                raise type(error)(f"{place}: {error}") from error
            error.add_note(place)
            raise

    def go(self, lanes):
        """Take all lanes to their ends: first those that send and fetch, then one piece of an expert's work."""
        backoff = Backoff()
        while lanes := [lane for lane in lanes if lane.op is not None]:
            sequence_number = self.dispatcher.read_sequence_number()  # before anything is looked at
            moved = self.dispatcher.poke() | self.network.poke()
            for lane in sorted(lanes, key=is_heavy):
                heavy = is_heavy(lane)
                if self.step(lane):
                    moved = True
                    if heavy:
                        break
            if moved:
                backoff.reset()
            else:
                with self.clock.stage(WAITS[lanes[0].op.stage]):
                    self.dispatcher.wait_for_change(backoff, sequence_number)

    def step(self, lane):
        """Do the next piece of a lane -> whether there was one."""
        self.at = lane.op
        with self.clock.stage(STAGE_NAMES[lane.op.stage]):
            return lane.step()

    def drain(self):
        """Wait until this rank has done all that others want of it."""
        backoff = Backoff()
        with self.clock.stage("waiting"):
            while not self.dispatcher.is_idle:
                sequence_number = self.dispatcher.read_sequence_number()
                if self.dispatcher.poke():
                    backoff.reset()
                else:
                    self.dispatcher.wait_for_change(backoff, sequence_number)

    def do(self, op, training, observe):
        """Do one op, piece by piece."""
        yield from self.pieces(op, training)
        if training:
            self.network.complete_op(op)
        if observe is not None:
            observe(self.contexts.values())

    def pieces(self, op, training):
        """Yield True after each piece of an op, and False while it must wait."""
        network, at, m = self.network, (op.layer, op.micro_batch), op.micro_batch
        layer = network.layers[op.layer]
        match op.stage:
            case "embed":
                self.values[m] = network.embed(m)
            case "route":
                self.contexts[at] = LayerContext(op.layer, m, m % self.num_in_flight, training)
                layer.route(self.contexts[at], self.values.pop(m), network.load[op.layer])
            case "dispatch":
                yield from layer.dispatch(self.contexts[at])
            case "compute":
                yield from layer.compute(self.contexts[at])
            case "combine":
                yield from layer.combine(self.contexts[at])
                self.values[m] = self.contexts[at].output
            case "head":
                while self.num_heads < m:
                    yield False
                self.pass_head(m, training)
            case "combine_backward":
                yield from layer.combine_backward(self.contexts[at], self.values.pop(m))
            case "compute_backward":
                yield from layer.compute_backward(self.contexts[at])
            case "route_backward":
                while not network.poll_routing_grads(m):
                    yield False
                yield from layer.route_backward(self.contexts[at], *network.routing_grads(*at))
                self.values[m] = self.contexts.pop(at).output
            case "embed_backward":
                network.embed_backward(m, self.values.pop(m))
            case _:
                raise ValueError(f"unknown stage {op.stage}")

    def pass_head(self, m, training):
        """Give a micro-batch to the head."""
        contexts = [self.contexts[number, m] for number in range(len(self.network.layers))]
        self.values[m] = self.network.head(m, self.values.pop(m), contexts)
        self.num_heads += 1
        if not training:  # no way down needs them
            for number in range(len(contexts)):
                del self.contexts[number, m]


def is_heavy(lane):
    """Whether a lane is at its experts' work, which may wait while others send and fetch."""
    return lane.op is not None and lane.op.stage in ("compute", "compute_backward")


STAGE_NAMES = {  # under which name a stage's seconds are reported
    "embed": "dense",
    "route": "route",
    "dispatch": "dispatch",
    "compute": "compute",
    "combine": "combine",
    "head": "dense",
    "combine_backward": "combine",
    "compute_backward": "compute",
    "route_backward": "dense",
    "embed_backward": "dense",
}
WAITS = STAGE_NAMES | {  # and the seconds that nothing could be done but to wait for it
    "compute": "dispatch",
    "compute_backward": "dispatch",
    "head": "waiting",
    "route_backward": "combine",
}
