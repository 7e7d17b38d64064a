"""The placement bench: its skew is what it says, its figures follow from the times, and a small one shows the gain."""

import numpy as np
import pytest
import torch
from bench import moving, placement
from bench.skew import DrawnRouter, count_choices, draw_experts, make_weights, shift_weights
from small import make_config

from hpcmoe.dispatch.router import Router

RACKS = np.array([0, 0, 1, 1])


def test_most_tokens_of_a_rack_prefer_that_racks_experts():
    weights = make_weights(RACKS, 2, 16, 0)
    assert weights.shape == (2, 4, 16) and np.allclose(weights.sum(axis=2), 1)
    own = np.arange(16) % 2 == RACKS[:, None]
    assert np.allclose((weights * own).sum(axis=2), 0.85)
    assert (weights[:, 0] == weights[:, 1]).all() and not np.allclose(weights[0], weights[1])
    chosen = count_choices(weights, 2, 0)
    share = (chosen * own).sum(axis=2) / chosen.sum(axis=2)
    assert (share > 0.8).all() and (share < 0.9).all()


def test_a_shift_gives_each_racks_hottest_experts_to_the_other():
    before = make_weights(RACKS, 2, 16, 0)
    after = shift_weights(before, RACKS, 4)
    own = np.arange(16) % 2 == RACKS[:, None]
    assert np.allclose(after.sum(axis=2), 1) and (np.sort(after, axis=2) == np.sort(before, axis=2)).all()
    assert (((after != before).any(axis=1)).sum(axis=1) == 8).all()
    assert ((before * own).sum(axis=2) > 0.84).all() and ((after * own).sum(axis=2) < 0.55).all()
    assert np.allclose(shift_weights(after, RACKS, 0), after)


def test_drawn_experts_differ_and_come_by_their_weights():
    weights = np.array([0.6, 0.3, 0.1])
    one = draw_experts(weights, 20000, 1, np.random.default_rng(0))
    assert np.bincount(one.ravel()) / len(one) == pytest.approx(weights, abs=0.02)
    two = draw_experts(weights, 1000, 2, np.random.default_rng(0))
    assert (two[:, 0] != two[:, 1]).all()


def test_a_drawn_router_is_the_real_one_but_for_its_choice():
    config, weights = make_config().dispatch, np.array([0.7, 0.1, 0.1, 0.1])
    real = Router(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), 2, config)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    routing = DrawnRouter(real, weights, 3)(x, torch.ones(4))
    expected = draw_experts(weights, 300, 2, np.random.default_rng(3))
    assert (routing.experts.sort().values == torch.from_numpy(np.sort(expected))).all()
    logits = torch.nn.functional.linear(x, real.weight)
    assert torch.allclose(routing.gates, logits.gather(1, routing.experts).softmax(dim=-1))
    routing.gates.sum().backward()
    assert routing.tokens_of_expert.sum() == 600


def test_figures_follow_from_the_times():
    figures = placement.summarize({
        "step_seconds": {"packed": [1.0, 2.0, 9.0], "contiguous": [4.0, 4.0, 10.0]},
        "exchange_seconds": {"packed": [2.0, 3.0, 4.0], "contiguous": [8.0, 8.0, 8.0]},
        "predicted_seconds": {"packed": 2.7, "contiguous": 8.4},
        "cross_rack_share": {"packed": 0.2, "contiguous": 0.5},
    })  # fmt: skip
    assert (figures["ratio"], figures["ratio_range"]) == (0.5, [0.25, 0.9])  # of pairs, not of medians
    assert figures["prediction_error"] == pytest.approx({"packed": -0.1, "contiguous": 0.05})
    table = placement.make_table(figures)
    assert "packed / contiguous: 0.500, median of 3 pairs (0.250 - 0.900)" in table and "-10.0 %" in table


def test_what_a_move_restores_is_told_by_the_intervals():
    told = {"moved": [7, 8], "moved_bytes": [7, 3e6], "move_seconds": [7, 0.5], "move_seconds_predicted": [7, 0.25]}
    figures = moving.summarize({
        "every": 3, "told": told,
        "moves": {"seconds": [9, 2, 2, 6, 6, 6, 5, 2, 2.5], "losses": [3.0, 2.0]},
        "stays": {"seconds": [9, 2, 2, 6, 6, 6, 6, 8, 8], "losses": [3.0, 2.5]},
    })  # fmt: skip
    assert figures["restored"] == pytest.approx(2 / 2.25) and figures["kept_without"] == 0.25
    assert figures["median_seconds"]["moves"] == {"balanced": 2, "shifted": 6, "after": 2.25}
    assert (figures["moving_step_seconds"], figures["largest_difference_of_losses"]) == (5, 0.5)
    assert "8 copies, 3.00 MB" in moving.make_table(figures)


@pytest.mark.full  # a figure of a machine
@pytest.mark.racks
def test_moving_restores_the_balanced_step_within_an_interval(tmp_path):
    for _ in range(2):  # other work on this machine may have got in between
        restored = moving.measure(tmp_path, every=3, sequences=16)["restored"]
        if restored >= 0.9:
            break
    assert restored >= 0.9  # of the balanced pace


@pytest.mark.full  # a figure of a machine
@pytest.mark.racks
def test_a_step_takes_far_less_under_the_engines_placement(tmp_path):
    for _ in range(2):  # other work on this machine may have got in between
        ratio = placement.measure(tmp_path, pairs=1, sequences=96, ranks_a_host=2)["ratio"]
        if ratio <= 0.7:
            break
    assert ratio <= 0.7  # packed takes of the contiguous placement's step
