"""Continue texts by a model on MPI ranks: `mpirun -n 2 python -m hpcmoe.generate MODEL --prompts FILE`.

MODEL is a folder with a Hugging Face checkpoint, the folder of a run of this program, or one of its checkpoints.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()
    from hpcmoe.mpi_library import import_mpi

    import_mpi()

import argparse
import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mpi4py import MPI

from hpcmoe.arguments import Parser, name_program
from hpcmoe.cluster.discover import read_host_name
from hpcmoe.cluster.launcher import check_launcher
from hpcmoe.errors import ConfigError, exit_with, keep_on_root, on_all, on_root
from hpcmoe.interrupts import exit_on_signals, repeated_interrupts
from hpcmoe.messages import one_line
from hpcmoe.model.prompts import Codec, PromptText, deal_prompts, encode_prompts, read_prompts
from hpcmoe.output import StderrHandler, print_to_stderr
from hpcmoe.paths import expand_path
from hpcmoe.results import check_outputs
from hpcmoe.wait import barrier, broadcast
from hpcmoe.write.checkpoint import find_checkpoint
from hpcmoe.write.pieces import MASTER
from hpcmoe.write.steps import list_checkpoints

if TYPE_CHECKING:  # what imports torch
    from hpcmoe.model.continuations import Continuation, Engine
    from hpcmoe.model.sampling import SamplingOptions
    from hpcmoe.report.texts import TextReport

_HF_CONFIG = "config.json"
_TUNED = "hf"  # in the folder of a run that trained a Hugging Face model: the model as its family's checkpoint
_COMMAND_LINE = "command line"  # with which errors begin


def main() -> None:
    """Run the command; whatever goes wrong ends all ranks."""
    comm, host = MPI.COMM_WORLD, read_host_name()
    try:
        with repeated_interrupts():
            check_launcher(comm)
            arguments = on_root(comm, lambda: read_generate_arguments(sys.argv[1:]))
            if arguments is not None:
                generate(comm, arguments)
            barrier(comm)  # nobody leaves while another may still fail
    except (Exception, KeyboardInterrupt) as error:
        exit_with(comm, error, host)


def read_generate_arguments(words: list[str]) -> argparse.Namespace | None:
    """Parse the command line; None when only help was asked for. Raises ConfigError."""
    parser = Parser(prog=name_program("hpcmoe.generate"), description="Continue texts by a model.", add_help=False)
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="folder with a Hugging Face checkpoint (config.json), folder of a run, or one of its checkpoints",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", metavar="FILE", help='a prompt a line, or in FILE.jsonl {"text": ...} a line')
    source.add_argument("--prompt", metavar="TEXT", help="one prompt, whose text is shown as it comes")
    parser.add_argument(
        "--output", default="", metavar="FILE.jsonl", help="write a line a prompt: prompt, text, tokens, finish_reason"
    )
    parser.add_argument("--batch", type=int, default=8, help="prompts of a rank at once (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="of a prompt, bytes of our own model (%(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="draw tokens; 0: the likeliest (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest; 0: from all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that make up P (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, at any number of ranks (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of a rank; 0: its share of the cores (%(default)s)")
    arguments = parser.parse_unless_help(words)
    if arguments is None:
        return None
    if arguments.model is None:
        parser.error(f"no MODEL; try {parser.prog} out/run --prompt TEXT")
    if arguments.prompts is None and arguments.prompt is None:
        parser.error("no prompt: --prompts FILE or --prompt TEXT")
    for name, least in ("batch", 1), ("threads", 0):
        if (number := getattr(arguments, name)) < least:
            parser.error(f"--{name} {number}: must be at least {least}")
    return arguments


def generate(comm: MPI.Intracomm, arguments: argparse.Namespace) -> None:
    """Read prompts, continue them by the model, and show or write what comes of them. Collective over comm."""
    # Check input and output first: what is wrong there need not wait for torch.
    path, is_hf = on_root(comm, lambda: find_model(arguments.model))
    given = keep_on_root(comm, lambda: read_input(arguments))
    with exit_on_signals(lambda ending: exit_with(comm, ending, read_host_name())):
        on_all(comm, lambda: import_engine(is_hf))
        options = on_root(comm, lambda: read_options(arguments))
    level = logging.INFO if is_hf and comm.rank == 0 else logging.WARNING  # how loading goes on, which may take minutes
    logging.basicConfig(level=level, format="hpcmoe: %(message)s", handlers=[StderrHandler()])

    # Encode the prompts before the model is read, whose weights may take minutes.
    report = keep_on_root(comm, lambda: make_report(path, is_hf, given or [], options, arguments.output))
    with open_engine(comm, path, is_hf, arguments) as engine:
        continue_all(comm, engine, report, options, arguments.batch)
    if report is not None:
        print_to_stderr([f"hpcmoe: {report.summarize(comm.size)}"])


def find_model(where: str) -> tuple[Path, bool]:
    """Find what a model is -> (its path, whether it is a Hugging Face checkpoint). Raises ConfigError for neither."""
    path = Path(expand_path(where, "MODEL"))
    for folder in path, path / _TUNED:
        if (folder / _HF_CONFIG).is_file():
            return folder, True
    if path.is_dir() and ((path / MASTER).is_file() or list_checkpoints(path)):
        return path, False
    raise ConfigError(
        f"MODEL = {one_line(where)}: {'holds neither' if path.is_dir() else 'is no folder with'} a Hugging Face "
        f"checkpoint ({_HF_CONFIG}) {'nor' if path.is_dir() else 'or'} a checkpoint of a run (checkpoint-STEP)"
    )


def read_input(arguments: argparse.Namespace) -> list[PromptText]:
    """Read the prompts, and check that the output can be written. Raises ConfigError."""
    check_outputs({"what --prompts reads": arguments.prompts}, {"what --output writes": arguments.output})
    if arguments.prompts is None:
        return [PromptText(text=arguments.prompt, where="--prompt")]
    return read_prompts(expand_path(arguments.prompts, "--prompts"))


def read_options(arguments: argparse.Namespace) -> "SamplingOptions":
    """Read how texts are to be continued. Raises ConfigError."""
    from hpcmoe.model.sampling import make_sampling_options

    names = "max_new_tokens", "temperature", "top_k", "top_p", "seed"
    return make_sampling_options(_COMMAND_LINE, **{name: getattr(arguments, name) for name in names})


def import_engine(is_hf: bool) -> None:
    """Import what runs the model, which takes seconds. Raises ConfigError where transformers is missing."""
    if is_hf:
        from hpcmoe.model.hf.generation import quiet_transformers
        from hpcmoe.model.hf.spread import check_version

        check_version("hpcmoe generate")
        quiet_transformers()
    else:
        import hpcmoe.reopen  # noqa: F401


def make_report(
    path: Path, is_hf: bool, given: list[PromptText], options: "SamplingOptions", output: str
) -> "TextReport":
    """Encode the prompts, and make the report on their texts. Raises ConfigError."""
    from hpcmoe.model.decode import ByteCodec
    from hpcmoe.model.hf.generation import read_codec
    from hpcmoe.report.texts import TextReport

    codec: Codec = read_codec(path) if is_hf else ByteCodec()
    return TextReport(given, encode_prompts(given, codec, options.max_new_tokens), codec, output)


@contextlib.contextmanager
def open_engine(comm: MPI.Intracomm, path: Path, is_hf: bool, arguments: argparse.Namespace) -> Iterator["Engine"]:
    """Open the model, for a batch of prompts on each rank. Collective over comm, both ends."""
    if is_hf:
        from hpcmoe.group import open as open_group
        from hpcmoe.hf import load
        from hpcmoe.model.hf.generation import FamilyEngine

        with open_group(comm, in_flight=1, schedule="serial", threads=arguments.threads) as group:
            yield FamilyEngine(load(path, group))
    else:
        from hpcmoe.model.decode import ByteEngine
        from hpcmoe.reopen import open_network

        checkpoint = find_checkpoint(comm, path)
        with open_network(comm, checkpoint, arguments.batch, arguments.threads) as network:
            yield ByteEngine(network)


def continue_all(
    comm: MPI.Intracomm, engine: "Engine", report: "TextReport | None", options: "SamplingOptions", batch: int
) -> None:
    """Extend all prompts, in rounds of a batch on each rank at most. Collective over comm.

    report: on rank 0 alone, which has the prompts and gets the texts.
    """
    from hpcmoe.comm.vote import Vote
    from hpcmoe.model.continuations import Continuations

    if report is not None:
        report.start()
    vote, listen = Vote(comm), [report.show] if report is not None and report.streams else []
    num_prompts, size = broadcast(comm, report and len(report.prompts)), batch * comm.size
    for first in range(0, num_prompts, size):
        dealt = None if report is None else deal_prompts(report.prompts[first : first + size], comm.size)
        barrier(comm)  # early ranks wait here, and not inside the blocking call
        texts = Continuations(comm.scatter(dealt), options, engine.ends, vote, *listen)
        engine.run(texts)
        take_texts(comm, texts.rows, report)


def take_texts(comm: MPI.Intracomm, rows: "list[Continuation]", report: "TextReport | None") -> None:
    """Collect the texts of a round in the report on rank 0, in the order of their prompts. Collective over comm."""
    barrier(comm)
    gathered = comm.gather(rows)

    def add() -> None:
        if report is not None and gathered is not None:
            report.add(sorted(itertools.chain(*gathered), key=lambda row: row.prompt.number))

    on_root(comm, add)


if __name__ == "__main__":
    main()
