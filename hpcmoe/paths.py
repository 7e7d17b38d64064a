"""Paths of the config, expanded as a shell does: `~` and `$VARIABLES` become what they stand for."""

import dataclasses
import os
import pwd
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from hpcmoe.environment import read_setting
from hpcmoe.errors import ConfigError, HpcmoeError, attempt
from hpcmoe.messages import printable

PATHS = (
    ("run", "output"), ("model", "path"), ("cluster", "links"), ("placement", "method"), ("placement", "loads"),
)  # fmt: skip
WORDS_OR_PATH = {  # keys that take one of some words, or the path of a file
    ("cluster", "links"): ("measure",),
    ("placement", "method"): ("packed", "contiguous", "eplb"),
    ("placement", "loads"): ("uniform",),
}
_PATTERNS = (("data", "files"), ("data", "exclude"))  # stay as they are: the files that they name are found on rank 0
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def expand_paths(config: Any, source_of: Callable[..., str]) -> Any:
    """Expand every path of a Config -> Config. Raises ConfigError with one line a path that cannot be.

    source_of(section, key) names the file or option that a value comes from.
    """
    errors: list[HpcmoeError] = []

    def collect(check: Callable[[str, str], Any], value: str, what: str) -> Any:
        """Return what a check returns for a value, or keep the error it raises."""
        result, error = attempt(partial(check, value, what))
        errors.extend([error] if error else [])
        return result

    for name, key in PATHS:
        section = getattr(config, name)
        path = collect(expand_path, getattr(section, key), f"{source_of(name, key)}: [{name}] {key}")
        config = dataclasses.replace(config, **{name: dataclasses.replace(section, **{key: path})})
    for name, key in _PATTERNS:
        for pattern in getattr(getattr(config, name), key):
            collect(expand_pattern, pattern, f"{source_of(name, key)}: [{name}] {key}")
    run_name = config.run.name
    collect(check_name, run_name, f"{source_of('run', 'name')}: [run] name = {printable(repr(run_name))}")
    if errors:
        raise ConfigError("\n".join(map(str, errors)))
    return config


def is_path(value: str) -> bool:
    """Return True if the value of a key of WORDS_OR_PATH is meant as a path: it has what no word has."""
    return any(character in value for character in "/.~$")


def expand_pattern(pattern: str, what: str) -> str:
    """Expand a pattern of files, unless a file has that very name."""
    return pattern if os.path.isfile(pattern) else expand_path(pattern, what)


def expand_path(path: str, what: str) -> str:
    """Replace `~` or `~user` by the folder, and `$NAME` and `${NAME}` by their values.

    Raises ConfigError, which begins with `what` and names the user or variable, where that is not known, and for a
    path that no file can have.
    """
    what = f"{what} = {printable(repr(path))}"

    def find_value(match: re.Match[str]) -> str:
        """Return the value of a variable."""
        name = match[1] or match[2]
        if value := read_setting(name):
            return value
        raise ConfigError(f"{what}: ${printable(name)} is not set, or is empty")

    head, slash, tail = path.partition("/")
    if not head.startswith("~"):
        head = _VARIABLE.sub(find_value, head)
    elif folder := find_home(head[1:]):
        head = folder
    else:
        raise ConfigError(f"{what}: {f'no user {printable(head[1:])}' if head[1:] else '$HOME is not set'}")
    expanded = head + slash + _VARIABLE.sub(find_value, tail)
    check_name(expanded, what)
    return expanded


def check_name(path: str, what: str) -> None:
    """Raise ConfigError, which begins with `what`, for a path that no file can have."""
    if "\0" in path:
        raise ConfigError(f"{what}: must hold no zero byte")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ConfigError(f"{what}: has characters that names of files here cannot have") from None


def find_home(user: str) -> str:
    """Find the home folder of a user, of this one for "" -> path, "" where there is none."""
    own = "" if user else read_setting("HOME")
    try:
        return own or (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    except (KeyError, ValueError):
        return ""
