"""The command line of every program: its errors are raised, and it goes by the name that it was started by."""

import argparse
import sys

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line
from hpcmoe.output import print_to_stdout


class Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong with the command line, and whose help may lose its reader."""

    def error(self, message: str):
        """Raise instead of leaving, so that all ranks can end together."""
        raise ConfigError(f"command line: {one_line(message)}")

    def print_help(self, file=None):
        """Show the help; argparse leaves after it."""
        print_to_stdout(self.format_help())


def name_program(module: str) -> str:
    """Name the program as it was started, for its usage: `hpcmoe run`, or `python -m hpcmoe.main`."""
    return sys.argv[0] if sys.argv[0].startswith("hpcmoe ") else f"python -m {module}"
