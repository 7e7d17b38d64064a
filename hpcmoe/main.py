"""The program on one page: `mpirun -n 16 python -m hpcmoe.main inputs/run.toml [--set section.key=value]`."""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()
    from hpcmoe.mpi_library import import_mpi

    import_mpi()

import argparse
import contextlib
import gc
import logging
import pathlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from hpcmoe.arguments import Parser, name_program
from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.launcher import check_launcher
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.cluster.topology import Topology, save_topology
from hpcmoe.config import Config, read_config
from hpcmoe.description import describe_run, describe_tokens, log_plan
from hpcmoe.ending import end_in_order
from hpcmoe.errors import exit_with, keep_on_root, on_all, on_root
from hpcmoe.hangs import counted_waits
from hpcmoe.idle import find_ineffective
from hpcmoe.interrupts import exit_on_signals, repeated_interrupts
from hpcmoe.model.text import check_text, find_text
from hpcmoe.model.tokens import unpack_documents
from hpcmoe.output import print_to_stdout, show_details, start_log
from hpcmoe.paths import expand_path
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.prepare.budget import check_budget, may_use_gpus
from hpcmoe.prepare.shards import resolve_tensor_parallel
from hpcmoe.pulse import busy, open_pulse
from hpcmoe.report.sinks import check_tensorboard
from hpcmoe.resuming import AUTO, TOPOLOGY, end_run, find_start, fit_to_ranks, leave_last
from hpcmoe.run.metadata import describe_checkpoint, log_changes
from hpcmoe.survivors import Survivors, join_survivors, leave_without_dead, notice_deaths, revoked_after_deaths
from hpcmoe.wait import barrier
from hpcmoe.watch import find_watch, start_watch
from hpcmoe.write.activations import write_activations
from hpcmoe.write.boxes import Piece, PieceSpec
from hpcmoe.write.folder import open_folder
from hpcmoe.write.mirror import choose_writer, open_mirror
from hpcmoe.write.pieces import read_pieces
from hpcmoe.write.problem import read_loads
from hpcmoe.write.records import Records, open_records
from hpcmoe.write.steps import is_in_folder, newest_checkpoint, step_of
from hpcmoe.write.writer import open_writer

if TYPE_CHECKING:  # what imports torch
    from hpcmoe.report.totals import Totals
    from hpcmoe.run.job import Job
    from hpcmoe.run.optimizer import Optimizer
    from hpcmoe.run.state import TrainingState

log = logging.getLogger("hpcmoe.main")


def main() -> None:
    """Run the program; any exception ends all ranks, but a rank's death does not where MPI survives it."""
    ranks = Survivors(MPI.COMM_WORLD, "")
    while not isinstance(ended := run_until_death(ranks), int):
        ranks = ended
    if ranks.who_died:
        leave_without_dead(ended)
    if ended:
        leave_last(ranks.comm.rank, ended)


def run_until_death(ranks: Survivors) -> int | Survivors:
    """Run the program on some ranks -> exit status, or those left after a death. Collective over the ranks.

    Does not return after any other exception.
    """
    comm, host, status = ranks.comm, read_host_name(), 0
    try:
        with repeated_interrupts(), notice_deaths(comm), contextlib.ExitStack() as opened, counted_waits():
            if ranks.who_died:
                start_watch(comm, host)
            else:
                check_launcher(comm)
            start_log(comm.rank, comm.size, host)
            arguments = on_root(comm, lambda: read_run_arguments(sys.argv[1:]))
            if arguments is not None:
                status = run(comm, arguments, opened, ranks.who_died)
            barrier(comm)  # nobody leaves while another may still fail
            find_watch().stop()
            return status
    except (Exception, KeyboardInterrupt) as error:
        find_watch().end(error)
        return join_survivors(comm, error) or exit_with(comm, error, host)


def run(comm: MPI.Intracomm, arguments: argparse.Namespace, opened: contextlib.ExitStack, who_died: str = "") -> int:
    """Read, place, run, write; opened holds the run's folder until the end -> exit status. Collective over comm."""
    # Check input and output first: what is wrong there need not wait for torch.
    resume = arguments.resume
    config, text = on_root(comm, lambda: read_config_and_note(arguments.config, arguments.set))
    folder = pathlib.Path(config.run.output, config.run.name)
    if who_died or arguments.restarted:
        config, resume = on_root(comm, lambda: fit_to_ranks(config, comm.size, folder, who_died)), AUTO
    checkpoint = find_start(comm, resume, folder, config)
    if checkpoint is not None and resume == AUTO and step_of(checkpoint) >= config.run.steps:
        log.info("%s is the last of [run] steps = %d: nothing is left to do", checkpoint, config.run.steps)
        return 0
    resumes = checkpoint is not None and is_in_folder(checkpoint, folder)
    if config.model.source == "hf":
        with exit_on_signals(lambda ending: end_all_ranks(comm, opened, ending)):
            from hpcmoe.finetune import TuningRun, check_source, run_finetune  # seconds of CPU

        on_root(comm, lambda: check_source(config, comm.size))
        topology = open_place(comm, config, resumes, opened)
        return run_finetune(comm, TuningRun(
            config=config, text=text, folder=folder, topology=topology, checkpoint=checkpoint, resumes=resumes,
        ))  # fmt: skip
    split = on_root(comm, lambda: find_text(config.data, config.model.sequence_length, folder))
    split = on_all(comm, lambda: check_text(split))

    # Read an earlier run's files before the folder, which may be theirs, is moved out of the way.
    loads = keep_on_root(comm, lambda: find_loads(config.placement.loads, config.model, read_loads))
    topology = open_place(comm, config, resumes, opened)
    split = unpack_documents(comm, config.data, config.model.sequence_length, folder) or split

    # Check the memory of nodes, that of GPUs is known when they are open.
    on_gpus = may_use_gpus(config.comm.device, config.cluster.memory_bytes_per_node, topology)
    if not on_gpus:
        on_root(comm, lambda: check_budget(config.spec, config.parallel.data, topology))
    device = config.comm.device if on_gpus else "host"
    parallel = resolve_tensor_parallel(comm, config.parallel, config.spec, topology, device)

    # Open the run, which imports torch; then train or infer, and record.
    with open_mesh(comm, parallel) as mesh, revoked_after_deaths(*mesh.comms):
        log.info("importing torch, which takes seconds on a busy disk")
        gc.disable()  # torch's import makes much that stays: a tenth of its time is looking through it for garbage
        with exit_on_signals(lambda ending: end_all_ranks(comm, opened, ending)):
            from hpcmoe.report.tables import make_table, record_results
            from hpcmoe.run.job import open_job  # seconds of CPU on a laptop

        gc.freeze()
        gc.enable()
        with open_job(config, topology, mesh, split, loads) as job:
            start = make_start(job, checkpoint)
            with open_records(comm, folder, start.step if resumes else None) as records:
                describe_run(records, job, text)
                with end_in_order(config.restart, folder if comm.rank == 0 else None) as job.stepper.ending:
                    totals = train_or_infer(job, records, folder, start)
                    describe_tokens(records, job)
                    record_results(records, job, totals)
            if comm.rank == 0:
                newest = newest_checkpoint(folder) if config.run.mode == "train" else None
                table, written = make_table(job, totals), [folder / "run.h5", *([newest] if newest else [])]
                print_to_stdout(f"\n{table}\n\nwritten: {', '.join(map(str, written))}")
    return end_run(comm, job.stepper.ending, totals.num_steps)


def read_config_and_note(path: str, overrides: list[str]) -> tuple[Config, str]:
    """Read a config, log what in it has no effect -> (Config, its text). Rank 0 alone; raises ConfigError."""
    config, text = read_config(path, overrides)
    check_tensorboard(config.run.tensorboard)
    for note in find_ineffective(config):
        log.warning("%s", note)
    return config, text


def open_place(comm: MPI.Intracomm, config: Config, resumes: bool, opened: contextlib.ExitStack) -> Topology:
    """Open the run's folder, and read where the ranks are and what joins them -> Topology. Collective over comm."""
    open_pulse().begin_run(config.restart.hang_limit)
    # Read a file, which may be in the folder, before what is there is moved out of the way; measure after it.
    topology = read_topology(comm, config.cluster) if config.cluster.links != "measure" else None
    folder = opened.enter_context(open_folder(comm, config.run.output, config.run.name, resume=resumes))
    log.info("reading the cluster; links between nodes are measured in %g s at most", config.cluster.measure_seconds)
    topology = topology or read_topology(comm, config.cluster)
    on_root(comm, lambda: save_topology(topology, folder / TOPOLOGY))
    log.info("%s", topology)
    return topology


def end_all_ranks(comm: MPI.Intracomm, opened: contextlib.ExitStack, ending: BaseException) -> None:
    """Close the run's folder as if an exception had come, and end all ranks. Not collective."""
    opened.__exit__(type(ending), ending, None)
    exit_with(comm, ending, read_host_name())


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins: as drawn from the seed, or as a checkpoint holds it."""

    optimizer: "Optimizer | None"  # None in inference
    state: "TrainingState"
    step: int
    load: np.ndarray  # [L, E], tokens of an expert / expected, under which the routers choose at first


def make_start(job: "Job", checkpoint: pathlib.Path | None) -> Start:
    """Make the state, and read it from the checkpoint if there is one. Collective over all ranks."""
    from hpcmoe.model.balance import even_load
    from hpcmoe.run.optimizer import Optimizer
    from hpcmoe.run.state import TrainingState

    config, network = job.config, job.stepper.network
    optimizer = Optimizer(network, job.placement, config, job.mesh) if config.run.mode == "train" else None
    state, step = TrainingState(job, optimizer), 0
    load = even_load(config.model.num_layers, config.model.num_experts)
    if checkpoint is not None:
        log.info("reading %s", checkpoint)
        step, load = resume(job, state, checkpoint)
    return Start(optimizer=optimizer, state=state, step=step, load=load)


def train_or_infer(job: "Job", records: Records, folder: pathlib.Path, start: Start) -> "Totals":
    """Train or infer, as [run] mode says. Collective over all ranks."""
    from hpcmoe.report.totals import gather_totals
    from hpcmoe.run.finite import check_state
    from hpcmoe.run.infer import infer
    from hpcmoe.run.state import LOAD
    from hpcmoe.run.train import is_due, layers_to_write, train

    config, world, write = job.config, job.mesh.world, job.config.write

    @busy("writing")
    def save(step: int, load: np.ndarray, activations: dict[str, np.ndarray]) -> None:
        """Write what is due after a step. Collective over all ranks."""
        if layers_to_write(config, step):
            write_activations(world, folder, step, activations)
        is_last = job.stepper.ending.is_agreed or is_due(step, write.checkpoint_every, config.run.steps)
        due = choose_writer(step, config.restart.mirror_every, is_last, writer, mirror)
        if start.optimizer is not None and due is not None:
            describe_tokens(records, job)
            records.flush()
            check_state(world, start.state, step, {LOAD: load})
            due.save(step, list_pieces(load), describe_checkpoint(config, step, world.size, len(job.training)))

    def list_pieces(load: np.ndarray) -> list[Piece]:
        """List what this rank holds of the state."""
        held = start.state.collect({LOAD: load})
        return [Piece(name=part.name, shape=part.shape, start=part.start, array=array) for part, array in held]

    log_plan(job)
    state_bytes = sum(piece.array.nbytes for piece in list_pieces(start.load))
    with (
        open_writer(world, folder, write.checkpoints_kept, write.asynchronous) as writer,
        open_mirror(world, folder, config.restart.mirror_every, state_bytes) as mirror,
    ):
        if start.optimizer is not None:
            losses = train(job, records, start.optimizer, (start.step, start.load), save)
        else:
            losses = infer(job, records, start.load, save)
    return gather_totals(job, start.optimizer, losses, writer.snapshot_bytes)


def resume(job: "Job", state: "TrainingState", checkpoint: pathlib.Path) -> tuple[int, np.ndarray]:
    """Read the state from a checkpoint of any number of ranks -> (its step, its load). Collective over all ranks."""
    from hpcmoe.run.state import LOAD

    wanted = [
        PieceSpec(name=part.name, shape=part.shape, start=part.start, extent=part.extent, keys=part.keys)
        for part in state.list_wanted()
    ]
    (arrays, metadata), step = read_pieces(job.mesh.world, checkpoint, wanted), step_of(checkpoint)
    log.info("resumed %s, step %d, written by %d ranks", checkpoint, step, metadata["num_ranks"])
    log_changes(metadata, job.config, len(job.training))
    return step, state.restore(arrays, step)[LOAD]


def read_run_arguments(words: list[str]) -> argparse.Namespace | None:
    """Parse the command line, and log as much as it asks for; None when only help was asked for. Raises ConfigError."""
    about = "Train or run a mixture of experts over MPI ranks."
    parser = Parser(prog=name_program("hpcmoe.main"), description=about, add_help=False)
    parser.add_argument("config", nargs="?", help="TOML file, such as inputs/run.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FOLDER", type=lambda path: expand_path(path, "--resume"),
        help="go on from the newest checkpoint of this run, or of FOLDER, or from the checkpoint FOLDER; auto: from "
        "the newest that is whole, from the start where there is none, and not at all after the last step",
    )  # fmt: skip
    parser.add_argument(
        "--restarted", action="store_true",
        help="go on after a fault, perhaps on fewer ranks: as --resume auto, in the nearest shape that they have",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="log all figures of a step that is shown")
    arguments = parser.parse_unless_help(words)
    if arguments is None:
        return None
    if arguments.config is None:
        parser.error("no input file; try inputs/run.toml")
    show_details(arguments.verbose)
    return arguments


if __name__ == "__main__":
    main()
