"""The tables of a placement stay short, whatever the cluster's size, and true."""

from types import SimpleNamespace

import numpy as np
import pytest
from cases import make_case, write_case

from hpcmoe.messages import format_ranges
from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.result import SearchStats, compute_usage
from hpcmoe.report.placement_tables import (
    MOST_NODE_ROWS,
    in_ms,
    make_placement_tables,
    rows_of_binding,
    rows_of_busiest,
    rows_of_nodes,
)


def lay_out(tmp_path, *sizes, **changes):
    """Lay the experts of a case out in order -> (problem, placement as far as tables look, usage)."""
    problem, _ = read_case(write_case(tmp_path / "case.json", make_case(*sizes, **changes)), "step")
    slots = np.full((problem.num_layers, problem.num_ranks * problem.slots_per_rank), -1)
    slots[:, : problem.num_experts] = np.arange(problem.num_experts)
    slots[1:, : problem.num_experts] = np.arange(problem.num_experts)[::-1]
    placement = SimpleNamespace(
        expert_of_replica=slots, objective_seconds=0.0, lower_bound_seconds=0.0, is_optimal=False,
        cross_node_share=0.5, link_sigma=0.1, search_stats=SearchStats(seconds=1.0, num_proposals=5), split=None,
    )  # fmt: skip
    usage = compute_usage(problem, placement)
    placement.objective_seconds = float(usage.layer_seconds.sum())
    placement.lower_bound_seconds = placement.objective_seconds / 2
    return problem, placement, usage


@pytest.mark.parametrize("sizes", [(4, 2, 8, 3), (128, 8, 256, 6)])
def test_tables_fit_a_screen(tmp_path, sizes):
    problem, placement, usage = lay_out(tmp_path, *sizes)
    text = make_placement_tables(problem, placement, usage, {"contiguous": 1.0, "eplb": None}, 0)
    lines = text.splitlines()
    assert len(lines) <= 70 and max(map(len, lines)) <= 132
    assert "does not fit" in text and "100.00 % above" in text
    assert ("others" in text) == (problem.num_nodes > MOST_NODE_ROWS)


def test_nodes_serve_all_tokens(tmp_path):
    problem, _, usage = lay_out(tmp_path)
    rows = rows_of_nodes(problem, usage, 0)
    assert [row[3] for row in rows] == ["0-1", "2-3", "4-5", "6-7"]
    assert [row[3] for row in rows_of_nodes(problem, usage, 1)] == ["6-7", "4-5", "2-3", "0-1"]
    total = 3 * sum(problem.tokens_of_rank)
    assert sum(float(row[7]) for row in rows) == pytest.approx(total, rel=1e-3)
    assert {row[4] for row in rows} == {"6"} and {row[5] for row in rows} == {"210 MB"}


def test_the_busiest_are_those_of_the_usage(tmp_path):
    problem, _, usage = lay_out(tmp_path)
    rows = rows_of_busiest(problem, usage)
    assert [row[0] for row in rows] == ["link"] * 4 + ["port"] * 4 + ["uplink"] * 4 + ["rank"] * 4
    assert rows[0][2] == in_ms(usage.seconds["link"].sum(axis=0).max())
    first = usage.seconds["rank"].sum(axis=0).argmax()
    assert rows[12][1].startswith(f"rank {first} on ") and rows[12][4] == f"{usage.seconds['rank'][:, first].argmax()}"


def test_what_binds_covers_every_layer_once(tmp_path):
    problem, placement, usage = lay_out(tmp_path)
    rows = rows_of_binding(problem, usage)
    assert sum(int(row[1].split(":")[0]) for row in rows) == 3
    assert sum(float(row[2]) for row in rows) == pytest.approx(1e3 * placement.objective_seconds, rel=1e-3)
    problem.tokens_of_rank[:] = 0
    assert rows_of_binding(problem, compute_usage(problem, placement)) == []


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 1, 1, 2, 2, 5], "0, 1-2 x2, 5"),
     (range(0, 40, 2), "0, 2, 4, 6, 8, 10 ... (20)")],
)  # fmt: skip
def test_numbers_are_written_as_ranges(numbers, text):
    assert format_ranges(numbers) == text


def test_milliseconds_keep_four_digits():
    assert [in_ms(seconds) for seconds in (0.0, 1.23456e-6, 0.0123456, 12.3456)] == ["0", "0.001235", "12.35", "12346"]
