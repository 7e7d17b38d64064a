"""The Hugging Face families by hand: `hpcmoe hf MODEL --check` under mpirun, `hpcmoe hf --make-tiny FAMILY FOLDER`.

The check runs tiny text through a checkpoint's model, its experts spread over the ranks, and through transformers' own
on one process; it shows the largest difference of each kind of tensor, memory, what goes over each link and what binds.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()
    from hpcmoe.mpi_library import import_mpi

    import_mpi()

import argparse
import sys
from pathlib import Path

from mpi4py import MPI

from hpcmoe.arguments import Parser, name_program
from hpcmoe.cluster.discover import read_host_name
from hpcmoe.cluster.launcher import check_launcher
from hpcmoe.errors import exit_with, on_root
from hpcmoe.interrupts import exit_on_signals, repeated_interrupts
from hpcmoe.output import print_to_stdout
from hpcmoe.wait import barrier


def main() -> None:
    """Run the command; whatever goes wrong ends all ranks."""
    comm = MPI.COMM_WORLD
    try:
        with repeated_interrupts():
            check_launcher(comm)
            arguments = on_root(comm, lambda: read_family_arguments(sys.argv[1:]))
            if arguments is not None:
                with exit_on_signals(lambda ending: exit_with(comm, ending, read_host_name())):  # it imports torch
                    run_command(comm, arguments)
            barrier(comm)
    except (Exception, KeyboardInterrupt) as error:
        exit_with(comm, error, read_host_name())


def read_family_arguments(words: list[str]) -> argparse.Namespace | None:
    """Parse the command line; None when only help was asked for. Raises ConfigError."""
    about = "Check a Hugging Face mixture of experts on these ranks, or make a small random one."
    parser = Parser(prog=name_program("hpcmoe.families"), description=about, add_help=False)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of a checkpoint: config.json, *.safetensors")
    parser.add_argument("--check", action="store_true", help="compare it with transformers' own on one process")
    parser.add_argument(
        "--links", default="measure", metavar="FILE", help="links between nodes: a file as inputs/links.json; measured",
    )  # fmt: skip
    parser.add_argument(
        "--make-tiny", nargs=2, metavar=("FAMILY", "FOLDER"),
        help="write a random model of a family, such as mixtral, with a tokenizer",
    )  # fmt: skip
    arguments = parser.parse_unless_help(words)
    if arguments is None:
        return None
    if (arguments.model is None) == (arguments.make_tiny is None):
        parser.error("give a MODEL and --check, or --make-tiny FAMILY FOLDER")
    if arguments.model is not None and not arguments.check:
        parser.error(f"what to do with {arguments.model}? --check")
    return arguments


def run_command(comm: MPI.Intracomm, arguments: argparse.Namespace) -> None:
    """Make or check a model, as the command line says. Collective over comm."""
    if arguments.make_tiny is not None:
        on_root(comm, lambda: write_tiny(*arguments.make_tiny))
        return
    from hpcmoe.group import open as open_group
    from hpcmoe.model_check import compare_checkpoint

    with open_group(comm, links=arguments.links) as group:
        for part in compare_checkpoint(group, Path(arguments.model)):
            if comm.rank == 0:
                print_to_stdout(part)


def write_tiny(family: str, folder: str) -> None:
    """Write a small random model, and show what it is."""
    from transformers.utils import logging

    from hpcmoe.model.hf.tiny import make_tiny

    logging.disable_progress_bar()
    num_parameters = make_tiny(family, Path(folder))
    print_to_stdout(f"written: {folder}, a random {family} of {num_parameters / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
