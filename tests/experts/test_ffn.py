"""Experts compute their formulas, batch by batch as in one piece, with the same weights however they are split."""

from types import SimpleNamespace

import pytest
import torch
from small import make_config
from torch import nn

from hpcmoe.experts.ffn import MATRICES, Expert, LocalExperts, make_expert_weights, split_axis

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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_computes_its_formula(kind, bias):
    weights, x = draw_weights(kind, bias), draw(7, 6, seed=5)
    y = Expert(kind, weights)(x)
    assert torch.allclose(y, by_formula(kind, weights, x), atol=1e-5)
    rounded = Expert(kind, weights)(x.bfloat16())
    assert rounded.dtype == torch.bfloat16 and torch.allclose(rounded.float(), y, atol=0.5, rtol=0.1)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="tanh"):
        Expert("tanh", draw_weights("gelu", False))(draw(2, 6))


def make_experts(max_batch_rows):
    replicas = [Expert("gelu", draw_weights("gelu", True)), nn.Identity(), Expert("relu", draw_weights("relu", False))]
    return LocalExperts(replicas, SimpleNamespace(size=1), max_batch_rows)


@pytest.mark.parametrize("max_batch_rows", [1, 2, 5, 100])
@pytest.mark.parametrize("rows_of_slot", [(7, 0, 4), (0, 0, 3), (1, 0, 0)])
def test_local_experts_work_on_their_own_rows_in_batches(max_batch_rows, rows_of_slot, monkeypatch):
    experts, x = make_experts(max_batch_rows), draw(sum(rows_of_slot), 6)
    batch_sizes, work = [], Expert.work
    monkeypatch.setattr(Expert, "work", lambda self, x, w: batch_sizes.append(len(x)) or work(self, x, w))
    y = experts(x, torch.tensor(rows_of_slot).numpy())
    assert max(batch_sizes) <= max_batch_rows and min(batch_sizes) > 0 and sum(batch_sizes) == len(x)
    first, _, last = x.split(rows_of_slot)
    expected = [experts.replicas[slot](rows) for slot, rows in ((0, first), (2, last)) if len(rows)]
    assert torch.allclose(y, torch.cat(expected), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor_size", [2, 3, 4])
def test_shards_join_to_the_whole_and_their_partial_sums_add_up(kind, tensor_size):
    config = make_config(experts__kind=kind, experts__bias=True)
    whole = make_expert_weights(config, 1, 2, 0, 1)
    shards = [make_expert_weights(config, 1, 2, index, tensor_size) for index in range(tensor_size)]
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


def test_each_expert_of_each_layer_and_seed_has_weights_of_its_own():
    drawn = [
        make_expert_weights(make_config(run__seed=seed), layer, expert, 0, 1)["up"]
        for seed in range(2) for layer in range(2) for expert in range(3)
    ]  # fmt: skip
    for index, weights in enumerate(drawn):
        assert not any(torch.equal(weights, other) for other in drawn[:index])
    again = make_expert_weights(make_config(run__seed=1), 1, 2, 0, 1)["up"]
    assert torch.equal(again, drawn[-1])


@pytest.mark.parametrize("seed", [20_240_601, 2**32])
def test_any_seed_the_config_allows_draws_weights(seed):
    assert make_expert_weights(make_config(run__seed=seed), 1, 2, 0, 1)["up"].any()


def test_weights_have_the_variance_of_one_over_their_inputs():
    config = make_config(model__hidden=100, model__feed_forward=400)
    weights = make_expert_weights(config, 0, 0, 0, 1)
    assert weights["up"].shape == (400, 100) and weights["down"].shape == (100, 400)
    assert weights["up"].std().item() == pytest.approx(0.1, rel=0.02)
    assert weights["down"].std().item() == pytest.approx(0.05, rel=0.02)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_sums_are_added_over_the_group(comm, dtype):
    experts = LocalExperts([], comm, 10)
    rows = torch.full((2, 3), comm.rank + 1.0, dtype=dtype)
    total = experts.sum_over_shards(rows)
    assert total.dtype == dtype and (total == sum(range(1, comm.size + 1))).all()
    assert (rows == comm.rank + 1).all()  # what was given is kept
