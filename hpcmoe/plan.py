"""Foretell a step on a described cluster: `hpcmoe plan inputs/run.toml --cluster inputs/cluster.toml`.

Needs neither ranks nor torch. An error ends it with one line and status 2.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from hpcmoe.arguments import Parser, name_program, run_without_ranks
from hpcmoe.config import Config, NetworkSpec, read_config
from hpcmoe.environment import read_environment
from hpcmoe.errors import ConfigError, on_root
from hpcmoe.messages import show_value
from hpcmoe.mpi_library import import_mpi
from hpcmoe.output import print_to_stdout, start_log
from hpcmoe.placement.demand import Loads
from hpcmoe.placement.files.loads import ExpertGrid, choose_loads
from hpcmoe.projection.answers import choose_best, format_plan, make_plan_tree
from hpcmoe.projection.candidates import foretell, parse_nodes
from hpcmoe.projection.cluster_file import DescribedCluster, read_cluster
from hpcmoe.projection.costs import Costs, read_costs
from hpcmoe.projection.estimated import NetworkSizes, size_model, size_own_network
from hpcmoe.projection.model_file import read_model
from hpcmoe.projection.predict import Prediction
from hpcmoe.projection.step import PlannedJob, Shape
from hpcmoe.reading import format_json
from hpcmoe.results import check_outputs, replace_file
from hpcmoe.start import find_rank

_BYTES_OF_TEXT = 256  # vocabulary of a run's own network


def main(words: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status."""

    def work() -> None:
        arguments = read_plan_arguments(sys.argv[1:] if words is None else words)
        if arguments.measure:
            measure_ops(arguments)
        else:
            print_to_stdout(answer(arguments))

    return run_without_ranks(work, is_first=find_rank(read_environment()) == "0")


def read_plan_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises ConfigError; exits after --help."""
    parser = Parser(prog=name_program("hpcmoe.plan"), description="Foretell a step on a described cluster.")
    parser.add_argument("config", metavar="RUN.toml", help="the run that is meant")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="another value of a key"
    )
    parser.add_argument("--cluster", metavar="FILE", help="cluster.toml, or the topology.json of a run")
    parser.add_argument(
        "--measure", metavar="costs.json",
        help="measure the costs of RUN.toml's ops, on the ranks of mpirun, and write them there: half a minute",
    )  # fmt: skip
    parser.add_argument("--model", metavar="config.json", help="a Hugging Face model in place of [model]'s sizes")
    parser.add_argument("--costs", metavar="costs.json", help="measured costs of ops; else from data sheets")
    parser.add_argument(
        "--loads", metavar="WORD",
        help="of experts: even, a power law's exponent as 1.2, or a file; else the range of even, 1.0 and 1.2",
    )  # fmt: skip
    parser.add_argument("--nodes", metavar="1:512:x2", help="numbers of nodes; else all of the cluster")
    parser.add_argument("--shapes", metavar="all|8x32x1,...", help="data x expert x tensor; else [parallel]'s")
    parser.add_argument(
        "--vary",
        metavar="nic=x2,...",
        help="changes, each by itself: nic, uplink, latency, compute, batch, micro_batches",
    )
    parser.add_argument(
        "--tokens", type=positive_tokens, default=1e12, metavar="COUNT", help="for node-hours (%(default)g)"
    )
    parser.add_argument("-o", "--output", metavar="PLAN.json", help="write the answer there")
    parser.add_argument("--write", metavar="BEST.toml", help="write the config of the best shape there")
    arguments = parser.parse_args(words)
    if (arguments.cluster is None) == (arguments.measure is None):
        parser.error("give --cluster FILE, to foretell a step on it, or --measure FILE, to measure costs on ranks")
    inputs = {"the config": arguments.config, "the cluster": arguments.cluster, "the model": arguments.model,
              "the costs": arguments.costs}  # fmt: skip
    check_outputs(inputs, {"what -o writes": arguments.output, "what --write writes": arguments.write,
                           "what --measure writes": arguments.measure})  # fmt: skip
    return arguments


def positive_tokens(word: str) -> float:
    """Read a finite number of tokens above 0."""
    number = float(word)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError
    return number


def measure_ops(arguments: argparse.Namespace) -> None:
    """Measure the costs of a config's ops on this job's ranks. Collective over MPI's world, which starts here."""
    import_mpi()
    from mpi4py import MPI

    from hpcmoe.measuring import measure_costs

    comm = MPI.COMM_WORLD
    config = on_root(comm, lambda: read_config(arguments.config, arguments.set)[0])
    start_log(comm.rank, comm.size, os.uname().nodename)
    measure_costs(comm, config, arguments.measure)
    if comm.rank == 0:
        print_to_stdout(f"written: {arguments.measure}")


def answer(arguments: argparse.Namespace) -> str:
    """Read what is given, foretell the candidates, write what was asked for -> the text to show."""
    config, _ = read_config(arguments.config, arguments.set)
    cluster = read_cluster(arguments.cluster)
    costs = read_costs(arguments.costs) if arguments.costs else None
    sizes, layers = read_sizes(arguments.model, config)
    check_costs(costs, sizes, config, arguments.costs)
    nodes = parse_nodes(arguments.nodes) if arguments.nodes else [cluster.topology.num_nodes]
    changes = [word.strip() for word in arguments.vary.split(",")] if arguments.vary else []
    asked = []
    for word in [arguments.loads] if arguments.loads else ["even", "1.0", "1.2"]:
        grid = ExpertGrid(num_layers=layers, num_experts=sizes.num_experts)
        loads, what = choose_loads(word, grid, sizes.top_k, read_record)
        job = make_planned_job(config, sizes, loads, costs)
        asked.append((foretell(job, cluster, nodes, arguments.shapes, changes, find_given(config, cluster)), what))

    # Where loads are not known, answer for the middle of them, with the range of all.
    candidates, what = asked[len(asked) // 2]
    if len(asked) > 1:
        candidates = [
            replace(mine, prediction=widen_range(mine.prediction, [of_load[number].prediction for of_load, _ in asked]))
            for number, mine in enumerate(candidates)
        ]
        what = f"not given: the range is that of {asked[0][1]} to {asked[-1][1]}, the time {what}; give --loads"
    if arguments.output:
        with replace_file(arguments.output) as part:
            part.write_text(format_json(make_plan_tree(candidates, what, arguments.tokens)), encoding="utf-8")
    if arguments.write:
        shape = choose_best(candidates).prediction.shape
        best = replace(config, parallel=replace(config.parallel, **asdict(shape)))
        with replace_file(arguments.write) as part:
            part.write_text(format_config(best), encoding="utf-8")
    return format_plan(candidates, what, arguments.tokens)


def format_config(config: Config) -> str:
    """Format a config as TOML: the keys that differ from their defaults."""
    lines = ["# Written by `hpcmoe plan --write`; other keys have their defaults."]
    given, defaults = asdict(config), asdict(Config())
    for section, keys in given.items():
        differing = {key: value for key, value in keys.items() if value != defaults[section][key]}
        lines += ["", f"[{section}]"] * bool(differing)
        lines += [f"{key} = {json.dumps(value)}" for key, value in differing.items()]
    return "\n".join([*lines, ""])


def read_record(path: str) -> Loads:
    """Read the loads of a run's record; h5py is imported for it alone."""
    from hpcmoe.write.loads import read_loads

    return read_loads(path)


def read_sizes(model: str | None, config: Config) -> tuple[NetworkSizes, int]:
    """Read the sizes of the network, and its layers with experts."""
    if model is not None:
        read = read_model(model)
        return size_model(read, config.model.sequence_length), len(read.moe_layers)
    spec = NetworkSpec(
        model=config.model, dispatch=config.dispatch, experts=config.experts, seed=0, trains=config.run.mode == "train"
    )
    return size_own_network(spec, _BYTES_OF_TEXT), config.model.num_layers


def check_costs(costs: Costs | None, sizes: NetworkSizes, config: Config, path: str | None) -> None:
    """Raise ConfigError where measured costs are of another network, precision or use."""
    if costs is None:
        return
    wanted = {"hidden": sizes.hidden, "kind": sizes.kind, "top_k": sizes.top_k, "dtype": config.model.dtype,
              "sequence_length": sizes.sequence_length, "mode": config.run.mode}  # fmt: skip
    for name, value in wanted.items():
        if getattr(costs.conditions, name) != value:
            raise ConfigError(
                f"{path}: conditions: {name} = {show_value(getattr(costs.conditions, name))}: the run has "
                f"{show_value(value)}; measure its own"
            )


def make_planned_job(config: Config, sizes: NetworkSizes, loads: Loads, costs: Costs | None) -> PlannedJob:
    """Make what is to be done in a step."""
    return PlannedJob(
        sizes=sizes,
        loads=loads.tokens,
        node_names=loads.node_names,
        dtype=config.model.dtype,
        trains=config.run.mode == "train",
        batch_sequences=config.data.batch_sequences,
        micro_batches=config.pipeline.micro_batches,
        in_flight=config.pipeline.in_flight,
        schedule=config.pipeline.schedule,
        by_load=config.placement.method != "contiguous",
        spare_slots=config.placement.spare_slots_per_rank,
        replicate=config.placement.replicate,
        costs=costs,
    )


def find_given(config: Config, cluster: DescribedCluster) -> Shape | None:
    """Return the shape of [parallel] where it fits all of the cluster's ranks."""
    parallel, num_ranks = config.parallel, len(cluster.topology.node_of_rank)
    data, tensor = parallel.data, parallel.tensor or 1
    expert = parallel.expert or max(num_ranks // (data * tensor), 1)
    shape = Shape(data=data, expert=expert, tensor=tensor)
    return shape if shape.num_ranks == num_ranks and (parallel.expert or expert <= config.model.num_experts) else None


def widen_range(mine: Prediction, others: Sequence[Prediction]) -> Prediction:
    """Return a prediction whose range holds those of other loads."""
    ends = [end for other in others for end in other.seconds_range]
    return replace(mine, seconds_range=(min(ends), max(ends)))


if __name__ == "__main__":
    sys.exit(main())
