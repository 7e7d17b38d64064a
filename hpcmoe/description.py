"""What a run is: its input, versions, cluster, placement and tokens in its record, sizes and memory in its log."""

import importlib.metadata
import logging
import platform
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from hpcmoe import __version__
from hpcmoe.prepare.budget import format_budget
from hpcmoe.write.problem import record_problem
from hpcmoe.write.records import Records

if TYPE_CHECKING:  # which imports torch
    from hpcmoe.prepare.placement import RunPlacement
    from hpcmoe.run.job import Job
    from hpcmoe.run.tuning_job import TuningJob

NOT_INSTALLED = "not installed"  # a package that only lies on Python's path, or nowhere
log = logging.getLogger(__name__)


def describe_run(records: Records, job: "Job | TuningJob", text: str) -> None:
    """Write what the run is: input, versions, cluster, placement."""
    topology = job.topology
    records.describe("run", "config", text)
    records.describe("run", "versions", read_versions())
    for name in ("node_of_rank", "rack_of_node", "devices_of_node", "cores_of_node"):
        records.describe("cluster", name, getattr(topology, name))
    rates = [f"{kind}bytes_per_second" for kind in ("", "egress_", "ingress_", "uplink_")]
    for name, unit in (*((rate, "B/s") for rate in rates), ("latency_seconds", "s"), ("memory_bytes", "B")):
        records.describe("cluster", name, getattr(topology, name), unit)
    records.describe("cluster", "node_names", list(topology.node_names))
    records.describe("cluster", "rack_names", list(topology.rack_names))
    records.describe("cluster", "source", dict(topology.source))
    describe_placement(records, job.run_placement)
    if job.problem is not None:
        record_problem(records, job.problem)


def describe_placement(records: Records, run_placement: "RunPlacement") -> None:
    """Write the placement and the figures of its search."""
    placement = run_placement.placement
    units = {"split": "share of a node's tokens for the slot's expert"}
    units |= dict.fromkeys(("objective_seconds", "lower_bound_seconds"), "s")
    for name in (
        "expert_of_replica", "rank_of_replica", "replica_count", "split", "objective", "cross_node_share", "link_sigma",
        "objective_seconds", "lower_bound_seconds",
    ):  # fmt: skip
        if getattr(placement, name) is not None:
            records.describe("cluster", name, getattr(placement, name), units.get(name, ""))
    records.describe("cluster", "placement", placement.method)
    records.describe("cluster", "optimal", placement.is_optimal)
    records.describe("cluster", "search_seconds", placement.search_stats.seconds, "s")
    records.describe("cluster", "search_proposals", placement.search_stats.num_proposals)
    for method, seconds in run_placement.seconds_of_method.items():
        records.describe("cluster", f"{method}_seconds", np.nan if seconds is None else seconds, "s")


def describe_tokens(records: Records, job: "Job | TuningJob") -> None:
    """Write the tokens of each expert by their home node, since the last call. Collective over all ranks."""
    tokens = job.meter.pop_tokens(job.topology.node_of_rank)
    if tokens is not None:
        records.describe("experts", "tokens_of_node", tokens, "assignments")


def read_versions() -> dict[str, str]:
    """Read the versions of what computes -> by name."""
    versions = {name: find_version(name) for name in ("numpy", "torch", "mpi4py", "h5py")}
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return {"hpcmoe": __version__, **versions, "python": platform.python_version(), "MPI library": library}


def find_version(package: str) -> str:
    """Return the version of a package, or NOT_INSTALLED."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def log_plan(job: "Job") -> None:
    """Log what is about to run and how much memory it will take. Collective over all ranks."""
    from hpcmoe.prepare.placement import format_placement
    from hpcmoe.prepare.sizes import format_sizes
    from hpcmoe.report.totals import format_sampling_floors

    memory, model, text_bytes = job.memory, job.config.model, len(job.training)
    log.info(
        "%d layers x %d experts, top-%d, hidden %d, feed-forward %d; %.1f MB of text to train on",
        model.num_layers, model.num_experts, model.top_k, model.hidden, model.feed_forward, text_bytes / 1e6,
    )  # fmt: skip
    dispatcher = job.stepper.dispatcher
    for line in [
        *format_budget(job.budget, job.topology, memory.per_expert, model.num_layers),
        *format_placement(job.run_placement, job.config.placement),
        *format_sizes(dispatcher.sizes, dispatcher.routes),
        format_sampling_floors(job),
    ]:
        log.info("%s", line)
    log.info(
        "memory of a rank, as computed: %.1f MB, of these %.1f MB message buffers and %.1f MB activations",
        memory.total / 1e6, memory.buffers / 1e6, memory.activations / 1e6,
    )  # fmt: skip
