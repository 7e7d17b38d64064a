"""Routing equals a slow loop over tokens; the losses are what their papers say, and so are their gradients."""

import itertools
import math

import numpy as np
import pytest
import torch

from hpcmoe.config import DispatchConfig
from hpcmoe.dispatch.router import Router, Softmax, load_balancing_grad, load_balancing_loss

NUM_TOKENS, NUM_EXPERTS, HIDDEN = 23, 5, 4
CASES = [
    dict(zip(("renormalize", "load_feedback", "load_feedback_on", "capacity_factor"), values, strict=True))
    for values in itertools.product((True, False), (0.0, 0.7), ("selection", "both"), (0.0, 0.6, 1.0))
]


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def route_slowly(weight, x, load, top_k, config, bias):
    """Route one token after the other, in float64 -> (experts, gates, kept, probability sum, z sum, assignments)."""
    experts, gates = np.zeros((2, len(x), top_k))
    kept, probability, z = np.ones((len(x), top_k), bool), np.zeros(len(weight)), 0.0
    for t, token in enumerate(x):
        logits = weight @ token
        damped = logits - config.load_feedback * load
        experts[t] = np.argsort(-(damped + bias))[:top_k]
        gates[t] = softmax(damped if config.load_feedback_on == "both" else logits)[experts[t].astype(int)]
        if config.renormalize and top_k > 1:
            gates[t] /= gates[t].sum()
        probability += softmax(logits)
        z += math.log(np.exp(logits).sum()) ** 2

    # First choices of all tokens find room before any second choice.
    assignments = np.zeros(len(weight), int)
    for k, t in itertools.product(range(top_k), range(len(x))):
        expert = int(experts[t, k])
        assignments[expert] += 1
        if config.capacity_factor:
            kept[t, k] = assignments[expert] <= math.ceil(config.capacity_factor * len(x) * top_k / len(weight))
    return experts, gates * kept, kept, probability, z, assignments


def draw(num_tokens, seed):
    """Draw weights, tokens and a load."""
    random = np.random.default_rng(seed)
    shapes = ((NUM_EXPERTS, HIDDEN), (num_tokens, HIDDEN), NUM_EXPERTS)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("bias", [0.0, 1.5])
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_routing_equals_a_loop_over_tokens(case, top_k, bias):
    config = DispatchConfig(**case)
    weight, x, load = draw(NUM_TOKENS, seed=top_k)
    router = Router(torch.from_numpy(weight), top_k, config)
    router.bias += bias * torch.arange(NUM_EXPERTS).remainder(2)
    routing = router(torch.from_numpy(x), torch.from_numpy(load))
    experts, gates, kept, probability, z, assignments = route_slowly(
        weight, x, load, top_k, config, router.bias.numpy()
    )
    assert np.array_equal(routing.experts, experts)
    if case["capacity_factor"]:
        assert np.array_equal(routing.kept, kept)
    else:
        assert routing.kept is None
    assert np.allclose(routing.gates.detach(), gates, atol=1e-6)
    assert np.allclose(routing.probability_sum.detach(), probability, rtol=1e-5)
    assert routing.z_sum.item() == pytest.approx(z, rel=1e-5)
    assert np.array_equal(routing.tokens_of_expert, assignments)
    assert routing.num_dropped == (~kept).sum()
    assert (routing.num_dropped > 0) == (case["capacity_factor"] > 0 and top_k < NUM_EXPERTS or
                                         case["capacity_factor"] == 0.6)  # fmt: skip


def test_the_bias_chooses_and_weighs_nothing():
    """Where all experts are chosen a bias changes nothing, not the gates either; where one is, it decides which."""
    weight, x, load = (torch.from_numpy(array) for array in draw(NUM_TOKENS, seed=0))
    for on in ("selection", "both"):
        router, biased = (Router(weight, NUM_EXPERTS, DispatchConfig(load_feedback_on=on)) for _ in range(2))
        biased.bias[3] = 1e3
        plain, moved = (dense_gates(r(x, load)) for r in (router, biased))
        assert torch.allclose(plain, moved, rtol=1e-6)
        biased.top_k = 1
        routing = biased(x, load)
        assert (routing.experts == 3).all() and torch.allclose(
            routing.gates[:, 0], plain_probability(router, x, load, on)
        )
        assert routing.probability_sum[3] < NUM_TOKENS / 2  # the losses see the router as it is
    assert "bias" not in dict(router.named_parameters())


def plain_probability(router, x, load, on):
    """The probability of expert 3 in softmax(logits), under the load where it acts on weights too -> [T]."""
    pressure = router.settings.load_feedback * load if on == "both" else 0
    return (x @ router.weight.detach().t() - pressure).softmax(dim=-1)[:, 3]


def dense_gates(routing):
    """Lay a routing's gates out by expert -> [T, E]."""
    return torch.zeros(NUM_TOKENS, NUM_EXPERTS).scatter(1, routing.experts, routing.gates.detach())


@pytest.mark.parametrize("on", ["selection", "both"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gradients_are_those_of_finite_differences(renormalize, on):
    """In float64, of the gates by the tokens and of both losses; what is chosen stays so over such small steps."""
    weight, x, load = (torch.from_numpy(array).double() for array in draw(NUM_TOKENS, seed=0))
    config = DispatchConfig(renormalize=renormalize, load_feedback=0.7, load_feedback_on=on)
    logits = (x @ weight.t()).requires_grad_()
    pressure = config.load_feedback * load if on == "both" else None
    experts = (logits.detach() - config.load_feedback * load).topk(2).indices
    assert torch.autograd.gradcheck(lambda logits: Softmax.apply(logits, pressure, experts, renormalize), logits)


def test_no_tokens_give_an_empty_routing():
    weight, x, load = (torch.from_numpy(array) for array in draw(0, seed=0))
    routing = Router(weight, 2, DispatchConfig(capacity_factor=1.0))(x, load)
    assert routing.experts.shape == routing.gates.shape == routing.kept.shape == (0, 2)
    assert routing.tokens_of_expert.tolist() == [0] * NUM_EXPERTS
    assert routing.num_dropped == 0 and routing.z_sum.item() == 0 and not routing.probability_sum.any()


def test_the_router_computes_in_float32_whatever_comes():
    weight, x, load = (torch.from_numpy(array) for array in draw(NUM_TOKENS, seed=0))
    rounded = x.bfloat16()
    router = Router(weight, 2, DispatchConfig())
    routing, expected = router(rounded, load), router(rounded.float(), load)
    assert routing.gates.dtype == torch.float32 and torch.equal(routing.gates, expected.gates)


def test_a_dropped_copy_has_no_gradient():
    weight, x, load = (torch.from_numpy(array) for array in draw(NUM_TOKENS, seed=0))
    routing = Router(weight, 2, DispatchConfig(capacity_factor=0.5, renormalize=False))(x.requires_grad_(), load)
    routing.gates.sum().backward()
    lost = ~routing.kept.any(dim=1)
    assert lost.any() and not x.grad[lost].any() and x.grad[~lost].any(dim=1).all()


def test_the_load_balancing_loss_is_one_when_even_and_the_number_of_experts_when_all_choose_one():
    even, all_to_one = torch.full((4,), 6), torch.tensor([0, 24, 0, 0])
    assert load_balancing_loss(even, torch.full((4,), 3.0), 12).item() == pytest.approx(1)
    assert load_balancing_loss(all_to_one, torch.tensor([0.0, 12.0, 0.0, 0.0]), 12).item() == pytest.approx(4)
    assert load_balancing_loss(all_to_one, torch.full((4,), 3.0), 12).item() == pytest.approx(1)


def test_the_load_balancing_gradient_is_autograds():
    assignments = torch.tensor([3, 0, 7, 2])
    probability = torch.rand(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    load_balancing_loss(assignments, probability, 6).backward()
    assert torch.allclose(load_balancing_grad(assignments, 6), probability.grad)
    by_hand = 4 * (assignments / 12) @ (probability / 6)
    assert load_balancing_loss(assignments, probability, 6).item() == pytest.approx(by_hand.item())


def test_no_tokens_balance_to_nothing():
    none = torch.zeros(4, dtype=torch.int64)
    assert not load_balancing_grad(none, 0).any() and load_balancing_loss(none, torch.zeros(4), 0) == 0
