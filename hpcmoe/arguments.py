"""The command line of every program, whose errors are raised and whose usage names the program as it was started."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from hpcmoe.errors import ConfigError, HpcmoeError
from hpcmoe.interrupts import Interrupted, repeated_interrupts
from hpcmoe.messages import one_line
from hpcmoe.output import EXIT_USER, print_to_stderr, print_to_stdout


class Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong with the command line, and whose help may lose its reader."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of exiting, so that all ranks can end together."""
        raise ConfigError(f"command line: {one_line(message)}")

    def parse_unless_help(self, words: Sequence[str]) -> argparse.Namespace | None:
        """Parse a command line, or print the help it asks for and return None: not all ranks may exit. Takes -h itself.

        Build the parser with add_help=False. Raises ConfigError.
        """
        self.add_argument("-h", "--help", action="store_true", help="show this and stop")
        arguments = self.parse_args(words)
        if not arguments.help:
            return arguments
        self.print_help()
        return None

    def print_help(self, file: object = None) -> None:
        """Print the help; argparse exits after it."""
        print_to_stdout(self.format_help())


def name_program(module: str) -> str:
    """Name the program as it was started, for its usage: `hpcmoe run`, or `python -m hpcmoe.main`."""
    return sys.argv[0] if sys.argv[0].startswith("hpcmoe ") else f"python -m {module}"


def run_without_ranks(work: Callable[[], None], is_first: bool = True) -> int:
    """Run the work of a program without ranks -> its exit status; an error or an interrupt ends it with one line.

    is_first: it has the line; the other ranks of mpirun have the same one.
    """
    try:
        with repeated_interrupts():
            work()
    except HpcmoeError as error:
        first, *more = str(error).splitlines()
        if is_first:
            print_to_stderr([f"hpcmoe: {first}" + f"; and {len(more)} more error{'s' * (len(more) > 1)}" * bool(more)])
        return EXIT_USER
    except Interrupted as ending:
        print_to_stderr([f"hpcmoe: {ending}"])
        return ending.status
    return 0
