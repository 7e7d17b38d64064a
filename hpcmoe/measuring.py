"""The costs of a step's ops on this machine, measured: each rank runs small jobs of its own, all at the same time.

A rank alone exchanges nothing, so that an op's seconds are its work's; the others beside it take their part of caches
and memory, as in the run that is foretold. Its experts are as many as one rank of that run holds. On hosts the
processor time of its thread is counted, which does not grow where ranks share a core; on GPUs wall-clock time.
"""

import datetime
import logging
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from mpi4py import MPI

from hpcmoe.clock import Clock, Measure, Stage, Timer
from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.cluster.topology import Topology, save_topology
from hpcmoe.config import Config, DataConfig, ParallelConfig
from hpcmoe.description import read_versions
from hpcmoe.errors import ConfigError, on_all, on_root
from hpcmoe.model.balance import even_load, update_load
from hpcmoe.model.split import Split
from hpcmoe.model.text import find_text
from hpcmoe.pipeline.lanes import Lanes
from hpcmoe.placement.files.loads import make_even
from hpcmoe.projection.costs import LAYER_OPS, MICRO_BATCH_OPS, OPS, CostConditions, Costs, fit_op, format_costs
from hpcmoe.results import replace_file
from hpcmoe.run.job import Job, choose_threads, open_job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.train import draw_batch, train_step
from hpcmoe.wait import barrier, gather_to_all

log = logging.getLogger(__name__)

SECONDS_OF_SIZE = 12.0  # of steps at each of two sizes
_WARMUP_STEPS, _LEAST_STEPS, _MOST_STEPS = 3, 5, 200
_SMALLER = 8  # times fewer tokens at the other size
_MOST_LAYERS = 2  # all cost the same
_CPUINFO = pathlib.Path("/proc/cpuinfo")


class OpClock(Clock):
    """A clock that counts seconds by op: what a lane does between its stages too, by the stage before."""

    def __init__(self, lanes: Lanes, num_layers: int, read_seconds: Callable[[], float]) -> None:
        super().__init__()
        self.lanes, self.num_layers, self.read_seconds = lanes, num_layers, read_seconds
        self.ops: dict[str, float] = {}
        self.last: tuple[Stage, int] | None = None  # stage and layer that ended last; None at a micro-batch's begin

    def measure(self, timer: Timer, lane: int | None = None, pauses: bool = False) -> Measure:
        """Count the time of the with-block to the lane's stage if that is what begins, else to the timer."""
        own = self.lanes.lane
        is_stage = own is not self.lanes.caller and own.at is not None and own.at[0].report_as is timer
        begins = own.at if is_stage and not pauses else None
        if begins == (Stage.DENSE, 0):  # what was before it is the embedding
            self.last = None
        self.charge()
        if begins is None:
            return super().measure(timer, lane, pauses)
        self.last = begins
        return super().measure(begins[0], lane)  # type: ignore[arg-type]  # the name of an op, as a timer is

    def charge(self) -> None:
        """Add the time since the last change to what has been running."""
        now = self.read_seconds()
        if self.running:
            op = self.name_op()
            self.ops[op] = self.ops.get(op, 0.0) + now - self.since
        self.since = now

    def name_op(self) -> str:
        """Name the op that is running: a stage or timer, or what comes after a lane's last stage."""
        if len(self.running) > 1 or self.running is not self.lanes.lane.timers:
            return str(self.running[-1])
        if self.last is None or self.last == (Stage.COMBINE, self.num_layers - 1):
            return "head"
        return "dense_backward" if self.last[0] is Stage.ROUTE_BACKWARD else str(self.last[0])

    def pop_ops(self) -> dict[str, float]:
        """Return the seconds of each op since the last call, and start again from zero."""
        self.charge()
        ops, self.ops = self.ops, {}
        return ops


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedSamples:
    """The seconds of ops at one size of micro-batches."""

    tokens: int  # of a micro-batch
    seconds: Mapping[str, np.ndarray]  # by op, [steps], of one such op


def measure_costs(comm: MPI.Intracomm, config: Config, path: str, seconds: float = SECONDS_OF_SIZE) -> Costs:
    """Measure the costs of a config's ops with this job's ranks, and write them to a file -> Costs on all ranks.

    Where the ranks are on several nodes their links are measured too, and written beside it as a topology.json.
    Collective over comm. Raises ConfigError, ClusterError or PlacementError on all ranks.
    """
    if config.model.source != "own":
        raise ConfigError(f'[model] source = "{config.model.source}": --measure measures the network of "own"')
    topology = read_topology(comm, config.cluster)
    split = on_root(comm, lambda: find_text(DataConfig(), config.model.sequence_length))
    samples = []
    for sequences in choose_micro_batches(config, comm.size):
        log.info("measure %d ranks, micro-batches of %d sequences, %.3g s", comm.size, sequences, seconds)
        alone = make_lone_config(config, comm, topology, sequences)
        barrier(comm)  # all begin together
        own = on_all(comm, partial(run_alone, alone, split, seconds))
        samples.append(join_samples(gather_to_all(comm, own)))
    costs = make_costs(config, alone, samples, describe_measurement(comm, config, topology))

    def write() -> None:
        with replace_file(path) as part:
            part.write_text(format_costs(costs), encoding="utf-8")
        if topology.num_nodes > 1:
            save_topology(topology, name_topology(path))

    on_root(comm, write)
    return costs


def name_topology(path: str) -> pathlib.Path:
    """Name the file of the links that were measured beside a costs file: costs.topology.json."""
    return pathlib.Path(path).with_suffix(".topology.json")


def choose_micro_batches(config: Config, num_ranks: int) -> tuple[int, int]:
    """Choose the sequences of a micro-batch at each of two sizes: a rank's of this job, and far fewer or more."""
    large = max(config.data.batch_sequences // (config.pipeline.micro_batches * num_ranks), 1)
    small = max(large // _SMALLER, 1)
    return (small, large) if small < large else (large, 2 * large)


def make_lone_config(config: Config, comm: MPI.Intracomm, topology: Topology, sequences: int) -> Config:
    """Make the config of a rank that runs alone, with its part of a run's experts, threads and memory."""
    model, parallel, node = config.model, config.parallel, topology.node_of_rank[comm.rank]
    on_gpus = config.comm.device != "host" and topology.devices_of_node[node] > 0
    memory = 0 if on_gpus else int(topology.memory_bytes[node]) // len(topology.ranks_of_node(node))
    tensor = max(parallel.tensor, 1)
    of_rank = -(-model.num_experts * parallel.data * tensor // comm.size)
    return replace(
        config,
        run=replace(config.run, threads_per_rank=config.run.threads_per_rank or choose_threads(topology, comm.rank)),
        model=replace(
            model,
            feed_forward=max(model.feed_forward // tensor, 1),
            num_layers=min(model.num_layers, _MOST_LAYERS),
            num_experts=min(max(of_rank, model.top_k), model.num_experts),
        ),
        cluster=replace(config.cluster, links="measure", racks=(), memory_bytes_per_node=memory),
        parallel=ParallelConfig(data=1, expert=1, tensor=1),
        pipeline=replace(config.pipeline, schedule="serial"),
        placement=replace(config.placement, method="contiguous", loads="uniform", seconds_per_token=1e-9),
        rebalance=replace(config.rebalance, every=0),
        data=replace(DataConfig(), batch_sequences=sequences * config.pipeline.micro_batches),
        train=replace(config.train, check_every=0, shard_optimizer=False),
        write=replace(config.write, activations_of_layers=()),
    )


def run_alone(config: Config, split: Split, seconds: float) -> SizedSamples:
    """Run steps on this rank alone for so many seconds -> what each op took. Not collective."""
    comm, model = MPI.COMM_SELF, config.model
    topology = read_topology(comm, config.cluster, assumes_links=True)
    loads = make_even(model.num_layers, model.num_experts)
    with open_mesh(comm, config.parallel) as mesh, open_job(config, topology, mesh, split, loads) as job:
        on_host = job.stepper.network.device.torch_device.type == "cpu"
        clock = OpClock(job.stepper.lanes, model.num_layers, time.thread_time if on_host else time.perf_counter)
        job.stepper.clock = job.stepper.lanes.clock = job.stepper.dispatcher.clock = job.meter.clock = clock
        steps = time_steps(job, clock, seconds)
    ops = [op for op in OPS if any(op in step for step in steps)]
    return SizedSamples(
        tokens=config.data.batch_sequences // config.pipeline.micro_batches * model.sequence_length,
        seconds={op: np.array([step.get(op, 0.0) for step in steps]) / count_ops(config, op) for op in ops},
    )


def count_ops(config: Config, op: str) -> int:
    """Count how often a step has an op."""
    of_layers = config.model.num_layers if op in LAYER_OPS else 1
    return of_layers * (config.pipeline.micro_batches if op in (*LAYER_OPS, *MICRO_BATCH_OPS) else 1)


def time_steps(job: Job, clock: OpClock, seconds: float) -> list[dict[str, float]]:
    """Run steps until the seconds are over -> of each, after some that warm up, the seconds by op."""
    config, steps = job.config, list[dict[str, float]]()
    load = even_load(config.model.num_layers, config.model.num_experts)
    trains = config.run.mode == "train"
    optimizer = Optimizer(job.stepper.network, job.placement, config, job.mesh) if trains else None
    started = time.perf_counter()
    while not is_enough(len(steps), time.perf_counter() - started, seconds):
        clock.pop_ops()
        begun, number = clock.read_seconds(), len(steps) + 1
        if optimizer is not None:
            outcome, _ = train_step(job, optimizer, load, number)
        else:
            outcome = job.stepper.run(job.training, draw_batch(job, number), load, "infer")
        took = clock.read_seconds() - begun
        ops = clock.pop_ops()
        steps.append(ops | {"rest": max(took - sum(ops.values()), 0.0)})
        load = update_load(load, outcome.stats.utilisation, config.dispatch.load_window_steps)
    return steps[min(_WARMUP_STEPS, len(steps) // 2) :]


def is_enough(num_steps: int, elapsed: float, seconds: float) -> bool:
    """Return True if steps have taken their seconds, or of slow ones twice that."""
    if num_steps < _WARMUP_STEPS + _LEAST_STEPS:
        return num_steps > 1 and elapsed >= 2 * seconds
    return elapsed >= seconds or num_steps >= _MOST_STEPS


def join_samples(of_ranks: list[SizedSamples]) -> SizedSamples:
    """Join the ranks' samples of one size."""
    ops = [op for op in OPS if all(op in of_rank.seconds for of_rank in of_ranks)]
    joined = {op: np.concatenate([of_rank.seconds[op] for of_rank in of_ranks]) for op in ops}
    return SizedSamples(tokens=of_ranks[0].tokens, seconds=joined)


def make_costs(config: Config, alone: Config, samples: list[SizedSamples], source: Mapping[str, str]) -> Costs:
    """Fit a line to each op's samples -> Costs."""
    tokens = [of_size.tokens for of_size in samples]
    ops = [op for op in OPS if all(op in of_size.seconds for of_size in samples)]
    model = alone.model
    conditions = CostConditions(
        hidden=model.hidden,
        feed_forward=model.feed_forward,
        kind=config.experts.kind,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        sequence_length=model.sequence_length,
        attention=model.attention,
        dtype=model.dtype,
        mode=config.run.mode,
        micro_batches=config.pipeline.micro_batches,
    )
    return Costs(
        conditions=conditions,
        ops={op: fit_op(tokens, [of_size.seconds[op] for of_size in samples]) for op in ops},
        source=source,
        tokens=tuple(tokens),
    )


def describe_measurement(comm: MPI.Intracomm, config: Config, topology: Topology) -> dict[str, str]:
    """Describe where and when costs are measured."""
    of_node = np.bincount(topology.node_of_rank) / topology.cores_of_node
    versions = read_versions()
    return {
        "host": read_host_name(),
        "processor": read_processor(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ranks": str(comm.size),
        "ranks_per_core": f"{of_node.max():.3g}",
        "threads_per_rank": str(config.run.threads_per_rank or choose_threads(topology, comm.rank)),
        "dtype": config.model.dtype,
        "hpcmoe": versions["hpcmoe"],
        "torch": versions["torch"],
    }


def read_processor() -> str:
    """Read the processor's name."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
