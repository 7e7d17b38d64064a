"""The program on one page: `mpirun -n 16 python -m hpcmoe.main inputs/run.toml [--set section.key=value]`."""

import argparse
import importlib.metadata
import logging
import pathlib
import platform
import sys

from mpi4py import MPI

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.cluster.topology import check_launcher, host_name, read_topology, save_topology
from hpcmoe.config import read_config
from hpcmoe.errors import ConfigError, exit_with, on_root
from hpcmoe.wait import barrier
from hpcmoe.watch import start_watch
from hpcmoe.write.activations import write_activations
from hpcmoe.write.checkpoint import find_checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from hpcmoe.write.pieces import Part, Piece
from hpcmoe.write.records import open_records, prepare_folder

log = logging.getLogger("hpcmoe.main")


def main():
    """Run the program; whatever goes wrong ends all ranks."""
    comm, host = MPI.COMM_WORLD, host_name()
    watch = start_watch(comm, host)
    try:
        check_launcher(comm)
        start_log(comm)
        arguments = on_root(comm, lambda: read_arguments(sys.argv[1:]))
        if arguments is not None:
            run(comm, arguments)
        barrier(comm)  # nobody leaves while another may still fail
        watch.dismiss()
    except (Exception, KeyboardInterrupt) as fault:
        watch.dismiss()
        exit_with(comm, fault, host)


def run(comm, arguments):
    """Read, place, run, keep. Collective over comm."""
    # Make sure of input and output first: a wrong key need not wait for torch.
    config, text = on_root(comm, lambda: read_config(arguments.config, arguments.set))
    folder = pathlib.Path(config.run.output, config.run.name)
    checkpoint = None if arguments.resume is None else find_checkpoint(comm, arguments.resume or folder)
    goes_on = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    on_root(comm, lambda: check_checkpoint(checkpoint, folder, config))
    prepare_folder(comm, config.run.output, config.run.name, resume=goes_on)

    # Find out where the ranks are and what joins them.
    topology = read_topology(comm, config.cluster)
    on_root(comm, lambda: save_topology(topology, folder / "topology.json"))
    log.info("%s", topology)

    with open_mesh(comm, config.cluster) as mesh:
        from hpcmoe.run.job import open_job  # imports torch: seconds of CPU on a laptop

        with open_job(config, topology, mesh) as job:
            kept_steps = step_of(checkpoint) if goes_on else None
            with open_records(comm, folder, kept_steps) as records:
                describe_run(records, job, text)
                totals = train_or_infer(job, records, folder, checkpoint)
                describe_totals(records, totals)
            if comm.rank == 0:
                from hpcmoe.run.report import make_table

                written = [folder / "run.h5", *filter(None, [newest_checkpoint(folder)])]
                print(f"\n{make_table(job, totals)}\n\nwritten: {', '.join(map(str, written))}", flush=True)


def train_or_infer(job, records, folder, checkpoint):
    """Do what [run] mode asks, from a checkpoint or from the start -> Totals. Collective over all ranks."""
    from hpcmoe.run.balance import even_load
    from hpcmoe.run.infer import infer
    from hpcmoe.run.optimizer import Optimizer
    from hpcmoe.run.report import sum_up
    from hpcmoe.run.state import State
    from hpcmoe.run.train import is_due, train

    # Lay the state out: as drawn from the seed, or as a checkpoint holds it.
    config, mesh, network = job.config, job.mesh, job.stepper.network
    training = config.run.mode == "train"
    optimizer = Optimizer(network, job.placement, config, mesh) if training else None
    state = State(job, optimizer)
    step, load = 0, even_load(config.model.num_layers, config.model.num_experts)
    if checkpoint is not None:
        step, load = resume(mesh.world, state, checkpoint)

    def save(step, load, activations):
        """Keep what is due after a step. Collective over all ranks."""
        if activations:
            write_activations(mesh.world, folder, step, activations)
        if training and is_due(step, config.write.checkpoint_every, config.run.steps):
            records.flush()
            pieces = [Piece(name=n, shape=s, start=at, array=a) for n, s, at, a in state.collect(load)]
            facts = {"step": step, "num_ranks": mesh.world.size, "seed": config.run.seed}
            save_checkpoint(mesh.world, folder, step, pieces, facts, config.write.checkpoints_kept)
            log.info("step %d: checkpoint written", step)

    announce(job)
    losses = train(job, records, optimizer, (step, load), save) if training else infer(job, records, load, save)
    return sum_up(job, optimizer, losses)


def resume(comm, state, checkpoint):
    """Take the state from a checkpoint of any number of ranks -> (its step, its load). Collective over comm."""
    wanted = [Part(name=n, shape=s, start=at, extent=e, keys=keys) for n, s, at, e, keys in state.wanted()]
    arrays, facts = load_checkpoint(comm, checkpoint, wanted)
    log.info("resumed %s, step %d, written by %d ranks", checkpoint, facts["step"], facts["num_ranks"])
    return int(facts["step"]), state.restore(arrays, int(facts["step"]))


def announce(job):
    """Say what is about to run and how much memory it will take."""
    placement, memory = job.placement, job.memory
    model, text_bytes = job.config.model, len(job.training)
    log.info(
        "%d layers x %d experts, top-%d, hidden %d, feed-forward %d; %.1f MB of text to train on",
        model.num_layers, model.num_experts, model.top_k, model.hidden, model.feed_forward, text_bytes / 1e6,
    )  # fmt: skip
    log.info(
        "placement %s: objective links %.4g ms a step, lower bound %.4g ms",
        placement.method, 1e3 * placement.objective_seconds, 1e3 * placement.lower_bound_seconds,
    )  # fmt: skip
    log.info(
        "memory of a rank, as computed: %.1f MB, of these %.1f MB message buffers and %.1f MB activations",
        memory.total / 1e6, memory.buffers / 1e6, memory.activations / 1e6,
    )  # fmt: skip


def describe_run(records, job, text):
    """Keep what the run is: input, versions, cluster, placement."""
    topology, placement = job.topology, job.placement
    records.describe("run", "config", text)
    records.describe("run", "versions", read_versions())
    for name in ("node_of_rank", "rack_of_node", "devices_of_node", "cores_of_node"):
        records.describe("cluster", name, getattr(topology, name))
    for name, unit in (("bytes_per_second", "B/s"), ("latency_seconds", "s"), ("memory_bytes", "B")):
        records.describe("cluster", name, getattr(topology, name), unit)
    records.describe("cluster", "node_names", list(topology.node_names))
    records.describe("cluster", "rack_names", list(topology.rack_names))
    records.describe("cluster", "source", dict(topology.source))
    for name in ("expert_of_replica", "rank_of_replica", "replica_count", "share_of_replica"):
        records.describe("cluster", name, getattr(placement, name))
    records.describe("cluster", "placement", placement.method)
    records.describe("cluster", "objective_seconds", placement.objective_seconds, "s")
    records.describe("cluster", "lower_bound_seconds", placement.lower_bound_seconds, "s")


def describe_totals(records, totals):
    """Keep the figures of the whole run."""
    records.describe("run", "tokens_per_second_overall", totals.tokens_per_second, "tokens/s")
    records.describe("comm", "bytes_of_link", totals.bytes_of_link, "B, rank to rank")
    records.describe("dispatch", "link_sigma_floor", totals.link_sigma_floor, "1")
    records.describe("run", "peak_resident_bytes", totals.peak_resident_bytes, "B")


def read_versions():
    """Name the versions of what computes -> dict."""
    packages = ("hpcmoe", "numpy", "torch", "mpi4py", "h5py")
    versions = {name: importlib.metadata.version(name) for name in packages}
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return versions | {"python": platform.python_version(), "MPI library": library}


def step_of(checkpoint):
    """Read the step in a checkpoint's name."""
    return int(checkpoint.resolve().name.rpartition("-")[2])


def check_checkpoint(checkpoint, folder, config):
    """Refuse to resume what is at its end, or from the folder that a new run of this name would replace."""
    if checkpoint is None:
        return
    if config.run.mode == "train" and step_of(checkpoint) >= config.run.steps:
        raise ConfigError(
            f"[run] steps = {config.run.steps}: must be more than the {step_of(checkpoint)} of {checkpoint}"
        )
    previous = folder.with_name(f"{folder.name}.previous").resolve()
    if previous in checkpoint.resolve().parents and folder.exists():
        raise ConfigError(f"--resume {checkpoint}: this run would replace {previous.name}; rename it first")


def read_arguments(words):
    """Parse the command line -> arguments, or None when only help was asked for. Raises ConfigError."""
    parser = Parser(prog="hpcmoe.main", description="Train or run a mixture of experts over MPI ranks.", add_help=False)
    parser.add_argument("config", nargs="?", help="TOML file, such as inputs/run.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FOLDER",
        help="go on from the newest checkpoint of this run, or of FOLDER, or from the checkpoint FOLDER",
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this and stop")
    arguments = parser.parse_args(words)
    if arguments.help:
        print(parser.format_help(), flush=True)
        return None
    if arguments.config is None:
        parser.error("no input file; try inputs/run.toml")
    return arguments


class Parser(argparse.ArgumentParser):
    """A parser whose errors end all ranks, not one."""

    def error(self, message):
        """Raise instead of leaving."""
        raise ConfigError(f"command line: {message}")


def start_log(comm):
    """Log to standard error: rank 0 what goes on, the others what goes wrong."""
    logging.basicConfig(
        level=logging.INFO if comm.rank == 0 else logging.WARNING,
        format=f"%(asctime)s [{comm.rank}/{comm.size} {host_name()}] %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


if __name__ == "__main__":
    main()
