"""One mixture-of-experts layer as its stages, forward and mirrored backward.

    forward    route -> dispatch -> compute -> combine
    backward   combine_backward -> compute_backward -> route_backward

Between stages rows travel, so a schedule may put any other work there, in the backward pass too. A stage that may have
to wait is a generator: it yields True after a piece of work and False when there is nothing to do yet, and whoever
runs it may do something else meanwhile. Autograd works in the dense part and the router alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpcmoe.clock import Timer
from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.dispatcher import ExchangeId, TokenDispatcher
from hpcmoe.dispatch.plan import SlotChooser
from hpcmoe.dispatch.router import Router, Routing, repeat_for_shards
from hpcmoe.experts.feed_forward import Kept, LocalExperts


@dataclass(slots=True, kw_only=True, eq=False)
class LayerContext:
    """What one micro-batch leaves behind in one layer in its forward pass, for its backward pass."""

    layer: int
    micro_batch: int
    training: bool
    x: Tensor = field(init=False)  # [T, H], the input of the dense part
    residual: Tensor = field(init=False)  # [T, H]
    normed: Tensor = field(init=False)  # [T, H], the router's input
    routing: Routing = field(init=False)
    gates: Tensor = field(init=False)  # [T, K * shards] float32
    plan: Any = field(init=False)  # the dispatcher's, as the handle and batches
    handle: Any = field(init=False)  # of the exchange under way
    batches: list[Any] = field(default_factory=list)  # of this rank's experts
    kept: list[list[Kept]] = field(default_factory=list)  # of each batch, what its experts need for their backward
    output: Tensor = field(init=False)  # [T, H], the next layer's x; after the backward pass the gradient of x
    grad_output: Tensor = field(init=False)  # [T, H]


class MoELayer(nn.Module):
    """A block of the network: `dense` up to the router's input, then the experts, with a residual around both."""

    def __init__(
        self, dense: nn.Module, router: Router, experts: LocalExperts, dispatcher: TokenDispatcher, chooser: SlotChooser
    ) -> None:
        """dense: x [T, H] -> (residual, normed) [T, H]; chooser: experts [T, K] -> slots [T, K * shards]."""
        super().__init__()
        self.dense, self.router, self.experts = dense, router, experts
        self.dispatcher, self.chooser = dispatcher, chooser

    def route(self, context: LayerContext, x: Tensor, load: Tensor) -> None:
        """Choose experts for the tokens x [T, H], and plan the way of each assignment to them."""
        context.x = x.detach().requires_grad_(context.training)
        with self.dispatcher.clock.measure(Timer.DENSE):
            context.residual, context.normed = self.dense(context.x)
        context.routing = self.router(context.normed, load)
        context.plan = self.dispatcher.plan(context.routing, self.chooser)
        num_shards = context.plan.top_k // context.routing.gates.shape[1]  # one assignment to each shard of an expert
        context.gates = repeat_for_shards(context.routing.gates.detach(), num_shards)

    def dispatch(self, context: LayerContext) -> Iterator[bool]:
        """Send the tokens to their experts."""
        yield from self.start(context, context.normed.detach(), Direction.DISPATCH)

    def start(self, context: LayerContext, rows: Tensor, direction: Direction) -> Iterator[bool]:
        """Start an exchange of rows [T, H] as soon as it can."""
        exchange = ExchangeId(context.layer, context.micro_batch, direction)
        while not self.dispatcher.poll_ready(context.plan, exchange):
            yield False
        context.handle = self.dispatcher.dispatch(context.plan, rows, context.gates, exchange)
        yield True

    def compute(self, context: LayerContext) -> Iterator[bool]:
        """Compute on rows as they come, and scatter the results to where they go home from."""
        dispatcher = self.dispatcher
        while self.experts.awaits_weights:
            yield False
        for batch in dispatcher.receive(context.handle):
            if batch is None:
                yield False
                continue
            kept: list[Kept] = []
            for number, chunk in enumerate(dispatcher.split(context.handle, batch)):
                if number > 0:
                    yield True
                dispatcher.traffic.count_batches(context.layer, chunk.slots)
                rows, _ = dispatcher.gather(chunk.rows)
                dispatcher.scatter(self.experts(chunk.slots, rows, kept if context.training else None), chunk.rows)
            dispatcher.return_batch(context.handle, batch)  # before anything else is done: the homes wait for it
            if context.training:
                context.batches.append(batch)
                context.kept.append(kept)
            yield True

    def combine(self, context: LayerContext) -> Iterator[bool]:
        """Add the results of each token, times their gates, to the residual: the next x [T, H]."""
        while not self.dispatcher.poll_results(context.handle):
            yield False
        total = self.dispatcher.combine(context.handle, context.gates)
        residual = context.residual.detach()
        context.output = total.add_(residual) if total.dtype == residual.dtype else residual + total
        if not context.training:
            del context.residual, context.normed  # nothing will ask for them
        yield True

    def combine_backward(self, context: LayerContext, grad_output: Tensor) -> Iterator[bool]:
        """Send the gradient of the next x [T, H] to the experts, with each assignment's gate."""
        context.grad_output = grad_output
        yield from self.start(context, grad_output, Direction.COMBINE_BACKWARD)

    def compute_backward(self, context: LayerContext) -> Iterator[bool]:
        """Compute the gradients of inputs and gates at the experts, as gradients come, and scatter them."""
        dispatcher = self.dispatcher
        for index in dispatcher.receive_again(context.handle, context.batches):
            if index is None:
                yield False
                continue
            batch, kept = context.batches[index], context.kept[index][::-1]
            context.kept[index] = []
            for number, chunk in enumerate(dispatcher.split(context.handle, batch)):
                if number > 0:
                    yield True
                grad_x, grad_gates = self.experts.backward(chunk.slots, *dispatcher.gather(chunk.rows), kept)
                dispatcher.scatter(grad_x, chunk.rows, grad_gates)
            dispatcher.return_batch(context.handle, batch)
            yield True
        context.batches, context.kept = [], []
        self.experts.gradients_added()

    def route_backward(self, context: LayerContext, grad_probability: Tensor, grad_z: Tensor) -> Iterator[bool]:
        """Compute the gradient of x [T, H] through router and dense part.

        grad_probability [E] and grad_z [] are the routing losses' gradients with respect to the routing's sums.
        """
        while not self.dispatcher.poll_results(context.handle):
            yield False
        routing = context.routing
        grad_normed = self.dispatcher.combine(context.handle, torch.ones_like(context.gates)).float()
        of_shards = self.dispatcher.gather_gate_grads(context.handle).unflatten(1, (routing.gates.shape[1], -1))
        torch.autograd.backward(
            [context.residual, context.normed, routing.gates, routing.probability_sum, routing.z_sum],
            [context.grad_output, grad_normed, of_shards.sum(dim=2), grad_probability, grad_z],
        )
        assert context.x.grad is not None
        context.output = context.x.grad
        yield True
