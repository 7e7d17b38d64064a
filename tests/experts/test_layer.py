"""A layer's stages, each called by hand, compute what one formula and autograd do."""

import numpy as np
import pytest
import torch
from small import make_dispatcher
from torch import nn

from hpcmoe.config import DispatchConfig
from hpcmoe.dispatch.plan import SlotChooser
from hpcmoe.dispatch.router import Router
from hpcmoe.experts.feed_forward import Expert, LocalExperts
from hpcmoe.experts.layer import LayerContext, MoELayer

HIDDEN, FEED_FORWARD, NUM_EXPERTS, TOP_K, TOKENS = 4, 6, 3, 2, 11
EXPERT_OF_SLOT, SLOT_OF_EXPERT = np.array([2, -1, 0, 1]), (2, 3, 0)
SLOTS = np.arange(4)[:, None]  # of a replica's only shard


class Double(nn.Module):
    """A dense part that is easy to follow."""

    def forward(self, x):
        return 2 * x, x**2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(capacity_factor=0.0):
    """A layer on one rank without MPI; one slot is empty, and the others are not in the experts' order."""
    replicas = [
        nn.Identity() if expert < 0 else Expert(
            "gelu", {"up": draw(FEED_FORWARD, HIDDEN, seed=expert), "down": draw(HIDDEN, FEED_FORWARD, seed=expert + 9)}
        )
        for expert in EXPERT_OF_SLOT.tolist()
    ]  # fmt: skip
    router = Router(draw(NUM_EXPERTS, HIDDEN, seed=5), TOP_K, DispatchConfig(capacity_factor=capacity_factor))
    experts = LocalExperts(replicas)
    chooser = SlotChooser(EXPERT_OF_SLOT, (EXPERT_OF_SLOT >= 0).astype(float), SLOTS, NUM_EXPERTS, 0)
    return MoELayer(Double(), router, experts, make_dispatcher(HIDDEN, slots=4, batch_rows=4), chooser)


def run_forward(layer, x, training):
    context = LayerContext(layer=0, micro_batch=0, training=training)
    layer.route(context, x, torch.ones(NUM_EXPERTS))
    for stage in (layer.dispatch, layer.compute, layer.combine):
        go(layer, stage(context))
    return context, context.output


def run_backward(layer, context, grad, grad_probability, grad_z):
    go(layer, layer.combine_backward(context, grad))
    go(layer, layer.compute_backward(context))
    go(layer, layer.route_backward(context, grad_probability, grad_z))
    return context.output


def go(layer, stage):
    """Take a stage to its end: alone on a rank it waits for nobody, but for the last descriptors to be read."""
    pieces = 0
    for worked in stage:
        layer.dispatcher.poke()
        pieces += worked
    return pieces


def by_formula(layer, routing, x):
    """Residual plus the gated sum of every expert's output."""
    y = 2 * x
    for expert, slot in enumerate(SLOT_OF_EXPERT):
        gate = (routing.gates * (routing.experts == expert)).sum(dim=1, keepdim=True)
        replica = layer.experts.replicas[slot]
        y = y + gate * (nn.functional.gelu(x**2 @ replica.up.T) @ replica.down.T)
    return y


@pytest.mark.parametrize("capacity_factor", [0.0, 0.7])
def test_the_stages_forward_give_the_residual_and_the_gated_sum(capacity_factor):
    layer = make_layer(capacity_factor)
    x = draw(TOKENS, HIDDEN, seed=7)
    with torch.no_grad():
        context, y = run_forward(layer, x, training=False)
        assert torch.allclose(y, by_formula(layer, context.routing, x), atol=1e-6)
    assert (context.routing.num_dropped > 0) == (capacity_factor > 0)
    assert context.batches == []  # nothing is kept where no backward follows


@pytest.mark.parametrize("capacity_factor", [0.0, 0.7])
def test_the_stages_backward_give_autograds_gradients(capacity_factor):
    layer = make_layer(capacity_factor)
    x, grad = draw(TOKENS, HIDDEN, seed=7), draw(TOKENS, HIDDEN, seed=8)
    grad_probability, grad_z = draw(NUM_EXPERTS, seed=3), torch.tensor(0.3)

    # Go up and down by the stages.
    context, _ = run_forward(layer, x, training=True)
    grad_x = run_backward(layer, context, grad, grad_probability, grad_z)
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert context.batches == []

    # And at once, by autograd.
    layer.zero_grad()
    x = x.requires_grad_()
    routing = layer.router(x**2, torch.ones(NUM_EXPERTS))
    loss = (by_formula(layer, routing, x) * grad).sum()
    (loss + routing.probability_sum @ grad_probability + grad_z * routing.z_sum).backward()
    assert torch.allclose(grad_x, x.grad, rtol=1e-4, atol=1e-5)
    assert grads.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, rtol=1e-4, atol=1e-5), name


def test_a_micro_batch_without_tokens_passes():
    layer = make_layer()
    context, y = run_forward(layer, torch.zeros(0, HIDDEN), training=True)
    assert y.shape == (0, HIDDEN)
    grad_x = run_backward(layer, context, torch.zeros(0, HIDDEN), torch.zeros(NUM_EXPERTS), torch.tensor(0.0))
    assert grad_x.shape == (0, HIDDEN)


def test_the_experts_work_comes_in_pieces():
    """Eleven tokens' twenty-two assignments, about four rows at once, and no slot's rows with another's."""
    layer = make_layer()
    context = LayerContext(layer=0, micro_batch=0, training=True)
    layer.route(context, draw(TOKENS, HIDDEN, seed=7), torch.ones(NUM_EXPERTS))
    go(layer, layer.dispatch(context))
    pieces = sum(max(round(rows / 4), rows > 0) for rows in context.plan.counts.ravel().tolist())
    assert go(layer, layer.compute(context)) == pieces > 3
