"""One mixture-of-experts layer as its stages, forward and mirrored backward.

    forward    route -> dispatch -> compute -> combine
    backward   combine_backward -> compute_backward -> route_backward

Between stages rows travel, so a schedule may put any other work there, in the backward pass too. A stage that may have
to wait is a generator: it yields True after a piece of work and False when there is nothing to do yet, and whoever
runs it may do something else meanwhile. Autograd works in the dense part and the router alone.
"""

import torch
from torch import nn

from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.router import repeat_for_shards


class LayerContext:
    """What one micro-batch leaves behind in one layer on its way up, for its way down."""

    def __init__(self, layer, micro_batch, buffer_index, training):
        self.layer, self.micro_batch, self.buffer_index = layer, micro_batch, buffer_index
        self.training = training
        self.batches, self.kept = [], []  # of the local experts: Batches, and what each of their chunks kept


class MoELayer(nn.Module):
    """A block of the network: `dense` up to the router's input, then the experts, with a residual around both."""

    def __init__(self, dense, router, experts, dispatcher, chooser):
        """dense: x [T, H] -> (residual, normed) [T, H]; chooser: experts [T, K] -> slots [T, K * shards]."""
        super().__init__()
        self.dense, self.router, self.experts = dense, router, experts
        self.dispatcher, self.chooser = dispatcher, chooser

    def route(self, context, x, load):
        """Choose experts for the tokens x [T, H], and the way of each assignment to them."""
        context.x = x.detach().requires_grad_(context.training)
        with self.dispatcher.clock.stage("dense"):
            context.residual, context.normed = self.dense(context.x)
        context.routing = self.router(context.normed, load)
        context.plan = self.dispatcher.plan(context.routing, self.chooser)
        num_shards = context.plan.top_k // context.routing.gates.shape[1]  # an assignment goes to all of its expert's
        context.gates = repeat_for_shards(context.routing.gates.detach(), num_shards)

    def dispatch(self, context):
        """Offer the tokens to their experts."""
        while not self.dispatcher.poll_ready(context):
            yield False
        self.dispatcher.dispatch(context, context.normed.detach(), context.gates, Direction.DISPATCH)
        yield True

    def compute(self, context):
        """Let the experts work on rows as they come, and lay the results down at the tokens' homes."""
        dispatcher = self.dispatcher
        while self.experts.awaits_weights:
            yield False
        for batch in dispatcher.receive(context):
            if batch is None:
                yield False
                continue
            places, kept = dispatcher.find_rows(context, batch), []
            for number, (part, slots) in enumerate(self.split_chunks(batch)):
                if number > 0:
                    yield True
                dispatcher.traffic.count_batches(context.layer, slots)
                rows, _ = dispatcher.gather(places[part])
                dispatcher.scatter(self.experts(slots, rows, kept if context.training else None), places[part])
            dispatcher.return_batch(context, batch)  # before anything else is done: the homes wait for it
            if context.training:
                context.batches.append(batch)
                context.kept.append(kept)
            yield True

    def split_chunks(self, batch):
        """Cut a batch into what is worked on at once -> (slice, ((slot, rows), ...)) of each."""
        return batch.split_chunks(self.dispatcher.sizes.batch_rows, apart=self.dispatcher.routes.same_order)

    def combine(self, context):
        """Weigh the K results of each token, all shards' parts, and add them to the residual -> the next x [T, H]."""
        while not self.dispatcher.poll_results(context):
            yield False
        total = self.dispatcher.combine(context, context.gates)
        residual = context.residual.detach()
        context.output = total.add_(residual) if total.dtype == residual.dtype else residual + total
        if not context.training:
            context.residual = context.normed = None  # nothing will ask for them
        yield True

    def combine_backward(self, context, grad):
        """Send the experts the next x's gradient [T, H], with the gates that each assignment's share of it has."""
        while not self.dispatcher.poll_ready(context):
            yield False
        context.grad = grad
        self.dispatcher.dispatch(context, grad, context.gates, Direction.COMBINE_BACKWARD)
        yield True

    def compute_backward(self, context):
        """Go back through the experts as gradients come, and scatter those of their inputs and of the gates."""
        dispatcher = self.dispatcher
        for number in dispatcher.receive_again(context, context.batches):
            if number is None:
                yield False
                continue
            batch, kept = context.batches[number], context.kept[number][::-1]
            places = dispatcher.find_rows(context, batch)
            context.kept[number] = None
            for chunk, (part, slots) in enumerate(self.split_chunks(batch)):
                if chunk > 0:
                    yield True
                by_input, by_gate = self.experts.backward(slots, *dispatcher.gather(places[part]), kept)
                dispatcher.scatter(by_input, places[part], by_gate)
            dispatcher.return_batch(context, batch)
            yield True
        context.batches, context.kept = [], []

    def route_backward(self, context, grad_probability, grad_z):
        """Go back through router and dense part -> gradient of x [T, H].

        grad_probability [E] and grad_z [] are the routing losses' gradients with respect to the routing's sums.
        """
        while not self.dispatcher.poll_results(context):
            yield False
        routing = context.routing
        grad_normed = self.dispatcher.combine(context, torch.ones_like(context.gates)).float()
        of_shards = self.dispatcher.gather_gate_grads(context).unflatten(1, (routing.gates.shape[1], -1))
        torch.autograd.backward(
            [context.residual, context.normed, routing.gates, routing.probability_sum, routing.z_sum],
            [context.grad, grad_normed, of_shards.sum(dim=2), grad_probability, grad_z],
        )
        context.output = context.x.grad
        yield True
