"""Place experts by themselves: `python -m hpcmoe.place CASE.json --objective links --budget 5 -o OUT.json`.

CASE.json holds a placement problem, or a run's run.h5 the one it had. An error ends it with one line and exit status 2.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()

import argparse
import importlib.util
import logging
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hpcmoe.arguments import Parser, name_program, run_without_ranks
from hpcmoe.errors import ConfigError, HpcmoeError
from hpcmoe.messages import one_line
from hpcmoe.output import StderrHandler, print_to_stderr, print_to_stdout
from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.files.maps import check_map, read_map, write_map
from hpcmoe.placement.place import SECONDS_A_LAYER, place
from hpcmoe.placement.problem import OBJECTIVES, PlacementProblem, check_problem
from hpcmoe.placement.quotas import describe_unevenness, has_even_ranks
from hpcmoe.placement.result import Placement
from hpcmoe.reading import format_json
from hpcmoe.results import check_outputs, replace_file

_MAPS, _PICTURES = (".json", ".npy"), (".png", ".pdf", ".svg")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status."""

    def work() -> None:
        arguments = read_place_arguments(sys.argv[1:] if words is None else words)
        check_place_outputs(arguments)
        print_to_stdout(place_case(arguments))

    return run_without_ranks(work)


def read_place_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises ConfigError; exits after --help."""
    parser = Parser(prog=name_program("hpcmoe.place"), description="Place experts on ranks.")
    parser.add_argument("case", metavar="CASE", help="placement problem: CASE.json, or the run.h5 of a run")
    parser.add_argument(
        "--objective", choices=OBJECTIVES,
        help="what a layer costs: its busiest link; ports and uplinks too; ranks' compute too (step, or the run's)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=positive, metavar="SECONDS",
        help="time to search in, 0.1 s a layer; to prove how good the result is takes up to half as much more",
    )  # fmt: skip
    parser.add_argument(
        "--loads", metavar="FILE",
        help="take the probabilities of experts from there: run.h5, counts of SGLang or vLLM (.json, .npy, .pt), rows "
        "(.json); even; or an exponent of a power law, such as 1.2",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="OUT.json", help="write the placement there")
    parser.add_argument("--eplb-out", metavar="MAP", help="write it as EPLB's map of slots to experts: .json, .npy")
    parser.add_argument(
        "--start", metavar="FILE",
        help="begin with the placement there: OUT.json, another engine's map (.json, .npy), or the run.h5 of a run",
    )  # fmt: skip
    parser.add_argument(
        "--moves", type=natural, metavar="COUNT",
        help="after --start: replicas of a layer that may move, 0 to evaluate it as it is; without it as many as help",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help=f"draw it: {', '.join(_PICTURES)}")
    parser.add_argument("--seed", type=natural, default=0, help="of the search (%(default)s)")
    parser.add_argument(
        "--iterations", type=natural, default=0, metavar="COUNT",
        help="end the search of a layer after so many proposals: the same answer every time, if the budget allows them",
    )  # fmt: skip
    parser.add_argument("--latency", action="store_true", help="a link in use costs its latency too")
    parser.add_argument("--layer", type=natural, default=0, help="whose experts are shown (%(default)s)")
    parser.add_argument("--compare", action="store_true", help="place by EPLB's method too")
    arguments = parser.parse_args(words)
    if arguments.moves is not None and not arguments.start:
        raise ConfigError(f"--moves {arguments.moves}: needs --start")
    return arguments


def positive(word: str) -> float:
    """Read a finite number above 0."""
    number = float(word)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError
    return number


def natural(word: str) -> int:
    """Read a whole number from 0 to 2^63 - 1."""
    number = int(word)
    if not 0 <= number < 2**63:
        raise ValueError
    return number


def check_place_outputs(arguments: argparse.Namespace) -> None:
    """Check, before a long search, that what is asked for can be written. Raises ConfigError."""
    inputs = {
        "the case itself": arguments.case,
        "what --start reads": arguments.start,
        "what --loads reads": arguments.loads,
    }
    outputs = {
        "what -o writes": arguments.output,
        "what --eplb-out writes": arguments.eplb_out,
        "what --plot draws": arguments.plot,
    }
    check_outputs(inputs, outputs)

    # Check the kinds of file that the endings name.
    for option, path, endings in (("--eplb-out", arguments.eplb_out, _MAPS), ("--plot", arguments.plot, _PICTURES)):
        if path and find_ending(path) not in endings:
            raise ConfigError(f"{option} {one_line(path)}: must end with {', '.join(endings)}")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not there; pip install matplotlib, or hpcmoe[plot]")


def find_ending(path: str) -> str:
    """Find the ending that names a file's kind: `.json`."""
    return pathlib.Path(path).suffix.lower()


def print_notes(notes: Sequence[str], prefix: str = "") -> None:
    """Print notes to standard error."""
    print_to_stderr(f"hpcmoe: note: {prefix}{note}" for note in notes)


def place_case(arguments: argparse.Namespace) -> str:
    """Read the problem, solve it, write what was asked for -> the text to show."""
    problem, notes = _read_problem(arguments)
    if arguments.loads:
        problem, note = replace_loads(problem, arguments.loads)
        notes.append(note)
    if arguments.layer >= problem.num_layers:
        raise ConfigError(f"--layer {arguments.layer}: must be below layers = {problem.num_layers}")
    print_notes(notes)
    logging.basicConfig(level=logging.INFO, format="hpcmoe: note: %(message)s", handlers=[StderrHandler()])

    # Import what compiles, or takes a second to import, once the input is known to be good.
    from hpcmoe.placement.result import compute_usage
    from hpcmoe.placement.solve import compare_methods
    from hpcmoe.report.placement_tables import make_placement_tables

    # Search, and compare with other methods.
    placement = search_placement(problem, arguments)
    if arguments.moves != 0 and (uneven := describe_unevenness(problem, placement.expert_of_replica)):
        print_notes([uneven])
    rivals = compare_methods(problem, ("contiguous", "eplb") if arguments.compare else ("contiguous",))
    usage = compute_usage(problem, placement)

    # Write what was asked for.
    if arguments.output:
        with replace_file(arguments.output) as part:
            part.write_text(format_json(make_answer(problem, placement, rivals, arguments.seed)), encoding="utf-8")
    if arguments.eplb_out:
        with replace_file(arguments.eplb_out) as part:
            write_map(part, placement.expert_of_replica, find_ending(arguments.eplb_out))
    if arguments.plot:
        from hpcmoe.report.figures import draw_placement

        with replace_file(arguments.plot) as part:
            draw_placement(problem, placement, usage, part, find_ending(arguments.plot)[1:], arguments.layer)
    written = [path for path in (arguments.output, arguments.eplb_out, arguments.plot) if path]
    table = make_placement_tables(problem, placement, usage, rivals, arguments.layer)
    return f"{table}\n\nwritten: {', '.join(written)}" if written else table


def search_placement(problem: PlacementProblem, arguments: argparse.Namespace) -> Placement:
    """Search for a placement, from the one that --start names if any."""
    from hpcmoe.placement.refine import refine
    from hpcmoe.placement.result import SearchStats, evaluate
    from hpcmoe.placement.solve import SearchOptions, bound_layers

    # Search from the start, or from seeds.
    seconds = arguments.budget or SECONDS_A_LAYER * problem.num_layers
    options = {"seconds": seconds, "iterations": arguments.iterations, "seed": arguments.seed}
    start = read_start_layouts(problem, arguments.start) if arguments.start else None
    if start is None or arguments.moves is None:
        if start is not None and not has_even_ranks(problem, start):
            print_notes(["the search begins elsewhere, since what it finds is to be even; --moves begins there"])
        return place(problem, start=start, **options)

    # Refine the start by some moves, or evaluate it as it is.
    begun = time.perf_counter()
    layouts = refine(problem, start, arguments.moves, SearchOptions(**options)) if arguments.moves else start
    search_stats = SearchStats(seconds=time.perf_counter() - begun)
    return evaluate(problem, layouts, bound_layers(problem, layouts, seconds / 2), "packed", search_stats)


def read_start_layouts(problem: PlacementProblem, path: str) -> np.ndarray:
    """Read the placement to begin with -> [L, S]."""
    if find_ending(path) == ".h5":
        from hpcmoe.write.problem import read_last_placement

        layouts, notes = check_map(path, "its placement", read_last_placement(pathlib.Path(path)), problem)
    else:
        layouts, notes = read_map(path, problem)
    print_notes(notes, f"{one_line(path)}: ")
    return layouts


def _read_problem(arguments: argparse.Namespace) -> tuple[PlacementProblem, list[str]]:
    """Read the problem of a case file or of a run's record -> (PlacementProblem, notes)."""
    if find_ending(arguments.case) != ".h5":
        return read_case(arguments.case, arguments.objective or "step", arguments.latency)

    from hpcmoe.write import problem

    given = {"objective": arguments.objective, "count_latency": arguments.latency}
    read, notes = problem.read_run_problem(arguments.case, **{name: value for name, value in given.items() if value})
    check_problem(read)
    return read, notes


def replace_loads(problem: PlacementProblem, word: str) -> tuple[PlacementProblem, str]:
    """Replace a problem's probabilities by what --loads names -> (problem, note). Raises HpcmoeError in one line."""
    from hpcmoe.placement.demand import make_probability
    from hpcmoe.placement.files.loads import ExpertGrid, choose_loads
    from hpcmoe.write.problem import read_loads

    grid = ExpertGrid(num_layers=problem.num_layers, num_experts=problem.num_experts)
    try:
        loads, origin = choose_loads(word, grid, top_k=1, read_record=read_loads)
    except HpcmoeError as error:
        raise type(error)(f"--loads: {error}") from None
    return replace(problem, probability=make_probability(loads, problem.node_names)), f"loads are {origin}"


def make_answer(
    problem: PlacementProblem, placement: Placement, rivals: Mapping[str, float | None], seed: int
) -> dict[str, object]:
    """Make the object of OUT.json; rivals: the seconds of other methods."""
    shape = problem.num_layers, problem.num_ranks, problem.slots_per_rank
    return {
        "objective": problem.objective,
        "objective_seconds": placement.objective_seconds,
        "lower_bound_seconds": placement.lower_bound_seconds,
        "optimal": placement.is_optimal,
        "cross_node_share": placement.cross_node_share,
        "sigma_links": placement.link_sigma,
        "seconds": placement.search_stats.seconds,
        "iterations": placement.search_stats.num_proposals,
        "seed": seed,
        **{f"{method}_seconds": seconds for method, seconds in rivals.items()},
        "expert_of_slot": placement.expert_of_replica.reshape(shape).tolist(),  # [layers][G][slots], -1 empty
    }


if __name__ == "__main__":
    sys.exit(main())
