"""The picture shows every link in use, every expert, and the figures of the placement."""

from types import SimpleNamespace

import numpy as np
import pytest
from cases import make_case, make_domains, write_case

from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.result import compute_usage

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Circle, FancyArrowPatch, Wedge  # noqa: E402

from hpcmoe.report.figures import draw_binding, draw_busiest, draw_maps, draw_placement, draw_ring  # noqa: E402

LONE = {"nic_out": None, "nic_in": None, "rack": None, "uplink": None}


def lay_out(tmp_path, case, objective):
    """Lay a case's experts out, with a second copy of the first -> (problem, placement as far as seen, usage)."""
    problem, _ = read_case(write_case(tmp_path / "case.json", case), objective)
    slots = np.full((problem.num_layers, problem.num_ranks * problem.slots_per_rank), -1)
    slots[:, : problem.num_experts] = np.arange(problem.num_experts)
    slots[:, -1] = 0
    placement = SimpleNamespace(
        expert_of_replica=slots,
        objective_seconds=1.0,
        lower_bound_seconds=0.5,
        is_optimal=objective == "links",
        split=None,
    )
    return problem, placement, compute_usage(problem, placement)


@pytest.mark.parametrize("objective", ["links", "step"])
def test_a_ring_shows_links_experts_racks(tmp_path, objective):
    problem, _, usage = lay_out(tmp_path, make_domains(make_case(slots=2, replicate=True)), objective)
    figure = Figure()
    draw_ring(figure, problem, usage, 1)
    patches = figure.axes[0].patches
    crossing = np.where(np.eye(4), 0, usage.tokens[1])
    assert sum(isinstance(patch, FancyArrowPatch) for patch in patches) == (crossing > 0).sum()
    assert sum(isinstance(patch, Circle) for patch in patches) == 4 + (usage.replicas[1] > 0).sum()
    assert sum(isinstance(patch, Wedge) for patch in patches) == 2
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "n3" in words and "rack 1" in words and ("out" in words) == (objective == "step")
    assert {axes.get_xlabel() for axes in figure.axes} >= {"time of a link, ms (width: its tokens)"}


def test_maps_show_links_ports_experts_tokens(tmp_path):
    problem, _, usage = lay_out(tmp_path, make_case(20, 2, 30), "ports")
    figure = Figure()
    draw_maps(figure, problem, usage)
    shown = figure.axes[0].images[0].get_array()
    crossing = np.where(np.eye(20), 0, usage.tokens.sum(axis=0))
    np.testing.assert_allclose(np.nan_to_num(np.asarray(shown)), 1e3 * crossing * problem.link_cost)
    titles = {axes.get_title() for axes in figure.axes}
    assert titles >= {"time of a link, ms", "time of a port, ms", "experts, replicas in all layers", "tokens served"}


def darkness(bar):
    """Return how dark a bar is, 0 to 3."""
    return 3 - sum(bar.get_facecolor()[:3])


@pytest.mark.parametrize(("objective", "kinds"), [("links", 1), ("ports", 5), ("step", 6)])
def test_what_binds_is_a_bar_for_each_kind_against_the_bound(tmp_path, objective, kinds):
    problem, placement, usage = lay_out(tmp_path, make_case(slots=2, replicate=True), objective)
    axes = Figure().add_subplot()
    draw_binding(axes, problem, placement, usage)
    bars = axes.patches
    expected = [1e3 * s.reshape(len(s), -1).max(axis=1).sum() for s in usage.seconds.values()]
    np.testing.assert_allclose([bar.get_width() for bar in bars], expected)
    assert len(bars) == kinds and axes.get_xlabel().startswith("ms a step")
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert any("n" in name for name in names) and (any("uplink rack" in name for name in names) == (kinds > 1))
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [500.0, 1000.0]  # the bound, the objective
    dark = [darkness(bar) for bar in sorted(bars, key=lambda bar: bar.get_width())]
    assert dark == sorted(dark)


def test_the_busiest_resources_come_first_and_darkest(tmp_path):
    problem, _, usage = lay_out(tmp_path, make_case(slots=2, replicate=True), "step")
    axes = Figure().add_subplot()
    draw_busiest(axes, problem, {kind: array[0] for kind, array in usage.seconds.items()}, "layer 0")
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == sorted(widths, reverse=True) and widths[0] == pytest.approx(1e3 * usage.layer_seconds[0])
    assert darkness(axes.patches[0]) > darkness(axes.patches[-1])


@pytest.mark.parametrize(
    "case",
    [make_case(), make_case(1, 4, 4, **LONE), make_case(home_tokens_per_rank=[0] * 8), make_case(20, 2, 30),
     make_case(20, 2, 30, home_tokens_per_rank=[0] * 40), make_case(2, 40, 60)],
    ids=["ring", "one node", "no tokens", "maps", "maps without tokens", "many experts a node"],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["links", "step"])
def test_any_placement_can_be_drawn(tmp_path, case, objective):
    problem, placement, usage = lay_out(tmp_path, case, objective)
    draw_placement(problem, placement, usage, tmp_path / "out.part", "png", 0)
    assert (tmp_path / "out.part").stat().st_size > 10_000
