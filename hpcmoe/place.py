"""Place experts by themselves: `python -m hpcmoe.place CASE.json --objective links --budget 5 -o OUT.json`.

CASE.json holds a placement problem, or a run's run.h5 the one it had. An error ends it with one line and exit status 2.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()

import contextlib
import importlib.util
import json
import logging
import math
import pathlib
import sys
import tempfile
import time

from hpcmoe.arguments import Parser, name_program
from hpcmoe.errors import EXIT_USER, ConfigError, HpcmoeError
from hpcmoe.interrupts import Interrupted, repeated_interrupts
from hpcmoe.messages import one_line
from hpcmoe.output import StderrHandler, print_to_stderr, print_to_stdout
from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.files.maps import check_map, read_map, write_map
from hpcmoe.placement.problem import OBJECTIVES, check_problem
from hpcmoe.placement.quotas import describe_unevenness, has_even_ranks

SECONDS_A_LAYER = 0.1  # of search where no budget is given
PICTURES = (".png", ".pdf", ".svg")


def main(words=None):
    """Run the command -> its exit status."""
    try:
        with repeated_interrupts():
            arguments = read_place_arguments(sys.argv[1:] if words is None else words)
            check_outputs(arguments)
            print_to_stdout(place_case(arguments))
    except HpcmoeError as error:
        first, *more = str(error).splitlines()
        print_to_stderr([f"hpcmoe: {first}" + f"; and {len(more)} more error{'s' * (len(more) > 1)}" * bool(more)])
        return EXIT_USER
    except Interrupted as ending:
        print_to_stderr([f"hpcmoe: {ending}"])
        return ending.status
    return 0


def read_place_arguments(words):
    """Parse the command line -> arguments. Raises ConfigError; leaves after --help."""
    parser = Parser(prog=name_program("hpcmoe.place"), description="Place experts on ranks.")
    parser.add_argument("case", metavar="CASE", help="placement problem: CASE.json, or the run.h5 of a run")
    parser.add_argument(
        "--objective", choices=OBJECTIVES,
        help="what a layer costs: its busiest link; ports and uplinks too; ranks' compute too (step, or the run's)",
    )  # fmt: skip
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help="time to search in, 0.1 s a layer; to prove how good the result is takes up to half as much more",
    )
    parser.add_argument("-o", "--output", metavar="OUT.json", help="write the placement there")
    parser.add_argument("--eplb-out", metavar="MAP", help="write it as EPLB's map of slots to experts: .json, .npy")
    parser.add_argument(
        "--start", metavar="FILE",
        help="begin with the placement there: OUT.json, another engine's map (.json, .npy), or the run.h5 of a run",
    )  # fmt: skip
    parser.add_argument(
        "--moves", type=natural, metavar="COUNT",
        help="after --start: copies of a layer that may move, 0 to weigh it as it is; without it as many as help",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help=f"draw it: {', '.join(PICTURES)}")
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


def positive(word):
    """Read a finite number above 0."""
    number = float(word)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError
    return number


def natural(word):
    """Read a whole number from 0 to 2^63 - 1."""
    number = int(word)
    if not 0 <= number < 2**63:
        raise ValueError
    return number


def check_outputs(arguments):
    """Make sure, before a long search, that what is asked for can be written."""
    check_apart(arguments)
    for path in map(pathlib.Path, filter(None, (arguments.output, arguments.eplb_out, arguments.plot))):
        with one_line_faults(path):
            if path.is_dir():
                raise ConfigError(f"{one_line(path)}: cannot be written: is a folder")
            # Try it: root is let in by permissions that a read-only or full disk then belies.
            with tempfile.TemporaryFile(dir=path.resolve().parent, buffering=0) as probe:
                probe.write(bytes(4096))
    if arguments.eplb_out and pathlib.Path(arguments.eplb_out).suffix not in (".json", ".npy"):
        raise ConfigError(f"--eplb-out {one_line(arguments.eplb_out)}: must end with .json, .npy")
    if arguments.plot:
        if pathlib.Path(arguments.plot).suffix.lower() not in PICTURES:
            raise ConfigError(f"--plot {one_line(arguments.plot)}: must end with {', '.join(PICTURES)}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plot: matplotlib is not there; pip install matplotlib, or hpcmoe[plot]")


def check_apart(arguments):
    """Refuse an output that is an input or another output by any of its names; a device may be several."""
    inputs = {"the case itself": arguments.case, "what --start reads": arguments.start}
    outputs = {
        "what -o writes": arguments.output,
        "what --eplb-out writes": arguments.eplb_out,
        "what --plot draws": arguments.plot,
    }
    taken = [(what, pathlib.Path(path)) for what, path in inputs.items() if path]
    for what, path in ((what, pathlib.Path(path)) for what, path in outputs.items() if path):
        for other, name in taken:
            with one_line_faults(path):
                if any(is_same(mine, its) for mine in with_part(path) for its in with_part(name)):
                    raise ConfigError(f"{one_line(path)}: cannot be written: is {other}")
        taken.append((what, path))


def with_part(path):
    """List a path and the temporary name under which replace_file() writes it."""
    whole = path.resolve()
    return whole, whole.with_name(f"{whole.name}.part")


def is_same(one, other):
    """Return True if two paths are one file, or would be; of devices each is its own."""
    if one.exists() and other.exists():
        return one.is_file() and one.samefile(other)
    return one == other


@contextlib.contextmanager
def one_line_faults(path):
    """Turn the system's refusal inside the block into a ConfigError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter of a link that leads to itself
        why = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{one_line(path)}: cannot be written: {why}") from None


def place_case(arguments):
    """Read the problem, solve it, write what was asked for -> the text to show."""
    problem, notes = _read_problem(arguments)
    if arguments.layer >= problem.num_layers:
        raise ConfigError(f"--layer {arguments.layer}: must be below layers = {problem.num_layers}")
    if notes:
        print_to_stderr(f"hpcmoe: note: {note}" for note in notes)

    logging.basicConfig(level=logging.INFO, format="hpcmoe: note: %(message)s", handlers=[StderrHandler()])

    # What compiles, or takes a second to import, waits until the input is known to be good.
    from hpcmoe.placement.result import compute_usage
    from hpcmoe.placement.solve import compare_methods
    from hpcmoe.report.placement_tables import make_placement_tables

    placement = search_placement(problem, arguments)
    if arguments.moves != 0 and (uneven := describe_unevenness(problem, placement.expert_of_replica)):
        print_to_stderr([f"hpcmoe: note: {uneven}"])
    rivals = compare_methods(problem, ("contiguous", "eplb") if arguments.compare else ("contiguous",))
    usage = compute_usage(problem, placement)

    written = [path for path in (arguments.output, arguments.eplb_out, arguments.plot) if path]
    if arguments.output:
        write_answer(arguments.output, make_answer(problem, placement, rivals, arguments.seed))
    if arguments.eplb_out:
        with replace_file(arguments.eplb_out) as part:
            write_map(part, placement.expert_of_replica, pathlib.Path(arguments.eplb_out).suffix)
    if arguments.plot:
        from hpcmoe.report.figures import draw_placement

        with replace_file(arguments.plot) as part:
            draw_placement(
                problem, placement, usage, part, pathlib.Path(arguments.plot).suffix[1:].lower(), arguments.layer
            )
    table = make_placement_tables(problem, placement, usage, rivals, arguments.layer)
    return f"{table}\n\nwritten: {', '.join(written)}" if written else table


def search_placement(problem, arguments):
    """Search for a placement, from the one that --start names if any -> Placement."""
    from hpcmoe.placement.refine import refine
    from hpcmoe.placement.result import SearchStats, evaluate
    from hpcmoe.placement.solve import SearchOptions, bound_layers, make_placement

    seconds = arguments.budget or SECONDS_A_LAYER * problem.num_layers
    options = {"seconds": seconds, "iterations": arguments.iterations, "seed": arguments.seed}
    start = read_start_layouts(problem, arguments.start) if arguments.start else None
    if arguments.moves is None:
        if start is not None and not has_even_ranks(problem, start):
            print_to_stderr(
                ["hpcmoe: note: the search begins elsewhere, since what it finds is to be even; --moves begins there"]
            )
        return make_placement(problem, start=start, **options)
    begun = time.perf_counter()
    layouts = refine(problem, start, arguments.moves, SearchOptions(**options)) if arguments.moves else start
    search_stats = SearchStats(seconds=time.perf_counter() - begun)
    return evaluate(problem, layouts, bound_layers(problem, layouts, seconds / 2), "packed", search_stats)


def read_start_layouts(problem, path):
    """Read the placement to begin with -> [L, S]."""
    if pathlib.Path(path).suffix == ".h5":
        from hpcmoe.write.problem import read_last_placement

        layouts, notes = check_map(path, "its placement", read_last_placement(path), problem)
    else:
        layouts, notes = read_map(path, problem)
    if notes:
        print_to_stderr(f"hpcmoe: note: {one_line(path)}: {note}" for note in notes)
    return layouts


def _read_problem(arguments):
    """Read the problem of a case file or of a run's record -> (PlacementProblem, notes)."""
    if pathlib.Path(arguments.case).suffix != ".h5":
        return read_case(arguments.case, arguments.objective or "step", arguments.latency)

    from hpcmoe.write import problem

    given = {"objective": arguments.objective, "count_latency": arguments.latency}
    read, notes = problem.read_run_problem(arguments.case, **{name: value for name, value in given.items() if value})
    check_problem(read)
    return read, notes


def make_answer(problem, placement, rivals, seed):
    """Lay a placement out as OUT.json has it -> dict."""
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


@contextlib.contextmanager
def replace_file(path):
    """Give a temporary name, which takes the path's place when the block ends well; a device is written as it is."""
    whole = pathlib.Path(path).resolve()
    part = whole.with_name(f"{whole.name}.part") if whole.is_file() or not whole.exists() else whole
    try:
        with one_line_faults(path):
            yield part
            part.replace(whole)
    finally:
        if part != whole:
            part.unlink(missing_ok=True)


def write_answer(path, answer):
    """Write OUT.json, a line for each key."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in answer.items())
    with replace_file(path) as part:
        part.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
