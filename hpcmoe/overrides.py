"""Overrides, `--set section.key=value`: the value is TOML, or the string itself where the key takes a string."""

import json
import shlex
import tomllib
import typing
from collections.abc import Mapping

from hpcmoe.errors import ConfigError
from hpcmoe.messages import is_one_line, one_line

_STRING, _STRINGS, _NUMBERS = "a string", "a list of strings", "a list of numbers"

Kinds = Mapping[tuple[str, str], str | None]  # of each (section, key)


def kind_of(annotation: object) -> str | None:
    """Find what a key's annotation takes: one of the three kinds that quotes and brackets matter to, else None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(arguments[0])
    if origin is tuple:
        return {_STRING: _STRINGS, None: _NUMBERS}[kind_of(arguments[0])]
    return _STRING if annotation is str or origin is typing.Literal else None


def parse_override(override: str, kinds: Kinds) -> tuple[str, str, object]:
    """Split `section.key=value` -> (section, key, value); ConfigError in one line."""
    if not is_one_line(override.replace("\t", " ")):
        raise ConfigError(f"{name_option(override)}: must be one line of UTF-8 without control characters")
    name, equals, value = override.partition("=")
    name, dot, key = name.strip().partition(".")
    if not (name and dot and key and equals):
        raise ConfigError(f"{name_option(override)}: must look like section.key=value")

    key, value, kind = key.strip(), value.strip(), kinds.get((name, key.strip()))
    is_toml, parsed = parse_value(value)
    if kind == _STRING:
        return name, key, parsed if isinstance(parsed, str) and value[0] in "\"'" else value
    if kind in (_STRINGS, _NUMBERS) and not has_shape(parsed, kind):
        raise ConfigError(f"{name_option(override)}: must be {kind}{suggest_option(f'{name}.{key}', value, kind)}")
    return name, key, parsed if is_toml else value


def parse_value(text: str) -> tuple[bool, object]:
    """Parse a TOML value -> (whether it is one, the value)."""
    try:
        return True, tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return False, None


def has_shape(value: object, kind: str) -> bool:
    """Return True if a value is the list that a kind asks for, whatever its numbers are."""
    entry = str if kind == _STRINGS else object
    return isinstance(value, list) and all(isinstance(each, entry) for each in value)


def suggest_option(name: str, value: str, kind: str) -> str:
    """Format a list as a command line takes it, from a value that has lost its quotes or brackets."""
    words = [word.strip(" \"'[]") for word in value.split(",")]
    entries = ", ".join(json.dumps(word, ensure_ascii=False) if kind == _STRINGS else word for word in words if word)
    option = shlex.quote(f"{name}=[{entries}]")
    shell = ", whose quotes the shell takes unless the whole stands in others" if kind == _STRINGS else ""
    return f"{shell}; type --set {one_line(option)}"


def name_option(override: str) -> str:
    """Name an option in a message."""
    return f"--set {one_line(override)}"
