"""A parsed tree of sections and keys becomes frozen dataclasses, by pydantic; each key's errors become one line."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hpcmoe.errors import ConfigError
from hpcmoe.messages import format_index, format_more, join_lines, one_line, show_value, suggest
from hpcmoe.renamed import find_place

if TYPE_CHECKING:  # rank 0 alone pays for this import
    from pydantic import TypeAdapter, ValidationError

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # what pydantic is to be picky about
_DEEPEST = 8  # lists within lists: no key takes as many
_MOST_BITS = 1000  # of a whole number: no key takes as many, and Python does not write thousands of digits
_OVERFLOWING = 10**400  # stands for any larger one: more than a float, too, can be


def validate(cls: type, tree: dict[str, Any], source_of: Callable[..., str]) -> Any:
    """Build a dataclass of a tree, its fields dataclasses too. Raises ConfigError with one line for each key at fault.

    source_of(section, key) or source_of(section) names where a value came from.
    """
    from pydantic import ValidationError

    try:
        return make_validator(cls).validate_json(json.dumps(make_json(tree)))
    except ValidationError as invalid:
        errors_of_key = group_errors(invalid, 2)
    sections: dict[str, Any] = {part.name: part.type for part in fields(cls)}
    keys_of_section = {name: [key.name for key in fields(section)] for name, section in sections.items()}
    lines = (_format_errors(errors, tree, source_of, keys_of_section) for errors in errors_of_key)
    raise ConfigError(join_lines(lines))


def validate_arguments(cls: type, arguments: dict[str, Any], where: str) -> Any:
    """Build a dataclass of a call's arguments; numbers of NumPy count as Python's.

    Raises ConfigError with one line for each argument at fault, which begins with `where`.
    """
    from pydantic import ValidationError

    plain = {name: value.item() if hasattr(value, "item") else value for name, value in arguments.items()}
    try:
        return make_validator(cls).validate_json(json.dumps(make_json(plain)))
    except ValidationError as invalid:
        errors_of_key = group_errors(invalid, 1)
    lines = (format_entry(f"{where}: {errors[0]['loc'][0]}", plain, errors, 1) for errors in errors_of_key)
    raise ConfigError(join_lines(lines))


def validate_table(cls: type, table: dict[str, Any], where: str) -> Any:
    """Build a dataclass of a table of TOML, or an object of JSON. Raises ConfigError with one line a key at fault.

    where: what a line begins with, the file and the table in it.
    """
    from pydantic import ValidationError

    try:
        return make_validator(cls).validate_json(json.dumps(make_json(table)))
    except ValidationError as invalid:
        errors_of_key = group_errors(invalid, 1)
    known, lines = [field.name for field in fields(cls)], []
    for errors in errors_of_key:
        key = str(errors[0]["loc"][0])
        what = f"{where}{one_line(key)}"
        is_known = key in known
        lines.append(
            format_entry(what, table, errors, 1).replace("Value error, ", "", 1)
            if is_known
            else f"{what} = {show_value(table[key])}: unknown key{suggest(key, known)}"
        )
    raise ConfigError(join_lines(lines))


@functools.cache
def make_validator(cls: type) -> TypeAdapter[Any]:
    """Make what reads a dataclass, once: it takes pydantic as long as a hundred readings."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def make_json(value: object, depth: int = 0) -> object:
    """Make JSON of what TOML may hold: what no key can take is replaced by what pydantic rejects in its stead."""
    match value:
        case dict() | list() if depth > _DEEPEST:
            return None
        case dict():
            return {key: make_json(each, depth + 1) for key, each in value.items()}
        case list():
            return [make_json(each, depth + 1) for each in value]
        case bool() | str() | float():
            return value
        case int():
            return value if value.bit_length() <= _MOST_BITS else _OVERFLOWING * (1 if value > 0 else -1)
    return {"date": str(value)}


def group_errors(invalid: ValidationError, depth: int) -> list[list[Any]]:
    """Group pydantic's errors (dicts) by their key, at a depth of the tree -> a list for each key."""
    errors_of_key: dict[tuple[int | str, ...], list[Any]] = {}
    for error in invalid.errors():
        errors_of_key.setdefault(error["loc"][:depth], []).append(error)
    return list(errors_of_key.values())


def format_entry(name: str, tree: dict[str, Any], errors: Sequence[Any], depth: int) -> str:
    """Format a key's errors, by the first of them: `name[1][2] = value: must be a valid number (and 3 more)`.

    The key is at a depth of the tree.
    """
    first = errors[0]
    if first["type"] == "missing":
        return f"{name}: missing"

    # Leave types' names out of an entry's path: a key of several types has an error for each.
    index = list_index(first, depth)
    value = functools.reduce(operator.getitem, [*first["loc"][:depth], *index], tree)
    entries = {tuple(part for part in error["loc"] if isinstance(part, int)) for error in errors}
    of_types = [error["msg"].removeprefix("Input should be ") for error in errors if list_index(error, depth) == index]
    what = f"must be {' or '.join(of_types)}" if len(of_types) > 1 else first["msg"].replace("Input should", "must")
    return f"{name}{format_index(index)} = {show_value(value)}: {what}{format_more(len(entries) - 1)}"


def list_index(error: Any, depth: int) -> list[int]:
    """List the indices of what an error of pydantic's is about in the lists of a key, at a depth of the tree."""
    return [part for part in error["loc"][depth:] if isinstance(part, int)]


def _format_errors(
    errors: list[Any], tree: dict[str, Any], source_of: Callable[..., str], keys_of_section: dict[str, list[str]]
) -> str:
    """Format pydantic's errors of a key or section: where it is, what stands there, what may stand there."""
    name, *inner = map(str, errors[0]["loc"][:2])
    if not inner:
        what = f"{source_of(name)}: [{one_line(name)}]"
        if name not in keys_of_section:
            return f"{what}: unknown section{suggest(name, keys_of_section)}"
        return f"{what}: {show_value(tree[name])}: must be a section"
    key = inner[0]
    what = f"{source_of(name, key)}: [{name}] {one_line(key)}"
    if key not in keys_of_section[name]:
        place = find_place(name, key)
        what = f"{what} = {show_value(tree[name][key])}"
        return f"{what}: is now {place}" if place else f"{what}: unknown key{suggest(key, keys_of_section[name])}"
    return format_entry(what, tree, errors, 2)
