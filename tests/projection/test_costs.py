"""Costs are lines through what was measured, files that read back equal, or estimates that say that they are."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.config import Config
from hpcmoe.errors import ConfigError
from hpcmoe.projection.costs import OPS, CostConditions, Costs, OpCost, fit_op, format_costs, read_costs
from hpcmoe.projection.estimated import HIGH, LOW, estimate_costs, size_model, size_own_network
from hpcmoe.projection.model_file import ModelFile
from hpcmoe.projection.processors import find_gpu

CONDITIONS = CostConditions(
    hidden=8, feed_forward=16, kind="gelu", num_layers=2, num_experts=4, top_k=2, sequence_length=64, attention=True,
    dtype="float32", mode="train", micro_batches=2,
)  # fmt: skip
COSTS = Costs(
    conditions=CONDITIONS,
    ops={"dense": OpCost(fixed_seconds=1e-4, seconds_per_token=1e-6, low=0.9, high=1.2)},
    source={"host": "n0", "date": "2026-12-01"},
    tokens=(64, 512),
)


@given(st.floats(1e-6, 1e-2), st.floats(1e-9, 1e-5), st.floats(0, 0.3))
def test_a_line_is_found_and_its_range(fixed, per_token, noise):
    tokens, spread = [100, 1000], np.array([1 - noise, 1, 1 + noise])
    cost = fit_op(tokens, [(fixed + per_token * count) * spread for count in tokens])
    assert cost.fixed_seconds == pytest.approx(fixed, rel=1e-3, abs=1e-9)
    assert cost.seconds(500) == pytest.approx(fixed + 500 * per_token, rel=1e-3)
    assert (cost.low, cost.high) == (pytest.approx(1 - 0.8 * noise), pytest.approx(1 + 0.8 * noise))


@pytest.mark.parametrize(
    ("seconds", "fixed", "per_token"), [((1.0, 12.0), 0.0, 0.0109), ((2.0, 1.0), 1.5, 0.0), ((0.0, 0.0), 0.0, 0.0)]
)
def test_no_line_begins_or_slopes_below_zero(seconds, fixed, per_token):
    cost = fit_op([100, 1000], [np.full(5, each) for each in seconds])
    assert (cost.fixed_seconds, cost.seconds_per_token) == (pytest.approx(fixed), pytest.approx(per_token, rel=0.02))


def test_a_costs_file_reads_back_equal(tmp_path):
    (tmp_path / "costs.json").write_text(format_costs(COSTS))
    assert read_costs(tmp_path / "costs.json") == COSTS
    assert COSTS.describe() == "measured: host n0, date 2026-12-01"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "costs 0"}, "is no costs file of `hpcmoe plan --measure`"),
        ({"ops": {"danse": {}}}, "ops: danse: unknown op; did you mean dense?"),
        ({"ops": {"dense": 1}}, "ops: dense = 1: must be a JSON object"),
        ({"ops": {}}, "ops: must hold the cost of one op at least"),
        ({"ops": {"dense": {"fixed_seconds": -1, "seconds_per_token": 0}}}, "ops: dense: fixed_seconds = -1: must be"),
        (
            {"ops": {"dense": {"fixed_seconds": float("nan"), "seconds_per_token": 0}}},
            "ops: dense: fixed_seconds = nan",
        ),
        ({"ops": {"dense": {"fixed_seconds": 0}}}, "ops: dense: seconds_per_token: missing"),
        ({"conditions": []}, "conditions = []: must be a JSON object"),
        ({"conditions": {"hidden": 8}}, "conditions: feed_forward: missing"),
        ({"tokens": [0]}, "tokens[0] = 0: must be greater than or equal to 1"),
        ({"colour": 1}, "colour = 1: unknown key"),
    ],
)
def test_a_broken_costs_file_is_rejected_by_its_keys(tmp_path, change, said):
    tree = json.loads(format_costs(COSTS)) | change
    (tmp_path / "costs.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as found:
        read_costs(tmp_path / "costs.json")
    assert str(found.value).splitlines()[0].removeprefix(f"{tmp_path}/costs.json: ").startswith(said)


def describe_deepseek():
    """Describe the four layers of DeepSeek-V3's published profile of training."""
    return ModelFile(
        family="deepseek_v3", hidden=7168, row_width=7168, feed_forward=2048, num_matrices=3,
        expert_parameters=3 * 7168 * 2048, num_experts=256, top_k=8, moe_layers=tuple(range(4)),
        layer_kinds=("full_attention",) * 4, layer_parameters=(187_107_328 + 44_040_192 + 1_835_008,) * 4,
        shared_feed_forward=2048, dense_feed_forward=0, num_heads=128, num_key_heads=128, head_width=128,
        vocabulary=129280, is_tied=False, outer_parameters=0, notes=(),
    )  # fmt: skip


def test_estimates_say_so_and_come_near_a_published_profile():
    sizes = size_model(describe_deepseek(), sequence_length=4096)
    costs = estimate_costs(find_gpu("H800", ""), sizes, 4, "float8", trains=True)
    assert not costs.is_measured and costs.describe().startswith("estimated: processor H800")
    assert set(costs.ops) == set(OPS) and all((op.low, op.high) == (LOW, HIGH) for op in costs.ops.values())
    products = ("dense", "compute", "compute_backward", "dense_backward")
    seconds = 4 * sum(costs.ops[op].seconds(4096) for op in products)  # published: about 75 ms of products
    assert LOW * seconds < 0.075 < HIGH * seconds


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_faster_processors_and_fewer_tokens_cost_less(mode):
    own = size_own_network(Config().spec, vocabulary=256)
    assert own.expert_parameters == 2 * 64 * 128 and own.layer_parameters == 4 * 64**2 + 64 + 64 * (1 + 16)
    costs = [estimate_costs(find_gpu(name, ""), own, 4, "bfloat16", mode == "train") for name in ("A100", "H200")]
    assert set(costs[0].ops) == set(costs[1].ops) <= set(OPS)
    for op in costs[0].ops:
        assert costs[1].ops[op].seconds(1e5) <= costs[0].ops[op].seconds(1e5)
        assert costs[0].ops[op].seconds(10) <= costs[0].ops[op].seconds(100)
    halves = estimate_costs(find_gpu("A100", ""), dataclasses.replace(own, top_k=1), 4, "bfloat16", mode == "train")
    assert halves.ops["compute"].seconds_per_token == pytest.approx(costs[0].ops["compute"].seconds_per_token / 2)
