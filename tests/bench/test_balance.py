"""The balance bench: its skew is what it says, its figures follow from the series, and a small one shows who evens."""

import json

import numpy as np
import pytest
import torch
from bench import balance
from bench.skew import mean_input, skew_routers
from small import open_small_job


@pytest.mark.mpi
def test_a_skewed_router_prefers_experts_zipf_like_each_layer_in_its_own_order(comm, shared):
    changes = {"dispatch__load_feedback": 0.0, "model__num_experts": 16, "model__hidden": 32, "model__num_heads": 2}
    with open_small_job(comm, shared, **changes) as (job, _, _):
        skew_routers(job, 0.5, 1.0)
        for layer in job.stepper.network.layers:
            logits = layer.router.weight.detach() @ mean_input(job, layer.router)
            assert torch.allclose(logits.sort(descending=True).values, -0.5 * torch.arange(1.0, 17).log(), atol=1e-4)
        stats = job.stepper.run(job.training, np.arange(14), np.ones((2, 16)), "evaluate").stats
    orders = np.argsort(-stats.tokens_of_expert, axis=1)
    assert (stats.utilisation.max(axis=1) > 2).all() and not np.array_equal(*orders)


def make_series(loss, balancedness, busy):
    """What a mechanism's training leaves: 20 steps, of which the last ten have these values, and the first has none."""
    return {
        "loss": [9.0] * 10 + [loss] * 10,
        "balancedness": [0.2] * 10 + [balancedness] * 10,
        "sigma": [1.5] * 10 + [0.5] * 10,
        "utilisation": [[[4.0, 0.0]]] * 10 + [[busy]] * 10,
        "seconds": [0.1] * 20,
        "validation": loss + 0.25,
    }


def test_figures_follow_from_the_series():
    series = {"none": make_series(3.0, 0.25, [3.0, 1.0]), "bias": make_series(3.125, 0.75, [1.5, 0.5])}
    figures = balance.summarize({"ranks": 2, "steps": 20, "sigma_floor": 0.125, "mechanisms": series})
    told = figures["mechanisms"]["bias"]["summary"]
    assert told["balancedness"] == pytest.approx([0.2, 0.75]) and told["sigma"] == pytest.approx([1.5, 0.5])
    assert told["utilisation"] == [0.5, 1.5]
    assert told["loss_against_none"] == told["validation_against_none"] == pytest.approx(0.125)
    assert figures["mechanisms"]["none"]["summary"]["loss_against_none"] == 0
    json.dumps(figures)
    table = balance.make_table(figures)
    assert "+0.1250" in table and "0.50 - 1.50" in table and "sigma 0.125" in table


@pytest.mark.full
def test_a_small_bench_starts_alike_and_evens_by_bias_and_loss(tmp_path):
    figures = balance.measure(tmp_path, num_ranks=2, steps=25, names=("none", "auxiliary loss 0.05", "bias 0.03"))
    told = {name: series["summary"] for name, series in figures["mechanisms"].items()}
    assert len({summary["balancedness"][0] for summary in told.values()}) == 1
    for name in ("auxiliary loss 0.05", "bias 0.03"):
        assert told[name]["utilisation"][1] < 0.8 * told["none"]["utilisation"][1], name
