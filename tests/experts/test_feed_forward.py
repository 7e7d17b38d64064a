"""Experts compute their formulas and go back as autograd would, with the same weights however they are split."""

import pytest
import torch
from kinks import draw_off_kinks
from small import make_config
from torch import nn

from hpcmoe import gemm
from hpcmoe.experts.feed_forward import MATRICES, Expert, LocalExperts, backward, make_expert_weights, split_axis
from hpcmoe.experts.shapes import make_expert_shape

KINDS = list(MATRICES)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(kind, w, x):
    """An expert written out, x [n, H]; absent biases are zero."""
    bias = {name: w.get(f"{name}_bias", torch.tensor(0.0)) for name in MATRICES[kind]}
    up = x @ w["up"].T + bias["up"]
    match kind:
        case "gelu":
            hidden = 0.5 * up * (1 + torch.erf(up / 2**0.5))
        case "relu":
            hidden = up.clamp(min=0)
        case "swiglu":
            gate = x @ w["gate"].T + bias["gate"]
            hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden @ w["down"].T + bias["down"]


def draw_weights(kind, bias, hidden=6, feed_forward=10):
    shapes = {"up": (feed_forward, hidden), "gate": (feed_forward, hidden), "down": (hidden, feed_forward)}
    weights = {name: draw(*shapes[name], seed=seed) for seed, name in enumerate(MATRICES[kind])}
    if bias:
        weights |= {f"{name}_bias": draw(shapes[name][0], seed=9 + len(name)) for name in MATRICES[kind]}
    return weights


def near(found, expected, dtype):
    """Return True if arrays agree up to what the precision rounds, by the norm of their difference."""
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    return ((found.double() - expected).norm() <= bound * expected.norm()).item()


@pytest.fixture(params=["as this machine does", "by torch alone"])
def multiplier(request, monkeypatch):
    """Whatever choose_gemm finds here, and the fallback."""
    if request.param == "by torch alone":
        monkeypatch.setattr(gemm, "choose_gemm", lambda device, dtype: gemm.TorchGemm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_computes_its_formula(kind, bias, dtype, packed, multiplier):
    weights = draw_weights(kind, bias)
    expert = Expert(kind, weights, packed)
    for num_rows in (1, 7, 70):
        x = draw(num_rows, 6, seed=5).to(dtype)
        y = expert(x)
        assert y.dtype == dtype and y.is_contiguous() and not y.requires_grad
        assert near(y, by_formula(kind, {name: w.to(dtype).double() for name, w in weights.items()}, x.double()), dtype)
        kept = []
        again = expert(x, kept)
        assert near(again, y.double(), dtype)
        assert sum(tensor.numel() for tensor in kept[0]) == num_rows * (6 + 10 * (len(MATRICES[kind]) - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_goes_back_as_autograd_does_on_the_formula(kind, bias, dtype, multiplier):
    """Over several batches, all gone up before the first goes back, with gates among which one is zero."""
    weights, gathered = draw_weights(kind, bias), draw(10, 6, seed=30)
    expert = Expert(kind, weights)
    expert.up.grad = gathered.clone()  # what another micro-batch left there
    exact = {name: weight.to(dtype).double().requires_grad_() for name, weight in weights.items()}
    batches = []
    for num_rows in (1, 5, 64, 150):
        generator = torch.Generator().manual_seed(num_rows)
        x = draw_off_kinks(num_rows, weights["up"], weights.get("up_bias"), generator).to(dtype)
        grad_y = draw(num_rows, 6, seed=num_rows + 1).to(dtype)
        gates = draw(num_rows, seed=num_rows + 2).sigmoid()
        gates[num_rows // 2] = 0
        kept = []
        expert(x, kept)
        batches.append((x, grad_y, gates, kept[0]))

    found, expected = [], []
    for x, grad_y, gates, kept in batches:
        before = grad_y.clone(), gates.clone()
        grad_x, grad_gate = backward(expert.kind, expert.matrices, kept, grad_y, gates)
        assert torch.equal(grad_y, before[0]) and torch.equal(gates, before[1])
        assert grad_x.dtype == dtype and grad_gate.dtype == torch.float32 and grad_x.is_contiguous()

        exact_x, exact_gates = x.double().requires_grad_(), gates.double().requires_grad_()
        (grad_y.double() * exact_gates[:, None] * by_formula(kind, exact, exact_x)).sum().backward()
        found.append((grad_x, grad_gate))
        expected.append((exact_x.grad, exact_gates.grad))

    for parts, exact_parts in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        assert near(torch.cat(parts), torch.cat(exact_parts), dtype)
    exact["up"].grad += gathered
    for name, weight in exact.items():
        gradient = getattr(expert, name).grad
        assert gradient.dtype == torch.float32 and near(gradient, weight.grad, dtype), name


@pytest.mark.parametrize("write", ["in place", "through data", "by fused AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_weights_count_after_refresh(dtype, write):
    """All of them, the biases too, however they were written."""
    weights, x = draw_weights("swiglu", True), draw(9, 6, seed=5).to(dtype)
    expert = Expert("swiglu", weights, packed=write == "in place")
    kept = []
    before = expert(x, kept)
    backward(expert.kind, expert.matrices, kept.pop(), before, torch.ones(9))
    expert(x)

    if write == "by fused AdamW":
        torch.optim.AdamW(expert.parameters(), lr=0.5, fused=True).step()
    for parameter in expert.parameters():
        if write == "in place":
            with torch.no_grad():
                parameter.copy_(parameter * 1.5)
        elif write == "through data":
            parameter.data.mul_(1.5)
    LocalExperts([nn.Identity(), expert]).refresh()

    now = {name: parameter.detach().to(dtype).double() for name, parameter in expert.named_parameters()}
    y = expert(x, kept)
    expected = by_formula("swiglu", now, x.double())
    assert near(y, expected, dtype) and near(expert(x), expected, dtype) and not near(before, expected, dtype)
    fresh = Expert("swiglu", {name: parameter.detach().clone() for name, parameter in expert.named_parameters()})
    grad_x, _ = backward(fresh.kind, fresh.matrices, kept[0], before, torch.ones(9))
    assert torch.allclose(backward(expert.kind, expert.matrices, kept[0], before, torch.ones(9))[0], grad_x)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="tanh"):
        Expert("tanh", draw_weights("gelu", False))


def test_local_experts_count_the_casts_of_their_matrices():
    replicas = [
        Expert("gelu", draw_weights("gelu", True)),
        nn.Identity(),
        Expert("swiglu", draw_weights("swiglu", False)),
    ]
    experts = LocalExperts(replicas)
    for expert in replicas:
        expert(draw(3, 6))
    assert experts.cast_bytes == 0
    itemsize = gemm.count_cast_bytes(torch.bfloat16, torch.float32, False)
    replicas[0](draw(3, 6).bfloat16())
    assert experts.cast_bytes == 2 * 60 * itemsize
    replicas[2](draw(3, 6).bfloat16())
    assert experts.cast_bytes == 5 * 60 * itemsize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor_size", [2, 3, 4])
def test_shards_join_to_the_whole_and_their_partial_sums_add_up(kind, tensor_size):
    config = make_config(experts__kind=kind, experts__bias=True)
    shape = make_expert_shape(config.spec)
    whole = make_expert_weights(shape, (0, 1, 2), 0, 1)
    shards = [make_expert_weights(shape, (0, 1, 2), index, tensor_size) for index in range(tensor_size)]
    for name in MATRICES[kind]:
        assert torch.equal(torch.cat([shard[name] for shard in shards], dim=split_axis(name)), whole[name])
        assert all(shard[name].is_contiguous() for shard in shards)

    # Biases start at zero: give them values, of which each shard has its part and the first the output's.
    for name in MATRICES[kind]:
        whole[f"{name}_bias"] = draw(len(whole[name]), seed=3)
        for index, shard in enumerate(shards):
            assert (f"{name}_bias" in shard) == (name != "down" or index == 0)
            if name != "down":
                shard[f"{name}_bias"] = whole[f"{name}_bias"].chunk(tensor_size)[index]
    shards[0]["down_bias"] = whole["down_bias"]
    x = draw(5, config.model.hidden)
    partial_sums = [Expert(kind, shard)(x) for shard in shards]
    assert torch.allclose(sum(partial_sums), Expert(kind, whole)(x), atol=1e-5)

    # Gradients of input and gates are partial sums too.
    def go_back(weights):
        expert = Expert(kind, weights)
        expert(x, kept := [])
        return backward(expert.kind, expert.matrices, kept[0], draw(5, config.model.hidden, seed=1), draw(5, seed=2))

    for parts, joined in zip(zip(*map(go_back, shards), strict=True), go_back(whole), strict=True):
        assert torch.allclose(sum(parts), joined, atol=1e-5)


def test_each_expert_of_each_layer_and_seed_has_weights_of_its_own():
    drawn = [
        make_expert_weights(make_expert_shape(make_config().spec), (seed, layer, expert), 0, 1)["up"]
        for seed in range(2) for layer in range(2) for expert in range(3)
    ]  # fmt: skip
    for index, weights in enumerate(drawn):
        assert not any(torch.equal(weights, other) for other in drawn[:index])
    again = make_expert_weights(make_expert_shape(make_config().spec), (1, 1, 2), 0, 1)["up"]
    assert torch.equal(again, drawn[-1])


@pytest.mark.parametrize("seed", [20_240_601, 2**32])
def test_any_seed_the_config_allows_draws_weights(seed):
    assert make_expert_weights(make_expert_shape(make_config().spec), (seed, 1, 2), 0, 1)["up"].any()


def test_weights_have_the_variance_of_one_over_their_inputs():
    config = make_config(model__hidden=100, model__feed_forward=400)
    weights = make_expert_weights(make_expert_shape(config.spec), (0, 0, 0), 0, 1)
    assert weights["up"].shape == (400, 100) and weights["down"].shape == (100, 400)
    assert weights["up"].std().item() == pytest.approx(0.1, rel=0.02)
    assert weights["down"].std().item() == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_have_no_gradients_and_the_others_have_theirs(kind):
    shape = make_expert_shape(make_config(experts__kind=kind, experts__bias=True).spec)
    whole, part = (Expert(kind, make_expert_weights(shape, (0, 0, 0), 0, 1)) for _ in range(2))
    part.up.requires_grad_(False)
    part.down_bias.requires_grad_(False)
    x, grad_y, gates = draw(5, shape.hidden), draw(5, shape.hidden, seed=1), draw(5, seed=2)
    for expert in (whole, part):
        kept = []
        expert(x, kept)
        backward(kind, expert.matrices, kept.pop(), grad_y, gates)
    assert part.up.grad is None and part.down_bias.grad is None
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, whole.get_parameter(name).grad), name
