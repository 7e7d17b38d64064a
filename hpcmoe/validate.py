"""A parsed tree of sections and keys becomes frozen dataclasses, by pydantic; each key's error becomes one line."""

import functools
import json
from collections.abc import Callable
from dataclasses import fields

from hpcmoe.errors import ConfigError
from hpcmoe.messages import join_lines, one_line, show_value, suggest
from hpcmoe.renamed import find_place

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # what pydantic is to be picky about
DEEPEST = 8  # lists within lists: no key takes as many
_MOST_BITS = 1000  # of a whole number: no key takes as many, and Python does not write thousands of digits
OVERFLOWING = 10**400  # stands for any larger one: more than a float, too, can be


def validate(cls: type, tree: dict, source_of: Callable[..., str]) -> object:
    """Make a dataclass of a tree, its fields dataclasses too; ConfigError has one line for each key in error.

    source_of(section, key) or source_of(section) names where a value came from.
    """
    from pydantic import ValidationError  # rank 0 alone pays for this import

    try:
        return make_validator(cls).validate_json(json.dumps(make_json(tree)))
    except ValidationError as invalid:
        errors_of_key = {}
        for error in invalid.errors():
            errors_of_key.setdefault(error["loc"][:2], []).append(error)
    keys_of_section = {part.name: [key.name for key in fields(part.type)] for part in fields(cls)}
    lines = (_format_errors(errors, tree, source_of, keys_of_section) for errors in errors_of_key.values())
    raise ConfigError(join_lines(lines))


@functools.cache
def make_validator(cls: type) -> object:
    """Make what reads a dataclass, once: it takes pydantic as long as a hundred readings."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def make_json(value: object, depth: int = 0) -> object:
    """Make JSON of what TOML may hold: what no key can take is replaced by what pydantic refuses in its stead."""
    match value:
        case dict() | list() if depth > DEEPEST:
            return None
        case dict():
            return {key: make_json(each, depth + 1) for key, each in value.items()}
        case list():
            return [make_json(each, depth + 1) for each in value]
        case bool() | str() | float():
            return value
        case int():
            return value if value.bit_length() <= _MOST_BITS else OVERFLOWING * (1 if value > 0 else -1)
    return {"date": str(value)}


def _format_errors(
    errors: list[dict], tree: dict, source_of: Callable[..., str], keys_of_section: dict[str, list[str]]
) -> str:
    """Make one line of pydantic's errors of a key or section: where it is, what stands there, what may stand there."""
    first, *others = errors
    name, *inner = first["loc"]
    if not inner:
        what = f"{source_of(name)}: [{one_line(name)}]"
        if name not in keys_of_section:
            return f"{what}: unknown section{suggest(name, keys_of_section)}"
        return f"{what}: {show_value(tree[name])}: must be a section"
    key, *index = inner
    what = f"{source_of(name, key)}: [{name}] {one_line(key)} = {show_value(tree[name][key])}"
    if key not in keys_of_section[name]:
        place = find_place(name, key)
        return f"{what}: is now {place}" if place else f"{what}: unknown key{suggest(key, keys_of_section[name])}"
    entry = f"entry {index}: " if index else ""
    more = f" (and {len(others)} more)" if others else ""
    return f"{what}: {entry}{first['msg'].replace('Input should', 'must')}{more}"
