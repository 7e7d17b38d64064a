"""The compiled moves, held against the reference after any sequence of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.problems import assert_layer_is_placed, has_place, layer_data_of, problems, scatter

from hpcmoe.placement.cost import (
    count_replicas,
    layer_seconds,
    make_nearest_shares,
    resource_seconds,
    tokens_on_links,
)
from hpcmoe.placement.resources import RESOURCES, list_resources
from hpcmoe.placement.search.layer_data import EMPTY, SmoothMax, make_state
from hpcmoe.placement.search.moves import NO_TRAFFIC, crossing_change, max_seconds, move, rebuild, undo
from hpcmoe.placement.search.proposals import may_move
from hpcmoe.placement.search.seeds import PinnedCounts, make_packed

SMOOTH_MAX = SmoothMax(1e-3, 2)


def open_state(problem, seed):
    """Scatter the experts of a problem -> LayerData, Layout, Log."""
    layer_data = layer_data_of(problem)
    state, log = make_state(layer_data, scatter(problem, seed))
    total = rebuild(layer_data, state, log, SMOOTH_MAX)
    assert total == pytest.approx(state.power.sum(), rel=1e-9)
    return layer_data, state, log


def draw_move(problem, layer_data, state, rng):
    """Draw a move that may be made -> (expert, rank, slot, other expert, other rank, its slot), or None."""
    a, b = rng.integers(problem.num_ranks, size=2)
    slot, other = rng.integers(state.expert_at.shape[1], size=2)
    e, f = state.expert_at[a, slot], state.expert_at[b, other]
    if problem.replicate and rng.random() < 0.5:
        b, f = EMPTY, rng.integers(-1, problem.num_experts)  # a new replica, or none, in place of e
    return (e, a, slot, f, b, other) if may_move(layer_data, state, e, a, f, b) else None


def carry_on(problem, layer_data, state, log, rng, times):
    """Make moves at random and take one in two back, which must leave no trace."""
    for _ in range(times):
        if (drawn := draw_move(problem, layer_data, state, rng)) is None:
            continue
        e, a, slot, f, b, other = drawn
        before, total = take_down(state), state.power.sum()
        change = move(layer_data, state, log, SMOOTH_MAX, e, a, f, b)
        assert state.power.sum() - total == pytest.approx(change, rel=1e-6, abs=1e-9 * (total + 1e-9))
        assert max_seconds(layer_data, state, log, True) <= max_seconds(layer_data, state, log, False)
        if rng.random() < 0.5:
            undo(layer_data, state, log, e, a, f, b)
            for name, array in take_down(state).items():
                np.testing.assert_array_equal(array, before[name], err_msg=name)
            continue
        state.expert_at[a, slot] = f
        if b != EMPTY:
            state.expert_at[b, other] = e


def take_down(state):
    """Copy what a state says, but for the order in which an expert's replicas are listed -> dict of arrays."""
    arrays = {name: array.copy() for name, array in state._asdict().items() if name != "stamp"}
    for of_expert, number in zip(arrays["ranks_of_expert"], state.num_replicas, strict=True):
        of_expert[:number].sort()
        of_expert[number:] = EMPTY
    return arrays


def seconds_of(layer_data, state):
    """Find how long each resource is busy, with its latency -> [resources]."""
    latency = np.pad(layer_data.link_latency, (0, len(state.busy) - len(layer_data.link_latency)))
    return state.busy + np.where(state.busy > NO_TRAFFIC, latency, 0.0)


def assert_like_reference(problem, layer_data, state, log):
    """Check every array of a state against where its experts are."""
    slots = state.expert_at.ravel()
    by_name, names = resource_seconds(problem, 0, slots), list_resources(problem.objective)
    expected = np.concatenate([by_name[name].ravel() * (name in names) for name in RESOURCES])
    np.testing.assert_allclose(seconds_of(layer_data, state), expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(state.power, (expected / SMOOTH_MAX.scale).clip(0, 50) ** 4, rtol=1e-6, atol=1e-30)
    assert max_seconds(layer_data, state, log, False) == pytest.approx(layer_seconds(problem, 0, slots), rel=1e-9)

    replicas = count_replicas(problem, slots)
    np.testing.assert_array_equal(state.replicas, replicas)
    np.testing.assert_array_equal(state.num_replicas, replicas.sum(axis=0))
    np.testing.assert_array_equal(state.count_of_node, replicas.sum(axis=1))
    np.testing.assert_array_equal(state.count_of_rank, (state.expert_at != EMPTY).sum(axis=1))
    for rack in range(len(problem.uplink_bytes_per_second)):
        np.testing.assert_array_equal(state.replicas_in_rack[rack], replicas[problem.rack_of_node == rack].sum(axis=0))
    for expert, number in enumerate(state.num_replicas):
        ranks = np.flatnonzero((state.expert_at == expert).any(axis=1))
        assert sorted(state.ranks_of_expert[expert, :number]) == ranks.tolist()


@given(problems(), st.integers(0, 99))
def test_a_layout_is_as_busy_as_the_reference_says(problem, seed):
    layer_data, state, log = open_state(problem, seed)
    assert_like_reference(problem, layer_data, state, log)
    carry_on(problem, layer_data, state, log, np.random.default_rng(seed), 30)
    assert_like_reference(problem, layer_data, state, log)
    before = state.busy.copy()
    rebuild(layer_data, state, log, SMOOTH_MAX)
    np.testing.assert_allclose(state.busy, before, rtol=1e-9, atol=1e-14)


@given(problems(tight=True).filter(has_place), st.integers(0, 99))
def test_no_move_breaks_a_limit(problem, seed):
    layer_data = layer_data_of(problem)
    state, log = make_state(layer_data, make_packed(layer_data, PinnedCounts()))
    rebuild(layer_data, state, log, SMOOTH_MAX)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        carry_on(problem, layer_data, state, log, rng, 1)
        assert_layer_is_placed(layer_data, state.expert_at)


@given(problems(), st.integers(0, 99))
def test_crossing_tokens_change_as_foretold(problem, seed):
    layer_data, state, log = open_state(problem, seed)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        if (drawn := draw_move(problem, layer_data, state, rng)) is None:
            continue
        e, a, slot, f, b, other = drawn
        before = count_crossing(problem, state.expert_at)
        change = crossing_change(layer_data, state, e, a, f, b)
        move(layer_data, state, log, SMOOTH_MAX, e, a, f, b)
        state.expert_at[a, slot] = f
        if b != EMPTY:
            state.expert_at[b, other] = e
        assert count_crossing(problem, state.expert_at) - before == pytest.approx(change, abs=1e-6)


def count_crossing(problem, expert_at):
    """Count the tokens that leave their nodes."""
    slots = expert_at.ravel()
    tokens = tokens_on_links(problem, 0, slots, make_nearest_shares(problem, slots))
    return tokens.sum() - np.trace(tokens)
