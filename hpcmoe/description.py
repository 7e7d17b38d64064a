"""What a run is, kept in its record: input, versions, cluster, placement, and what its tokens asked of the experts."""

import importlib.metadata
import platform

from mpi4py import MPI

from hpcmoe import __version__
from hpcmoe.write.problem import record_problem

NOT_INSTALLED = "not installed"  # a package that only lies on Python's path, or nowhere


def describe_run(records, job, text):
    """Keep what the run is: input, versions, cluster, placement."""
    from hpcmoe.prepare.placement import describe_placement  # torch: seconds of CPU on a laptop

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


def describe_tokens(records, job):
    """Keep the tokens that each node asked of each expert since this was kept last. Collective over all ranks."""
    tokens = job.meter.pop_tokens(job.topology.node_of_rank)
    if tokens is not None:
        records.describe("experts", "tokens_of_node", tokens, "assignments")


def read_versions():
    """Name the versions of what computes -> dict."""
    versions = {name: find_version(name) for name in ("numpy", "torch", "mpi4py", "h5py")}
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return {"hpcmoe": __version__, **versions, "python": platform.python_version(), "MPI library": library}


def find_version(package):
    """Name the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
