"""Show every key with its comment, or one config as a run would take it: `hpcmoe config [my.toml] [--set ...]`.

Starts no ranks and imports neither MPI nor torch. Errors are listed, one per line, and end it with status 2.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()

import argparse
import itertools
import json
import pathlib
import re
import sys

from hpcmoe.arguments import Parser, name_program
from hpcmoe.config import Config, list_keys, read_config
from hpcmoe.errors import EXIT_USER, HpcmoeError
from hpcmoe.idle import find_ineffective
from hpcmoe.output import print_to_stderr, print_to_stdout

MANUAL = pathlib.Path(__file__).with_name("run.toml")


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        arguments = read_config_arguments(sys.argv[1:] if words is None else words)
        print_to_stdout(make_text(arguments.config, arguments.set))
    except HpcmoeError as error:
        print_to_stderr(f"hpcmoe: {line}" for line in str(error).splitlines())
        return EXIT_USER
    return 0


def read_config_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises ConfigError; exits after --help."""
    parser = Parser(
        prog=name_program("hpcmoe.settings"),
        description="Without arguments show every key with its unit, allowed values and default; else check a config, "
        "and show the whole of it.",
    )
    parser.add_argument("config", nargs="?", help="TOML file; without one, --set changes the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    return parser.parse_args(words)


def make_text(path: str | None, overrides: list[str]) -> str:
    """Return the manual where nothing is given, else the config of that file and these overrides, as TOML."""
    if path is None and not overrides:
        return MANUAL.read_text(encoding="utf-8").rstrip("\n")
    config, _ = read_config(MANUAL if path is None else path, overrides)
    print_to_stderr(f"hpcmoe: note: {note}" for note in find_ineffective(config))
    return write_config(config)


def write_config(config: Config) -> str:
    """Write a config as TOML that reads back equal."""
    parts = []
    for name, keys in itertools.groupby(list_keys(), key=lambda entry: entry[0]):
        section = getattr(config, name)
        lines = [f"{key} = {write_value(getattr(section, key))}" for _, key, _ in keys]
        parts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(parts)


def write_value(value: bool | int | float | str | tuple) -> str:
    """Write one value as TOML, which is JSON but for characters beyond ASCII: these by number, for any terminal."""
    return re.sub(r"[^ -~]", lambda found: f"\\U{ord(found[0]):08X}", json.dumps(value, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
