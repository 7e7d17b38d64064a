"""The load is an exponential average of what was measured, pushes alike at any batch size, and moves the biases."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import make_config

from hpcmoe.config import DispatchConfig
from hpcmoe.dispatch.router import Router
from hpcmoe.model.balance import even_load, read_biases, update_biases, update_load, write_biases
from hpcmoe.model.routing_stats import count_routings, make_routing_stats

HIDDEN, EXPERTS, STEPS = 8, 6, 12


def test_the_load_starts_even():
    assert np.array_equal(even_load(2, 3), np.ones((2, 3)))


def test_each_step_moves_the_load_by_its_share_of_the_window():
    load, utilisation = np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]])
    assert np.allclose(update_load(load, utilisation, 10), [[1.1, 0.9]])
    assert np.array_equal(update_load(load, utilisation, 1), utilisation)


def test_a_steady_utilisation_becomes_the_load_and_the_old_fades_as_an_exponential():
    load = np.array([1.0])
    for _ in range(10):
        load = update_load(load, np.array([3.0]), 10)
    assert load == pytest.approx(3 - 2 * 0.9**10)


def make_tokens(count, seed):
    """Draw tokens whose first number all share."""
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1.0
    return x


def route_steps(batches, alpha, counted=False):
    """Route a batch a step under the load that the steps before have made, or, wrongly, under their counts.

    The router prefers experts of low number -> (experts chosen [T, K] of each step, loads [E] after each).
    """
    config = make_config(
        model__num_layers=1, model__num_experts=EXPERTS, dispatch__load_feedback=alpha, dispatch__load_window_steps=5
    )
    weight = 0.3 * torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = -0.4 * torch.arange(EXPERTS)
    router, load = Router(weight, config.model.top_k, config.dispatch), even_load(1, EXPERTS)
    chosen, loads = [], []
    for x in batches:
        routing = router(x, torch.from_numpy(load[0]).float())
        stats = make_routing_stats(
            [count_routings([routing]).numpy()], len(x), np.zeros((1, EXPERTS)), config.model.top_k
        )
        busy = stats.tokens_of_expert if counted else stats.utilisation
        load = update_load(load, busy, config.dispatch.load_window_steps)
        chosen.append(routing.experts)
        loads.append(load[0])
    return chosen, loads


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_alpha_chooses_alike_in_a_batch_eight_times_as_large(alpha):
    """Each token eight times over choose what the one does, step after step; by mere counts they would not."""
    batches = [make_tokens(40, seed) for seed in range(STEPS)]
    large = [x.repeat(8, 1) for x in batches]
    once, loads = route_steps(batches, alpha)
    eight, loads_of_eight = route_steps(large, alpha)
    assert all(torch.equal(one.repeat(8, 1), other) for one, other in zip(once, eight, strict=True))
    assert np.allclose(loads, loads_of_eight) and not np.allclose(loads[-1], 1, atol=0.3)
    assert any(
        not torch.equal(one.repeat(8, 1), other)
        for one, other in zip(route_steps(batches, alpha, True)[0], route_steps(large, alpha, True)[0], strict=True)
    )


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_alpha_evens_alike_whatever_is_drawn(alpha):
    """Tokens drawn anew each step, 400 or eight times as many, come to the same loads but for what the draw leaves."""
    small, large = (
        np.mean(route_steps([make_tokens(count, count + step) for step in range(40)], alpha)[1][10:], axis=0)
        for count in (400, 3200)
    )
    free = np.mean(route_steps([make_tokens(400, step) for step in range(40)], 0.0)[1][10:], axis=0)
    assert np.abs(small - large).max() < 0.05 < np.abs(small - free).max()


def make_layers(num_layers, num_experts):
    """Routers as a network's layers have them."""
    return [
        SimpleNamespace(router=Router(torch.zeros(num_experts, HIDDEN), 1, DispatchConfig())) for _ in range(num_layers)
    ]


def test_biases_move_by_the_sign_of_what_an_expert_lacks():
    layers = make_layers(2, 3)
    update_biases(layers, np.array([[0.5, 1.0, 1.5], [3.0, 0.0, 0.0]]), 0.25)
    assert read_biases(layers).tolist() == [[0.25, 0, -0.25], [-0.25, 0.25, 0.25]]
    update_biases(layers, np.array([[0.9, 0.9, 1.2], [1.0, 1.0, 1.0]]), 0.25)
    assert read_biases(layers).tolist() == [[0.5, 0.25, -0.5], [-0.25, 0.25, 0.25]]
    update_biases(layers, np.array([[9.0, 0, 0]] * 2), 0.0)
    assert read_biases(layers).tolist() == [[0.5, 0.25, -0.5], [-0.25, 0.25, 0.25]]


def test_biases_even_out_a_router_that_prefers_some():
    config = dataclasses.replace(DispatchConfig(), load_feedback=0.0)
    weight = 0.3 * torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = -0.4 * torch.arange(EXPERTS)
    layers, busiest = [SimpleNamespace(router=Router(weight, 2, config))], []
    for step in range(150):
        assignments = layers[0].router(make_tokens(2000, step), torch.ones(EXPERTS)).tokens_of_expert.numpy()
        busiest.append((assignments / assignments.mean()).max())
        update_biases(layers, (assignments / assignments.mean())[None], 0.02)
    assert busiest[0] > 2.0 and max(busiest[-10:]) < 1.15


def test_biases_are_read_as_they_were_written():
    layers, biases = make_layers(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)
    write_biases(layers, biases)
    assert np.array_equal(read_biases(layers), biases) and read_biases(layers).dtype == np.float32
