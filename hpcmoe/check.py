"""What there is to run on: `python -m hpcmoe.check`, alone or under mpirun or srun, shows and tests it."""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()
    from hpcmoe.mpi_library import import_mpi

    import_mpi()

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpi4py import MPI

from hpcmoe.arguments import Parser, name_program
from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.launcher import check_launcher, describe_launcher
from hpcmoe.cluster.topology import Topology
from hpcmoe.config import ClusterConfig
from hpcmoe.errors import HpcmoeError, exit_with, on_all, on_root
from hpcmoe.interrupts import exit_on_signals, repeated_interrupts
from hpcmoe.output import print_to_stdout
from hpcmoe.rank_speed import describe_all, describe_speeds, measure_rank
from hpcmoe.wait import barrier, gather_to_all

if TYPE_CHECKING:
    from hpcmoe.comm.device import Device
    from hpcmoe.comm.select import TransportSupport

_LINK_SECONDS = 1.0  # for all links between nodes
_WIDTH = 12  # of the first column

Lines = list[tuple[str, str]]  # of two columns


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank has of GPUs."""

    host: str
    gpus: tuple[str, ...]
    missing: str | None  # what keeps it from a GPU
    nccl: str


def main() -> None:
    """Run the check; whatever goes wrong ends all ranks."""
    comm = MPI.COMM_WORLD
    try:
        with repeated_interrupts():
            check_launcher(comm)
            arguments = on_root(comm, lambda: read_check_arguments(sys.argv[1:]))
            if arguments is None:
                return
            with exit_on_signals(lambda ending: exit_with(comm, ending, read_host_name())):  # it imports torch
                check(comm, arguments)
            barrier(comm)
    except (Exception, KeyboardInterrupt) as error:
        exit_with(comm, error, read_host_name())


def read_check_arguments(words: list[str]) -> argparse.Namespace | None:
    """Parse the command line; None when only help was asked for. Raises ConfigError."""
    parser = Parser(prog=name_program("hpcmoe.check"), description=__doc__, add_help=False)
    parser.add_argument("--json", action="store_true", help="write what was found as one JSON object, for scripts")
    parser.add_argument("--output", default="out", help="folder of runs, in whose file system locks are tried")
    return parser.parse_unless_help(words)


def check(comm: MPI.Comm, arguments: argparse.Namespace) -> None:
    """Show what is here, and test every backend that can carry rows. Collective over comm."""

    def show(lines: Lines) -> None:
        """Show lines on rank 0, unless a JSON object is to stand for them."""
        if comm.rank == 0 and not arguments.json:
            show_lines(lines)

    from hpcmoe.comm.device import open_device  # imports torch, as all of comm
    from hpcmoe.comm.select import read_transport_support

    # Read what each rank has.
    topology = read_topology(comm, ClusterConfig(measure_seconds=_LINK_SECONDS))
    here = topology.ranks_of_node(topology.node_of_rank[comm.rank]).tolist()
    device = on_all(comm, lambda: open_device("auto", here.index(comm.rank)))
    reports = gather_to_all(comm, read_rank_report())
    support_of_rank = gather_to_all(comm, read_transport_support(comm, device))
    software = describe_software(support_of_rank[0].answer)
    show(describe_machine(topology))
    show(software + describe_gpus(reports))

    # Measure all ranks at once: cores that they share show.
    barrier(comm)
    speeds = gather_to_all(comm, measure_rank(device, Path(arguments.output)))
    show(describe_speeds(speeds, topology))

    # A test needs devices of one kind.
    names = gather_to_all(comm, device.name)
    if len(set(names)) > 1:
        on_root(comm, lambda: reject_mixed_devices(names))
    outcomes = try_backends(comm, device, support_of_rank, show)
    if comm.rank == 0 and arguments.json:
        found = describe_all(topology, speeds) | {
            "software": {what: text for what, text in software if what},
            "gpus_of_host": {report.host: list(report.gpus) for report in reports},
            "backends": outcomes,
        }
        print_to_stdout(json.dumps(found, indent=1))


def reject_mixed_devices(names: list[str]) -> None:
    """Raise HpcmoeError for ranks of which only some have a GPU."""
    ranks = ", ".join(str(rank) for rank, name in enumerate(names) if name == "host")
    raise HpcmoeError(f"ranks {ranks} have no GPU, the others have: nothing is tried")


def read_rank_report() -> RankReport:
    """Read which GPUs are here, and what it takes to use them."""
    from hpcmoe.comm.cuda import count_gpus, describe_gpu, find_missing_cuda
    from hpcmoe.comm.nccl import find_nccl
    from hpcmoe.comm.select import format_version

    nccl, no_nccl = find_nccl() if has_cupy() else (None, "CuPy brings the calls to it; see CuPy")
    gpus = tuple(describe_gpu(index) for index in range(count_gpus()))
    version = format_version(nccl.get_version()) if nccl else f"none: {no_nccl}"
    return RankReport(host=read_host_name(), gpus=gpus, missing=find_missing_cuda(), nccl=version)


def has_cupy() -> bool:
    """Return True if CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


def describe_machine(topology: Topology) -> Lines:
    """Format the ranks, nodes, links and Slurm."""
    links = "all ranks are on one node"
    if topology.num_nodes > 1:
        pairs = [(a, b) for a in range(topology.num_nodes) for b in range(topology.num_nodes) if a != b]
        rates = [topology.bytes_per_second[pair] / 1e9 for pair in pairs]
        links = f"{min(rates):.3g} to {max(rates):.3g} GB/s between nodes, by MPI on the host"
    racks = f"{', '.join(topology.rack_names)} ({topology.source['racks']})"
    return [("ranks", str(topology)), ("launcher", describe_launcher()), ("links", links), ("racks", racks)]


def describe_software(mpi_answer: str) -> Lines:
    """Format the versions of Python, MPI, torch and CuPy."""
    import torch

    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA; pip install torch from its CUDA index"
    how = 'none: pip install "hpcmoe[gpu]" (CUDA 13), or cupy-cuda12x and nvidia-nccl-cu12'
    return [
        ("Python", platform.python_version()),
        ("MPI", library),
        ("", mpi_answer),
        ("torch", f"{torch.__version__}, built for {build}"),
        ("CuPy", read_cupy_version() if has_cupy() else how),
    ]


def read_cupy_version() -> str:
    """Return CuPy's version; its packages' names have the CUDA they are for."""
    names = {str(package.metadata["Name"]) for package in importlib.metadata.distributions()}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(names) if name.startswith("cupy"))


def describe_gpus(reports: list[RankReport]) -> Lines:
    """Format GPUs and NCCL, a line for all ranks that have the same."""
    lines = [("NCCL", text) for text in sorted({report.nccl for report in reports})]
    first_of_host = {report.host: report for report in reversed(reports)}
    for host in dict.fromkeys(report.host for report in reports):
        report = first_of_host[host]
        gpus = [f"{report.gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(report.gpus)]
        lines.append((f"GPUs of {host}"[: 3 * _WIDTH], ", ".join(gpus) or "none"))
        if report.missing:
            lines.append(("", f"not used: {report.missing}"))
    return lines


def try_backends(
    comm: MPI.Comm, device: "Device", support_of_rank: list["TransportSupport"], show: Callable[[Lines], None]
) -> dict[str, str]:
    """Test each backend on a small exchange, and show what came of it -> by name. Collective over comm."""
    from hpcmoe.comm.device import PlainDevice
    from hpcmoe.comm.select import describe_row_ops, find_obstacles

    # On the host a device in a GPU's place takes the same path.
    on_host = device.name == "host"
    if on_host:
        device = PlainDevice()
    row_ops = describe_row_ops(comm, device)
    show([("rows", line) for line in row_ops])
    outcomes = {}
    for kind, obstacle in find_obstacles(support_of_rank).items():
        outcome = f"not tried: {obstacle}" if obstacle else try_backend(kind, comm, device)
        where = " on the host's memory, in a GPU's place" if on_host and not obstacle else ""
        outcomes[kind] = outcome + where
        show([(f"try {kind}", outcomes[kind])])
    return outcomes


def try_backend(kind: str, comm: MPI.Comm, device: "Device") -> str:
    """Test a backend -> what came of it, in words, the same on all ranks. Collective over comm."""
    from hpcmoe.comm.self_test import run_self_test

    try:
        rate = run_self_test(kind, comm, device)
    except HpcmoeError as error:
        if not error.shared:
            raise
        return f"FAILED: {error}"
    rates = gather_to_all(comm, rate)
    return f"works: 1 MB from each rank to each, {min(rates) / 1e9:.3g} GB/s a rank"


def show_lines(lines: Lines) -> None:
    """Show lines in two columns."""
    for what, text in lines:
        print_to_stdout(f"{what:<{_WIDTH}} {text}")


if __name__ == "__main__":
    main()
