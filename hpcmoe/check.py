"""What there is to run on: `python -m hpcmoe.check`, alone or under mpirun or srun, tells and tries it."""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()
    from hpcmoe.mpi_library import import_mpi

    import_mpi()

import importlib.util
import platform
import sys
from dataclasses import dataclass

from mpi4py import MPI

from hpcmoe.arguments import Parser, name_program
from hpcmoe.cluster.discover import read_host_name, read_topology
from hpcmoe.cluster.launcher import check_launcher, find_launcher
from hpcmoe.config import ClusterConfig
from hpcmoe.errors import HpcmoeError, exit_with, on_all, on_root
from hpcmoe.interrupts import exit_on_signals, repeated_interrupts
from hpcmoe.messages import one_line
from hpcmoe.output import print_to_stdout
from hpcmoe.wait import barrier, gather_to_all

LINK_SECONDS = 1.0  # for all links between nodes
WIDTH = 12  # of the first column


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """What one rank finds."""

    host: str
    gpus: tuple[str, ...]
    missing: str | None  # what keeps it from a GPU
    nccl: str


def main():
    """Run the check; whatever goes wrong ends all ranks."""
    comm = MPI.COMM_WORLD
    try:
        with repeated_interrupts():
            check_launcher(comm)
            if on_root(comm, lambda: wants_help(sys.argv[1:])):
                return
            with exit_on_signals(lambda ending: exit_with(comm, ending, read_host_name())):  # it imports torch
                check(comm)
            barrier(comm)
    except (Exception, KeyboardInterrupt) as error:
        exit_with(comm, error, read_host_name())


def wants_help(words):
    """Read the command line -> whether only help was asked for, which is then shown."""
    parser = Parser(prog=name_program("hpcmoe.check"), description=__doc__, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this and stop")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        raise HpcmoeError(
            f"command line: {one_line(' '.join(unknown))}: unknown; {parser.prog} takes no arguments but --help"
        )
    if arguments.help:
        parser.print_help()
    return arguments.help


def check(comm):
    """Look around, and try every way that rows can take. Collective over comm."""
    from hpcmoe.comm.device import open_device
    from hpcmoe.comm.select import read_transport_support  # imports torch

    topology = read_topology(comm, ClusterConfig(measure_seconds=LINK_SECONDS))
    here = topology.ranks_of_node(topology.node_of_rank[comm.rank]).tolist()
    device = on_all(comm, lambda: open_device("auto", here.index(comm.rank)))
    finds, support_of_rank = (gather_to_all(comm, own) for own in (find(), read_transport_support(comm, device)))
    if comm.rank == 0:
        show_lines(describe_machine(topology) + describe_software(support_of_rank[0].answer) + describe_gpus(finds))
    names = gather_to_all(comm, device.name)
    if len(set(names)) > 1:
        raise_mixed(comm, names)
    try_all(comm, device, support_of_rank)


def raise_mixed(comm, names):
    """Refuse ranks of which only some have a GPU."""
    ranks = ", ".join(str(rank) for rank, name in enumerate(names) if name == "host")

    def refuse():
        raise HpcmoeError(f"ranks {ranks} have no GPU, the others have: nothing is tried")

    on_root(comm, refuse)


def find():
    """Look for GPUs, and what it takes to use them -> Find."""
    from hpcmoe.comm.cuda import count_gpus, describe_gpu, find_missing_cuda
    from hpcmoe.comm.nccl import find_nccl

    missing, nccl, no_nccl = find_missing_cuda(), None, "CuPy brings the calls to it; see CuPy"
    if importlib.util.find_spec("cupy"):
        nccl, no_nccl = find_nccl()
    gpus = tuple(describe_gpu(index) for index in range(count_gpus()))
    return Find(host=read_host_name(), gpus=gpus, missing=missing, nccl=name_nccl(nccl) if nccl else f"none: {no_nccl}")


def name_nccl(nccl):
    """Name NCCL's version."""
    from hpcmoe.comm.select import name_version

    return name_version(nccl.get_version())


def describe_machine(topology):
    """Tell of ranks, nodes, links and Slurm -> list of (what, text)."""
    lines = [("ranks", str(topology)), ("launcher", find_launcher())]
    if topology.num_nodes == 1:
        lines.append(("links", "all ranks are on one node"))
    else:
        rates = [
            topology.bytes_per_second[a, b]
            for a in range(topology.num_nodes)
            for b in range(topology.num_nodes)
            if a != b
        ]
        lines.append(
            ("links", f"{min(rates) / 1e9:.3g} to {max(rates) / 1e9:.3g} GB/s between nodes, by MPI on the host")
        )
    racks = ", ".join(topology.rack_names)
    lines.append(("racks", f"{racks} ({topology.source['racks']})"))
    return lines


def describe_software(mpi_answer):
    """Tell of Python, MPI, torch and CuPy -> list of (what, text)."""
    import torch

    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA; pip install torch from its CUDA index"
    cupy = importlib.util.find_spec("cupy")
    how = 'none: pip install "hpcmoe[gpu]" (CUDA 13), or cupy-cuda12x and nvidia-nccl-cu12'
    return [
        ("Python", platform.python_version()),
        ("MPI", library),
        ("", mpi_answer),
        ("torch", f"{torch.__version__}, built for {build}"),
        ("CuPy", read_cupy_version() if cupy else how),
    ]


def read_cupy_version():
    """Name CuPy's version; its packages' names tell the CUDA that they are for."""
    import importlib.metadata as metadata

    names = [d.metadata["Name"] for d in metadata.distributions() if (d.metadata["Name"] or "").startswith("cupy")]
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


def describe_gpus(finds):
    """Tell of GPUs and NCCL, a line for all ranks that find the same -> list of (what, text)."""
    lines = [("NCCL", text) for text in sorted({found.nccl for found in finds})]
    by_host = {}
    for found in finds:
        by_host.setdefault(found.host, found)
    for host, found in by_host.items():
        gpus = [f"{found.gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(found.gpus)]
        lines.append((f"GPUs of {host}"[: 3 * WIDTH], ", ".join(gpus) or "none"))
        if found.missing:
            lines.append(("", f"not used: {found.missing}"))
    return lines


def try_all(comm, device, support_of_rank):
    """Try each way on a small exchange, and tell what came of it. Collective over comm."""
    from hpcmoe.comm.plain import PlainDevice
    from hpcmoe.comm.select import describe_row_ops, find_obstacles
    from hpcmoe.comm.self_test import run_self_test

    on_host = device.name == "host"
    if on_host:
        device = PlainDevice()
    row_ops_names = describe_row_ops(comm, device)
    if comm.rank == 0:
        show_lines([("rows", line) for line in row_ops_names])
    for kind, reason in find_obstacles(support_of_rank).items():
        outcome = f"not tried: {reason}" if reason else format_self_test(run_self_test, kind, comm, device)
        if comm.rank == 0:
            where = " on the host's memory, in a GPU's place" if on_host and not reason else ""
            show_lines([(f"try {kind}", outcome + where)])


def format_self_test(run_self_test, kind, comm, device):
    """Try a all_to_all -> what came of it, in words, the same on all ranks. Collective over comm."""
    try:
        rate = run_self_test(kind, comm, device)
    except HpcmoeError as error:
        if not error.shared:
            raise
        return f"FAILED: {error}"
    rates = gather_to_all(comm, rate)
    return f"works: 1 MB from each rank to each, {min(rates) / 1e9:.3g} GB/s a rank"


def show_lines(lines):
    """Show (what, text) in two columns."""
    for what, text in lines:
        print_to_stdout(f"{what:<{WIDTH}} {text}")


if __name__ == "__main__":
    main()
