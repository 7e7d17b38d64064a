"""The compiled moves, held against the reference after any sequence of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.problems import assert_layer_is_placed, has_place, problems, scatter, terms_of

from hpcmoe.placement.cost import count_copies, counted, layer_seconds, resource_seconds, share_out, tokens_on_links
from hpcmoe.placement.search.layer_data import HOLE, Measure, make_layout
from hpcmoe.placement.search.moves import NO_TRAFFIC, crossing_change, most_seconds, move, rebuild, undo
from hpcmoe.placement.search.proposals import may_move
from hpcmoe.placement.search.seeds import Kept, lay_packed

MEASURE = Measure(1e-3, 2)
RESOURCES = ("link", "egress", "ingress", "uplink_out", "uplink_in", "rank")  # in the order of Layout.busy


def open_layout(problem, seed):
    """Scatter the experts of a problem -> Terms, Layout, Log."""
    terms = terms_of(problem)
    layout, log = make_layout(terms, scatter(problem, seed))
    total = rebuild(terms, layout, log, MEASURE)
    assert total == pytest.approx(layout.power.sum(), rel=1e-9)
    return terms, layout, log


def draw_move(problem, terms, layout, rng):
    """Draw a move that may be made -> (expert, rank, slot, other expert, other rank, its slot), or None."""
    a, b = rng.integers(problem.num_ranks, size=2)
    slot, other = rng.integers(layout.expert_at.shape[1], size=2)
    e, f = layout.expert_at[a, slot], layout.expert_at[b, other]
    if problem.replicate and rng.random() < 0.5:
        b, f = HOLE, rng.integers(-1, problem.num_experts)  # a new copy, or none, in place of e
    return (e, a, slot, f, b, other) if may_move(terms, layout, e, a, f, b) else None


def carry_on(problem, terms, layout, log, rng, times):
    """Make moves at random and take one in two back, which must leave no trace."""
    for _ in range(times):
        if (drawn := draw_move(problem, terms, layout, rng)) is None:
            continue
        e, a, slot, f, b, other = drawn
        before, total = take_down(layout), layout.power.sum()
        change = move(terms, layout, log, MEASURE, e, a, f, b)
        assert layout.power.sum() - total == pytest.approx(change, rel=1e-6, abs=1e-9 * (total + 1e-9))
        assert most_seconds(terms, layout, log, True) <= most_seconds(terms, layout, log, False)
        if rng.random() < 0.5:
            undo(terms, layout, log, e, a, f, b)
            for name, array in take_down(layout).items():
                np.testing.assert_array_equal(array, before[name], err_msg=name)
            continue
        layout.expert_at[a, slot] = f
        if b != HOLE:
            layout.expert_at[b, other] = e


def take_down(layout):
    """Copy what a layout says, but for the order in which an expert's copies are listed -> dict of arrays."""
    arrays = {name: array.copy() for name, array in layout._asdict().items() if name != "stamp"}
    for of_expert, number in zip(arrays["rank_of_copy"], layout.num_copies, strict=True):
        of_expert[:number].sort()
        of_expert[number:] = HOLE
    return arrays


def seconds_of(terms, layout):
    """Find how long each resource is busy, with its latency -> [resources]."""
    latency = np.pad(terms.link_latency, (0, len(layout.busy) - len(terms.link_latency)))
    return layout.busy + np.where(layout.busy > NO_TRAFFIC, latency, 0.0)


def assert_like_reference(problem, terms, layout, log):
    """Check every array of a layout against where its experts are."""
    slots = layout.expert_at.ravel()
    by_name, names = resource_seconds(problem, 0, slots), counted(problem.objective)
    expected = np.concatenate([by_name[name].ravel() * (name in names) for name in RESOURCES])
    np.testing.assert_allclose(seconds_of(terms, layout), expected, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(layout.power, (expected / MEASURE.scale).clip(0, 50) ** 4, rtol=1e-6, atol=1e-30)
    assert most_seconds(terms, layout, log, False) == pytest.approx(layer_seconds(problem, 0, slots), rel=1e-9)

    copies = count_copies(problem, slots)
    np.testing.assert_array_equal(layout.copies, copies)
    np.testing.assert_array_equal(layout.num_copies, copies.sum(axis=0))
    np.testing.assert_array_equal(layout.count_of_node, copies.sum(axis=1))
    np.testing.assert_array_equal(layout.count_of_rank, (layout.expert_at != HOLE).sum(axis=1))
    for rack in range(len(problem.uplink_bytes_per_second)):
        np.testing.assert_array_equal(layout.copies_in_rack[rack], copies[problem.rack_of_node == rack].sum(axis=0))
    for expert, number in enumerate(layout.num_copies):
        ranks = np.flatnonzero((layout.expert_at == expert).any(axis=1))
        assert sorted(layout.rank_of_copy[expert, :number]) == ranks.tolist()


@given(problems(), st.integers(0, 99))
def test_a_layout_is_as_busy_as_the_reference_says(problem, seed):
    terms, layout, log = open_layout(problem, seed)
    assert_like_reference(problem, terms, layout, log)
    carry_on(problem, terms, layout, log, np.random.default_rng(seed), 30)
    assert_like_reference(problem, terms, layout, log)
    before = layout.busy.copy()
    rebuild(terms, layout, log, MEASURE)
    np.testing.assert_allclose(layout.busy, before, rtol=1e-9, atol=1e-14)


@given(problems(tight=True).filter(has_place), st.integers(0, 99))
def test_no_move_breaks_a_limit(problem, seed):
    terms = terms_of(problem)
    layout, log = make_layout(terms, lay_packed(terms, Kept()))
    rebuild(terms, layout, log, MEASURE)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        carry_on(problem, terms, layout, log, rng, 1)
        assert_layer_is_placed(terms, layout.expert_at)


@given(problems(), st.integers(0, 99))
def test_crossing_tokens_change_as_foretold(problem, seed):
    terms, layout, log = open_layout(problem, seed)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        if (drawn := draw_move(problem, terms, layout, rng)) is None:
            continue
        e, a, slot, f, b, other = drawn
        before = count_crossing(problem, layout.expert_at)
        change = crossing_change(terms, layout, e, a, f, b)
        move(terms, layout, log, MEASURE, e, a, f, b)
        layout.expert_at[a, slot] = f
        if b != HOLE:
            layout.expert_at[b, other] = e
        assert count_crossing(problem, layout.expert_at) - before == pytest.approx(change, abs=1e-6)


def count_crossing(problem, expert_at):
    """Count the tokens that leave their nodes."""
    slots = expert_at.ravel()
    tokens = tokens_on_links(problem, 0, slots, share_out(problem, slots))
    return tokens.sum() - np.trace(tokens)
