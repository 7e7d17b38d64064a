"""Lanes without messages: layers whose stages wait as often as they are told, and note what is done when."""

import contextlib

import torch

from hpcmoe.clock import Clock, Stage
from hpcmoe.pipeline.lanes import Lanes

FORWARD = (Stage.DISPATCH, Stage.COMPUTE, Stage.COMBINE)
BACKWARD = (Stage.COMBINE_BACKWARD, Stage.COMPUTE_BACKWARD, Stage.ROUTE_BACKWARD)


class FakeDispatcher:
    """Pokes a few times before it has nothing left to do."""

    def __init__(self, left=0):
        self.left, self.pokes, self.waits = left, 0, 0

    def wait_for_change(self, backoff):
        self.waits += 1

    @property
    def is_idle(self):
        return self.left == 0

    def poke(self):
        self.pokes += 1
        moved, self.left = self.left > 0, max(self.left - 1, 0)
        return moved


class Context:
    """What a layer of a micro-batch keeps for its way back."""


class Layer(torch.autograd.Function):
    """One layer of a FakeNetwork: doubles what passes, both ways."""

    @staticmethod
    def forward(ctx, x, network, layer):
        ctx.network, ctx.layer, ctx.context = network, layer, Context()
        network.lanes.contexts.add(ctx.context)
        network.pass_stages(FORWARD, layer)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        ctx.network.pass_stages(BACKWARD, ctx.layer)
        ctx.network.lanes.contexts.discard(ctx.context)
        return 2 * grad, None, None


class FakeNetwork:
    """Two layers of three stages each way, each stage of two pieces; `trace` lists (piece, stage, layer, micro-batch).

    delays(micro_batch) tells how often a stage must wait before each piece.
    """

    def __init__(self, kind, delays=lambda micro_batch: 0, left=0):
        self.dispatcher = FakeDispatcher(left)
        self.lanes = Lanes([self.dispatcher], Clock(), kind)
        self.delays, self.trace = delays, []
        self.holds = lambda stage, layer, micro_batch: False  # while true, a stage waits too
        self.weight = torch.ones(3, requires_grad=True)

    def pass_stages(self, stages, layer):
        micro_batch = self.lanes.micro_batch
        self.lanes.run_stages(layer, [(stage, self.pieces(stage, layer, micro_batch)) for stage in stages])

    def pieces(self, stage, layer, micro_batch):
        """Do a stage's two pieces."""
        for piece in range(2):
            for _ in range(self.delays(micro_batch)):
                yield False
            while self.holds(stage, layer, micro_batch):
                yield False
            self.trace.append((piece, stage, layer, micro_batch))
            yield True

    def step(self, micro_batch):
        """Take a micro-batch forward and, with gradients, backward -> its number and the result, 4 times the weight."""
        with self.lanes.stage(Stage.DENSE, 0):
            x = self.weight * (micro_batch + 1)
        for layer in range(2):
            x = Layer.apply(x, self, layer)
        if x.requires_grad:
            x.sum().backward()
        return micro_batch, x.detach()

    def run(self, num_micro_batches, in_flight):
        """Take all micro-batches through -> their results."""
        return self.lanes.run(self.step, num_micro_batches, in_flight)

    def turns(self):
        """List the stages of the trace as they began -> [(stage, layer, micro-batch)]."""
        return [entry[1:] for entry in self.trace if entry[0] == 0]


@contextlib.contextmanager
def open_network(kind, *args, **kwargs):
    """Open a FakeNetwork, and end its threads."""
    network = FakeNetwork(kind, *args, **kwargs)
    try:
        yield network
    finally:
        network.lanes.close()
