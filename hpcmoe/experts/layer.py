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
from hpcmoe.dispatch.router import for_shards


class Flight:
    """What one micro-batch leaves behind in one layer on its way up, for its way down."""

    def __init__(self, layer, micro_batch, berth, training):
        self.layer, self.micro_batch, self.berth = layer, micro_batch, berth
        self.training = training
        self.batches, self.kept = [], []  # of the local experts: Batches, and what each of their chunks kept


class MoELayer(nn.Module):
    """A block of the network: `dense` up to the router's input, then the experts, with a residual around both."""

    def __init__(self, dense, router, experts, exchange, chooser):
        """dense: x [T, H] -> (residual, normed) [T, H]; chooser: experts [T, K] -> slots [T, K * shards]."""
        super().__init__()
        self.dense, self.router, self.experts = dense, router, experts
        self.exchange, self.chooser = exchange, chooser

    def route(self, flight, x, load):
        """Choose experts for the tokens x [T, H], and the way of each copy to them."""
        flight.x = x.detach().requires_grad_(flight.training)
        with self.exchange.clock.stage("dense"):
            flight.residual, flight.normed = self.dense(flight.x)
        flight.routing = self.router(flight.normed, load)
        flight.plan = self.exchange.plan(flight.routing, self.chooser)
        num_shards = flight.plan.top_k // flight.routing.gates.shape[1]  # a copy goes to all of its expert's
        flight.gates = for_shards(flight.routing.gates.detach(), num_shards)

    def dispatch(self, flight):
        """Offer the tokens to their experts."""
        while not self.exchange.may_start(flight):
            yield False
        self.exchange.start_outward(flight, flight.normed.detach(), flight.gates, Direction.DISPATCH)
        yield True

    def compute(self, flight):
        """Let the experts work on rows as they come, and lay the results down at the tokens' homes."""
        exchange = self.exchange
        while self.experts.awaits_weights:
            yield False
        for batch in exchange.batches(flight):
            if batch is None:
                yield False
                continue
            places, kept = exchange.rows_of(flight, batch), []
            for number, (part, slots) in enumerate(self.portions(batch)):
                if number > 0:
                    yield True
                exchange.traffic.count_batches(flight.layer, slots)
                rows, _ = exchange.take(places[part])
                exchange.lay(self.work(slots, rows, kept if flight.training else None), places[part])
            exchange.finish(flight, batch)  # before anything else is done: the homes wait for it
            if flight.training:
                flight.batches.append(batch)
                flight.kept.append(kept)
            yield True

    def portions(self, batch):
        """Cut a batch into what is worked on at once -> (slice, ((slot, rows), ...)) of each."""
        return batch.portions(self.exchange.sizes.batch_rows, apart=self.exchange.routes.same_order)

    def work(self, slots, rows, kept):
        """Let the experts in some slots work on rows [m, H] grouped by slot -> results [m, H], or this shard's part.

        What their backward pass needs is added to `kept`, which is None in inference.
        """
        results = []
        for slot, own in split_by_slot(slots, rows):
            expert = self.experts.replicas[slot]
            if kept is None:
                results.append(expert(own))
            else:
                result, remembered = expert.forward_kept(own)
                results.append(result)
                kept.append(remembered)
        return join(results)

    def combine(self, flight):
        """Weigh the K results of each token, all shards' parts, and add them to the residual -> the next x [T, H]."""
        while not self.exchange.is_home(flight):
            yield False
        total = self.exchange.sum_home(flight, flight.gates)
        residual = flight.residual.detach()
        flight.output = total.add_(residual) if total.dtype == residual.dtype else residual + total
        if not flight.training:
            flight.residual = flight.normed = None  # nothing will ask for them
        yield True

    def combine_backward(self, flight, grad):
        """Send the experts the next x's gradient [T, H], with the gates that each copy's share of it has."""
        while not self.exchange.may_start(flight):
            yield False
        flight.grad = grad
        self.exchange.start_outward(flight, grad, flight.gates, Direction.COMBINE_BACKWARD)
        yield True

    def compute_backward(self, flight):
        """Go back through the experts as gradients come, and scatter those of their inputs and of the gates."""
        exchange = self.exchange
        for number in exchange.batches_again(flight, flight.batches):
            if number is None:
                yield False
                continue
            batch, kept = flight.batches[number], flight.kept[number][::-1]
            places = exchange.rows_of(flight, batch)
            flight.kept[number] = None
            for portion, (part, slots) in enumerate(self.portions(batch)):
                if portion > 0:
                    yield True
                by_input, by_gate = self.work_back(slots, *exchange.take(places[part]), kept)
                exchange.lay(by_input, places[part], by_gate)
            exchange.finish(flight, batch)
            yield True
        flight.batches, flight.kept = [], []

    def work_back(self, slots, grads, gates, kept):
        """Go back through the experts in some slots, grads [m, H] and gates [m] grouped by slot -> both gradients.

        Each takes what it remembers from the end of `kept`, whose memory is then free for the next.
        """
        by_input, by_gate = [], []
        for (slot, own), (_, own_gates) in zip(split_by_slot(slots, grads), split_by_slot(slots, gates), strict=True):
            of_input, of_gate = self.experts.replicas[slot].backward(kept.pop(), own, own_gates)
            by_input.append(of_input)
            by_gate.append(of_gate)
        return join(by_input), join(by_gate)

    def route_backward(self, flight, grad_probability, grad_z):
        """Go back through router and dense part -> gradient of x [T, H].

        grad_probability [E] and grad_z [] are the routing losses' gradients with respect to the routing's sums.
        """
        while not self.exchange.is_home(flight):
            yield False
        routing = flight.routing
        grad_normed = self.exchange.sum_home(flight, torch.ones_like(flight.gates)).float()
        of_shards = self.exchange.gather_gate_grads(flight).unflatten(1, (routing.gates.shape[1], -1))
        torch.autograd.backward(
            [flight.residual, flight.normed, routing.gates, routing.probability_sum, routing.z_sum],
            [flight.grad, grad_normed, of_shards.sum(dim=2), grad_probability, grad_z],
        )
        flight.output = flight.x.grad
        yield True


def split_by_slot(slots, rows):
    """Split rows [m, ...] among slots, ((slot, rows), ...) -> (slot, its rows) of each; the last takes any padding."""
    counts = [count for _, count in slots[:-1]]
    parts = rows.split([*counts, len(rows) - sum(counts)])
    return [(slot, part) for (slot, _), part in zip(slots, parts, strict=True)]


def join(parts):
    """Join tensors along their rows; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
