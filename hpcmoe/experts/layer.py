"""One mixture-of-experts layer as its stages, forward and mirrored backward.

    forward    route -> dispatch -> compute -> combine
    backward   combine_backward -> compute_backward -> route_backward

Autograd works inside a stage; between stages, where rows travel, the layer hands values and slopes (gradients of the
loss) on by itself. So a schedule may put any other work between two stages of a layer, in the backward pass too.
"""

import numpy as np
import torch
from torch import nn

from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.plan import make_plan, make_send_order


class Flight:
    """What one micro-batch leaves behind in one layer on its way up, for its way down."""

    def __init__(self, layer, micro_batch, berth, training):
        self.layer, self.micro_batch, self.berth = layer, micro_batch, berth
        self.training = training
        self.batches = []  # (batch, input rows, output rows) of the local experts


class MoELayer(nn.Module):
    """A block of the network: `dense` up to the router's input, then the experts, with a residual around both."""

    def __init__(self, dense, router, experts, exchange, chooser):
        """dense: x [T, H] -> (residual, normed) [T, H]; chooser: experts [T, K] -> slots [T, K]."""
        super().__init__()
        self.dense, self.router, self.experts = dense, router, experts
        self.exchange, self.chooser = exchange, chooser

    def route(self, flight, x, load):
        """Choose experts for the tokens x [T, H], and begin to tell their ranks how many rows come."""
        flight.x = x.detach().requires_grad_(flight.training)
        with self.exchange.clock.stage("dense"):
            flight.residual, flight.normed = self.dense(flight.x)
        flight.routing = self.router(flight.normed, load)

        # Host waits for the device here: MPI must know the counts.
        experts, kept = flight.routing.experts.cpu().numpy(), flight.routing.kept.cpu().numpy()
        flight.slots = self.chooser.choose(experts)
        flight.order = make_send_order(flight.slots.ravel(), kept.ravel())
        peers, slots = self.exchange.transport.size, len(self.experts.replicas)
        sent = np.bincount(flight.slots.ravel()[flight.order], minlength=peers * slots)
        flight.sent_to_slot = sent.reshape(peers, slots)
        flight.wait_for_counts = self.exchange.transport.start_counts(flight.sent_to_slot)

    def dispatch(self, flight):
        """Send the tokens to their experts."""
        with self.exchange.clock.stage("dispatch"):
            received = flight.wait_for_counts()
        flight.plan = make_plan(flight.slots, flight.order, flight.sent_to_slot, received)
        rows = flight.normed.detach().to(self.exchange.sizes.dtype)
        self.exchange.start_outward(flight, rows, torch.from_numpy(flight.plan.token_of_row), Direction.DISPATCH)

    def compute(self, flight):
        """Let the experts work on rows as they land, and send the results home."""
        for batch, rows in self.exchange.arrived_batches(flight):
            rows.requires_grad_(flight.training)
            results = self.experts(rows, batch.rows_of_slot)
            self.exchange.put_result(flight, batch, self.experts.sum_over_shards(results.detach()))
            if flight.training:
                flight.batches.append((batch, rows, results))
        self.exchange.start_homeward(flight, Direction.COMBINE)

    def combine(self, flight):
        """Weigh the K results of each token and add them to the residual -> x of the next layer [T, H]."""
        flight.results = self.exchange.finish_homeward(flight)  # [N', H]
        flight.row_of_copy = torch.from_numpy(flight.plan.row_of_copy).to(flight.results.device)  # [T, K]
        copies = flight.results[flight.row_of_copy].float()  # [T, K, H]
        x = flight.residual.detach() + torch.einsum("tk,tkh->th", flight.routing.gates.detach(), copies)
        if not flight.training:
            flight.results = flight.residual = flight.normed = None  # nothing will ask for them
        return x

    def combine_backward(self, flight, slope):
        """Take the slope by the next layer's x [T, H]; send the experts theirs, and keep the gates'."""
        flight.slope = slope
        copies = flight.results[flight.row_of_copy].float()
        flight.gate_slope = torch.einsum("th,tkh->tk", slope, copies)

        # A row's slope is its token's, times its gate.
        gate_of_row = flight.routing.gates.detach().flatten()[flight.plan.copy_of_row]
        rows = slope[flight.plan.token_of_row] * gate_of_row[:, None]
        self.exchange.start_outward(flight, rows.to(self.exchange.sizes.dtype), None, Direction.COMBINE_BACKWARD)

    def compute_backward(self, flight):
        """Go back through the experts as slopes land, and send the slopes by their inputs home."""
        for batch, rows, results in flight.batches:
            results.backward(self.exchange.take_rows(flight, batch))
            self.exchange.put_result(flight, batch, self.experts.sum_over_shards(rows.grad))
        flight.batches = []
        self.exchange.start_homeward(flight, Direction.DISPATCH_BACKWARD)

    def route_backward(self, flight, probability_slope, z_slope):
        """Go back through router and dense part -> slope by this layer's x [T, H].

        probability_slope [E] and z_slope [] are those of the load-balancing and z-losses by the routing's sums.
        """
        copies = self.exchange.finish_homeward(flight)[flight.row_of_copy].float()
        routing = flight.routing
        normed_slope = torch.einsum("tk,tkh->th", routing.kept.float(), copies)
        torch.autograd.backward(
            [flight.residual, flight.normed, routing.gates, routing.probability_sum, routing.z_sum],
            [flight.slope, normed_slope, flight.gate_slope, probability_slope, z_slope],
        )
        return flight.x.grad
