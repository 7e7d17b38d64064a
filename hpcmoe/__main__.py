"""The `hpcmoe` command, also `python -m hpcmoe`: lists its commands, and runs one; nothing is imported before that."""

import importlib
import sys

from hpcmoe import __version__
from hpcmoe.messages import show_value, suggest
from hpcmoe.mpi_library import describe_missing, import_mpi
from hpcmoe.output import EXIT_USER, print_to_stderr, print_to_stdout
from hpcmoe.start import prepare_process

COMMANDS = {  # name: (module, whether it starts MPI, what it does, an example)
    "run": ("hpcmoe.main", True, "train or run a model on MPI ranks", "mpirun -n 4 hpcmoe run inputs/run.toml"),
    "place": ("hpcmoe.place", False, "place experts by themselves", "hpcmoe place inputs/case.json --budget 5"),
    "plan": (
        "hpcmoe.plan",
        False,
        "foretell a step on a described cluster",
        "hpcmoe plan inputs/run.toml --cluster inputs/cluster.toml",
    ),
    "check": ("hpcmoe.check", True, "show and try what there is to run on", "mpirun -n 2 hpcmoe check"),
    "report": ("hpcmoe.report.__main__", False, "show what runs did, as a page too", "hpcmoe report out/run"),
    "hf": ("hpcmoe.families", True, "check or make a Hugging Face model", "mpirun -n 2 hpcmoe hf MODEL --check"),
    "generate": (
        "hpcmoe.generate",
        True,
        "continue texts by a model",
        'mpirun -n 2 hpcmoe generate out/run --prompt "def "',
    ),
    "config": ("hpcmoe.settings", False, "show every key, check a config", "hpcmoe config my.toml"),
}

RESTART = "--restart"  # of run: the command then starts the ranks itself
SUPERVISED = ("hpcmoe.supervise", False)


def main(arguments: list[str] | None = None) -> int | None:
    """Run the command that the first argument names -> exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    match name:
        case "-h" | "--help" | "help":
            print_to_stdout(describe_commands())
            return 0
        case "-V" | "--version":
            print_to_stdout(f"hpcmoe {__version__}")
            return 0
    if name not in COMMANDS:
        print_to_stderr([f"hpcmoe: command line: {show_value(name)}: unknown command{suggest(name, COMMANDS)}"])
        return EXIT_USER

    # Import the program, which may take seconds, and run it.
    sys.argv = [f"hpcmoe {name}", *rest]
    prepare_process()
    module, needs_mpi, *_ = SUPERVISED if name == "run" and is_supervised(rest) else COMMANDS[name]
    if needs_mpi:
        import_mpi()
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        print_to_stderr([f"hpcmoe: {describe_missing(error)}"])
        return EXIT_USER
    return program.main()


def is_supervised(words: list[str]) -> bool:
    """Return True if a run is to be started anew after faults."""
    return any(word.partition("=")[0] == RESTART for word in words)


def describe_commands() -> str:
    """Format the list of commands."""
    rows = [f"  {name:<10}{what:<38}{example}" for name, (*_, what, example) in COMMANDS.items()]
    supervised = "  hpcmoe run CONFIG --restart -n 4 starts the ranks itself, and starts them anew after a fault"
    options = "  --version, --help, and `hpcmoe COMMAND --help`"
    return "\n".join(["usage: hpcmoe COMMAND ...", "", *rows, "", supervised, options])


if __name__ == "__main__":
    sys.exit(main())
