"""Single replicas are shared evenly: floor or ceil of E / P experts on every rank and layer, where memory allows it."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement.exact import every_layout
from placement.problems import EXPERT_BYTES, make_problem

from hpcmoe.place import main as place_main
from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.files.maps import check_map
from hpcmoe.placement.problem import OBJECTIVES, count_slots_per_rank
from hpcmoe.placement.quotas import count_of_rank, describe_unevenness, has_even_ranks, make_limits
from hpcmoe.placement.refine import refine
from hpcmoe.placement.solve import SearchOptions, make_placement

QUICK = {"iterations": 1000, "seconds": 1.0}


def assert_is_even(problem, layouts):
    """Check that every rank of every layer holds floor or ceil of E / P experts."""
    count = count_of_rank(problem, layouts)
    assert count.sum(axis=1).tolist() == [problem.num_experts] * problem.num_layers
    assert count.min() >= problem.num_experts // problem.num_ranks
    assert count.max() <= -(-problem.num_experts // problem.num_ranks)


def skew(problem, seed, power):
    """Return a problem with experts of very different weight, which an uneven layout would suit."""
    weight = np.random.default_rng(seed).random(problem.probability.shape) ** power
    return dataclasses.replace(problem, probability=weight / weight.sum(axis=2, keepdims=True))


@pytest.mark.parametrize(
    ("experts", "ranks_of_node", "spare", "objective"),
    [
        *((20, [4] * 4, 0, objective) for objective in OBJECTIVES),
        *((18, [6, 3, 1], 0, objective) for objective in OBJECTIVES),
        (40, [4] * 4, 1, "links"),
        (16, [4] * 4, 1, "step"),
        (5, [3, 0, 3], 2, "ports"),
        (7, [3], 0, "step"),
    ],
)
def test_every_method_is_even(experts, ranks_of_node, spare, objective):
    slots = count_slots_per_rank(experts, sum(ranks_of_node), spare)
    problem = make_problem(ranks_of_node, experts, slots, num_layers=3, num_racks=2, objective=objective)
    problem = skew(problem, experts, 6)
    for method in ("packed", "contiguous", "eplb"):
        placement = make_placement(problem, method, **QUICK)
        assert_is_even(problem, placement.expert_of_replica)
        assert describe_unevenness(problem, placement.expert_of_replica) == ""
        assert placement.lower_bound_seconds <= placement.objective_seconds * (1 + 1e-9)


@settings(max_examples=25)
@given(
    st.sampled_from(
        [((1, 1), 3, 2), ((2, 1), 4, 2), ((1, 1, 1), 4, 2), ((2, 1), 5, 3), ((2, 2), 3, 2), ((1, 2), 2, 2)]
    ),
    st.sampled_from(OBJECTIVES),
    st.integers(0, 999),
)
def test_the_best_even_layout_is_found_and_never_above_its_bound(sizes, objective, seed):
    ranks_of_node, experts, slots = sizes
    problem = skew(make_problem(list(ranks_of_node), experts, slots, seed, objective=objective), seed, 4)
    even = [layout for layout, _ in every_layout(problem) if np.ptp((layout.reshape(-1, slots) >= 0).sum(axis=1)) <= 1]
    optimum = min(layer_seconds(problem, 0, layout) for layout in even)
    placement = make_placement(problem, iterations=5000, seconds=20.0)
    assert_is_even(problem, placement.expert_of_replica)
    assert placement.objective_seconds == pytest.approx(optimum, rel=1e-9, abs=1e-15)
    assert placement.lower_bound_seconds <= optimum * (1 + 1e-9)
    assert make_placement(problem, "contiguous").lower_bound_seconds <= optimum * (1 + 1e-9)


def test_memory_to_spare_beyond_what_evenness_fills_is_no_competition():
    problem = make_problem([2, 2, 2], 6, 3, num_layers=3, memory_bytes=np.array([9, 9, 9]) * EXPERT_BYTES)
    assert_is_even(problem, make_placement(problem, **QUICK).expert_of_replica)


@settings(max_examples=15)
@given(st.data())
def test_layers_that_share_memory_stay_even_as_they_trade(data):
    ranks = np.array(data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    layers = data.draw(st.integers(2, 3))
    experts = data.draw(st.integers(1, int(ranks.sum()) * 2))
    floor, ceil = experts // ranks.sum(), -(-experts // ranks.sum())
    memory = np.array([data.draw(st.integers(int(floor * r * layers), int(ceil * r * layers))) for r in ranks])
    if memory.sum() < experts * layers:
        memory = ceil * ranks * layers
    problem = make_problem(
        ranks.tolist(), experts, int(ceil) + data.draw(st.integers(0, 1)), data.draw(st.integers(0, 99)), layers,
        memory_bytes=memory * EXPERT_BYTES, objective=data.draw(st.sampled_from(OBJECTIVES)),
    )  # fmt: skip
    placement = make_placement(problem, iterations=300, seconds=0.3)
    assert_is_even(problem, placement.expert_of_replica)
    assert_is_even(problem, make_placement(problem, "contiguous").expert_of_replica)


def test_where_a_node_lacks_memory_the_others_share_evenly_and_it_is_told():
    # 6 experts on 2 + 2 + 2 ranks; node 1 holds one of a layer: five are left for four ranks.
    problem = make_problem([2, 2, 2], 6, 2, num_layers=2, memory_bytes=np.array([8, 2, 8]) * EXPERT_BYTES)
    problem = dataclasses.replace(problem, node_names=("a", "b", "c"))
    placement = make_placement(problem, **QUICK)
    count = count_of_rank(problem, placement.expert_of_replica)
    assert np.sort(count[:, [0, 1, 4, 5]], axis=1).tolist() == [[1, 1, 1, 2]] * 2
    assert np.sort(count[:, 2:4], axis=1).tolist() == [[0, 1]] * 2
    assert has_even_ranks(problem, placement.expert_of_replica)
    assert describe_unevenness(problem, placement.expert_of_replica) == (
        "ranks hold 0 to 2 experts of a layer; E / ranks = 6 / 6 would be 1: node b has memory for 2 experts, of 4 "
        "(1 x 2 ranks x 2 layers)"
    )


def test_seeds_keep_memory_for_ranks_that_have_too_few():
    # Node 0 wants all; its two ranks must hold two each, though one alone might hold three of its four.
    problem = make_problem([2, 2], 10, 3, memory_bytes=np.array([4, 6]) * EXPERT_BYTES, objective="links")
    for seed in range(8):
        placement = make_placement(skew(problem, seed, 8), **QUICK, seed=seed)
        assert_is_even(problem, placement.expert_of_replica)
        assert count_of_rank(problem, placement.expert_of_replica)[0, :2].tolist() == [2, 2]


UNEVEN = [0, 1, 2, 3, -1, -1, 4, -1]  # of two slots on each of four ranks; even would be one or two


def test_a_given_map_may_be_uneven_and_is_told():
    problem = make_problem([2, 2], 5, 2)
    layouts, notes = check_map("map", "the list", np.array([UNEVEN]), problem)
    assert layouts.tolist() == [UNEVEN]
    assert notes == ["ranks hold 0 to 2 experts of a layer; E / ranks = 5 / 4 would be 1 to 2"]
    assert check_map("map", "the list", np.array([[0, 1, 2, -1, 3, -1, 4, -1]]), problem)[1] == []
    copied = dataclasses.replace(problem, replicate=True)
    assert check_map("map", "the list", np.array([UNEVEN]), copied)[1] == []


def test_experts_that_move_stay_even_or_stray_no_further():
    for seed, objective in itertools.product(range(4), OBJECTIVES):
        problem = skew(make_problem([2, 2], 5, 2, seed, num_layers=2, objective=objective), seed, 5)
        even = make_placement(problem, "contiguous").expert_of_replica
        later = skew(problem, seed + 99, 5)
        assert_is_even(problem, refine(later, even, 2, SearchOptions(**QUICK)))

        before = np.array([UNEVEN, UNEVEN])
        count = count_of_rank(problem, refine(later, before, 8, SearchOptions(**QUICK)))
        was = count_of_rank(problem, before)
        assert (count >= np.minimum(was, 1)).all() and (count <= np.maximum(was, 2)).all()


def test_a_start_that_is_uneven_does_not_make_the_answer_so():
    problem = skew(make_problem([2, 2], 5, 2, objective="step"), 1, 5)
    assert_is_even(problem, make_placement(problem, start=np.array([UNEVEN]), **QUICK).expert_of_replica)


def test_replicas_need_not_be_even():
    problem = make_problem([2, 2], 5, 2, replicate=True)
    fewest, most, _ = make_limits(problem, problem.slots_of_node)
    assert fewest.tolist() == [0] * 4 and most.tolist() == [2] * 4


def make_case(**changes):
    """State 20 experts on 16 ranks of four nodes as a case file has it -> dict."""
    rng = np.random.default_rng(5)
    weight = rng.random((3, 20)) ** 6
    case = {
        "E": 20, "G": 16, "nodes": 4, "layers": 3, "slots_per_gpu": 2,
        "rank_to_node": [rank // 4 for rank in range(16)],
        "B": rng.uniform(1e8, 1e9, (4, 4)).tolist(), "L": np.zeros((4, 4)).tolist(), "M": [24_000] * 4,
        "expert_bytes": 1000, "bytes_per_token": 128, "home_tokens_per_rank": [100.0] * 16, "replicate": False,
        "P": (weight / weight.sum(axis=1, keepdims=True)).tolist(), "seconds_per_token": 1e-7,
    }  # fmt: skip
    return case | changes


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_command_shares_a_cases_experts_evenly(tmp_path, objective, capsys):
    (tmp_path / "case.json").write_text(json.dumps(make_case()))
    words = [f"{tmp_path}/case.json", "--objective", objective, "--iterations", "2000", "-o", f"{tmp_path}/out.json"]
    assert place_main(words) == 0
    count = (np.array(json.loads((tmp_path / "out.json").read_text())["expert_of_slot"]) >= 0).sum(axis=2)
    assert count.sum(axis=1).tolist() == [20] * 3 and set(count.ravel().tolist()) == {1, 2}
    assert "note" not in capsys.readouterr().err


def test_the_command_tells_what_keeps_it_uneven(tmp_path, capsys):
    (tmp_path / "case.json").write_text(json.dumps(make_case(M=[24_000, 24_000, 24_000, 9_000])))
    assert place_main([f"{tmp_path}/case.json", "--iterations", "500", "-o", f"{tmp_path}/out.json"]) == 0
    assert capsys.readouterr().err == (
        "hpcmoe: note: ranks hold 0 to 2 experts of a layer; E / ranks = 20 / 16 would be 1 to 2: node n3 has memory "
        "for 9 experts, of 24 (2 x 4 ranks x 3 layers)\n"
    )


def test_the_command_tells_of_a_start_that_is_uneven(tmp_path, capsys):
    (tmp_path / "case.json").write_text(json.dumps(make_case()))
    row = [*range(20), *[-1] * 12]  # two on each of the first ten ranks
    (tmp_path / "start.json").write_text(json.dumps({"physical_to_logical": [row] * 3}))
    words = [f"{tmp_path}/case.json", "--start", f"{tmp_path}/start.json", "--iterations", "500"]
    assert place_main([*words, "-o", f"{tmp_path}/out.json"]) == 0
    uneven = "ranks hold 0 to 2 experts of a layer; E / ranks = 20 / 16 would be 1 to 2"
    assert capsys.readouterr().err == (
        f"hpcmoe: note: {tmp_path}/start.json: {uneven}\n"
        "hpcmoe: note: the search begins elsewhere, since what it finds is to be even; --moves begins there\n"
    )
    count = (np.array(json.loads((tmp_path / "out.json").read_text())["expert_of_slot"]) >= 0).sum(axis=2)
    assert count.min() == 1
    assert place_main([*words, "--moves", "0"]) == 0
