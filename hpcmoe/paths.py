"""Paths of the config as a shell has them: `~` and `$VARIABLES` become what they stand for."""

import dataclasses
import os
import pwd
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from hpcmoe.environment import read_setting
from hpcmoe.errors import ConfigError, attempt
from hpcmoe.messages import printable

PATHS = (("run", "output"), ("cluster", "links"), ("placement", "method"), ("placement", "loads"))
WORDS_OR_PATH = {  # keys that take one of some words, or the path of a file
    ("cluster", "links"): ("measure",),
    ("placement", "method"): ("packed", "contiguous", "eplb"),
    ("placement", "loads"): ("uniform",),
}
PATTERNS = (("data", "files"), ("data", "exclude"))  # stay as they are: the files that they name are found on rank 0
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def expand_paths(config: Any, source_of: Callable[..., str]) -> Any:
    """Expand every path of a Config -> Config. Raises ConfigError with one line a path that cannot be.

    source_of(section, key) names the file or option that a value comes from.
    """
    errors = []
    for name, key in PATHS:
        section = getattr(config, name)
        path, error = attempt(partial(expand_path, getattr(section, key), f"{source_of(name, key)}: [{name}] {key}"))
        errors.append(error)
        config = dataclasses.replace(config, **{name: dataclasses.replace(section, **{key: path})})
    for name, key in PATTERNS:
        for pattern in getattr(getattr(config, name), key):
            _, error = attempt(partial(expand_pattern, pattern, f"{source_of(name, key)}: [{name}] {key}"))
            errors.append(error)
    run_name = config.run.name
    what = f"{source_of('run', 'name')}: [run] name = {printable(repr(run_name))}"
    errors.append(attempt(partial(check_name, run_name, what))[1])
    if any(errors):
        raise ConfigError("\n".join(str(error) for error in errors if error is not None))
    return config


def is_path(value: str) -> bool:
    """Return True if the value of a key of WORDS_OR_PATH is meant as a path: it has what no word has."""
    return any(character in value for character in "/.~$")


def expand_pattern(pattern: str, what: str) -> str:
    """Expand a pattern of files, unless a file has that very name."""
    return pattern if os.path.isfile(pattern) else expand_path(pattern, what)


def expand_path(path: str, what: str) -> str:
    """Put the folder in the place of `~` or `~user`, and values in the place of `$NAME` and `${NAME}`.

    Raises ConfigError, which begins with `what` and names the user or variable, where that is not known, and for a
    path that no file can have.
    """

    def refuse(why):
        return ConfigError(f"{what} = {printable(repr(path))}: {why}")

    def find_value(match):
        name = match[1] or match[2]
        value = read_setting(name)
        if not value:
            raise refuse(f"${printable(name)} is not set, or is empty")
        return value

    head, slash, tail = path.partition("/")
    if head.startswith("~"):
        folder = find_home(head[1:])
        if not folder:
            raise refuse(f"no user {printable(head[1:])}" if head[1:] else "$HOME is not set")
        head = folder
    else:
        head = VARIABLE.sub(find_value, head)
    expanded = head + slash + VARIABLE.sub(find_value, tail)
    check_name(expanded, f"{what} = {printable(repr(path))}")
    return expanded


def check_name(path: str, what: str) -> None:
    """Raise ConfigError, which begins with `what`, for a path that no file can have."""
    if "\0" in path:
        raise ConfigError(f"{what}: must hold no zero byte")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ConfigError(f"{what}: has characters that names of files here cannot have") from None


def find_home(user):
    """Find the folder of a user, or of this one for "" -> path, "" where there is none."""
    own = "" if user else read_setting("HOME")
    try:
        return own or (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    except (KeyError, ValueError):
        return ""
