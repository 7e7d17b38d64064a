"""Runs a schedule: calls each stage in turn and carries what one stage leaves for the next."""

from typing import Protocol

import torch

from hpcmoe.experts.layer import Flight


class Network(Protocol):
    """What an engine runs: MoE layers between an embedding and a head."""

    layers: list
    load: object  # [L, E], tokens of each expert / expected, as measured in earlier steps

    def embed(self, micro_batch):
        """Return the first layer's x [T, H]."""

    def head(self, micro_batch, x, flights):
        """Take the last layer's x [T, H] and all layers' flights -> the loss's slope by x, when training."""

    def routing_slopes(self, layer, micro_batch):
        """Return the slopes of the routing losses: by probability_sum [E] and by z_sum []."""

    def embed_backward(self, micro_batch, slope):
        """Take the slope by the first layer's x [T, H]."""


class Engine:
    """One step of a network, by a schedule."""

    def __init__(self, network, clock, num_berths):
        self.network, self.clock, self.num_berths = network, clock, num_berths
        self.values = {}  # micro-batch: what travels between layers, x on the way up and its slope on the way down
        self.flights = {}  # (layer, micro-batch): Flight

    def run(self, schedule, training, observe=None):
        """Do every op of the schedule in order; show observe() the flights after each. Collective over ep and tp."""
        with torch.set_grad_enabled(training):
            for op in schedule:
                with self.clock.stage(STAGE_NAMES[op.stage]):
                    self.do(op, training)
                if observe is not None:
                    observe(self.flights.values())
        self.values.clear()
        self.flights.clear()

    def do(self, op, training):
        """Do one op."""
        network, at, m = self.network, (op.layer, op.micro_batch), op.micro_batch
        layer = network.layers[op.layer]
        match op.stage:
            case "embed":
                self.values[m] = network.embed(m)
            case "route":
                self.flights[at] = Flight(op.layer, m, m % self.num_berths, training)
                layer.route(self.flights[at], self.values.pop(m), network.load[op.layer])
            case "dispatch":
                layer.dispatch(self.flights[at])
            case "compute":
                layer.compute(self.flights[at])
            case "combine":
                self.values[m] = layer.combine(self.flights[at])
            case "head":
                flights = [self.flights[number, m] for number in range(len(network.layers))]
                self.values[m] = network.head(m, self.values.pop(m), flights)
                if not training:  # no way down needs them
                    for number in range(len(flights)):
                        del self.flights[number, m]
            case "combine_backward":
                layer.combine_backward(self.flights[at], self.values.pop(m))
            case "compute_backward":
                layer.compute_backward(self.flights[at])
            case "route_backward":
                self.values[m] = layer.route_backward(self.flights.pop(at), *network.routing_slopes(*at))
            case "embed_backward":
                network.embed_backward(m, self.values.pop(m))
            case _:
                raise ValueError(f"unknown stage {op.stage}")


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
