"""Input files, whatever a path may name: an error is one ConfigError in one line, and nothing waits for ever."""

import json
import os
import select
import stat
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hpcmoe.errors import ConfigError
from hpcmoe.messages import join_lines, one_line

_MOST_BYTES = 2**28  # of an input file
_MOST_TOML_BYTES = 2**24  # which the parser takes seconds for
PIPE_SECONDS = 5.0  # how long to wait for a pipe's or a terminal's next bytes
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | os.PathLike, most_bytes: int = _MOST_BYTES) -> str:
    """Read a text file in UTF-8, with or without its mark. Raises ConfigError in one line."""
    content = read_bytes(path, most_bytes)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "UTF-16; save it as UTF-8" if content.startswith(_UTF_16) else f"byte {error.start} is not"
        raise ConfigError(f"{one_line(path)}: not a text file in UTF-8: {what}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: str | os.PathLike, most_bytes: int = _MOST_BYTES) -> bytes:
    """Read a file, a pipe or a device to its end. Raises ConfigError where that is too far, or nothing comes."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                raise ConfigError(f"{one_line(path)}: cannot be read: Is a directory")
            if status.st_size > most_bytes:  # before a byte of it is read; of pipes and devices it is 0
                raise ConfigError(f"{one_line(path)}: cannot be read: more than {most_bytes} bytes")
            return b"".join(_read_chunks(path, handle, most_bytes))
        finally:
            os.close(handle)
    except OSError as error:
        raise ConfigError(f"{one_line(path)}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a zero byte in the path, or half of a character
        raise ConfigError(f"{one_line(path)}: cannot be read: {one_line(error)}") from None


def _read_chunks(path: str | os.PathLike, handle: int, most_bytes: int) -> Iterator[bytes]:
    """Yield the bytes of an open file until its end."""
    total = 0
    while True:
        if not select.select([handle], [], [], PIPE_SECONDS)[0]:
            raise ConfigError(f"{one_line(path)}: cannot be read: nothing has come for {PIPE_SECONDS:g} s")
        piece = os.read(handle, 2**20)
        total += len(piece)
        if total > most_bytes:
            raise ConfigError(f"{one_line(path)}: cannot be read: more than {most_bytes} bytes")
        if not piece:
            return
        yield piece


def parse_text(path: str | os.PathLike, text: str, parser: Callable[[str], Any], language: str) -> Any:
    """Parse a text by a parser that raises ValueError or RecursionError. Raises ConfigError in one line."""
    try:
        return parser(text)
    except RecursionError:
        what = "nested too deeply"
    except ValueError as error:
        is_long = "set_int_max_str_digits" in str(error)
        what = "a whole number has thousands of digits" if is_long else one_line(error)
    raise ConfigError(f"{one_line(path)}: not {language}: {what}")


def read_toml(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """Read a TOML file -> (its tree, its text)."""
    text = read_text(path, _MOST_TOML_BYTES)
    return parse_text(path, text, tomllib.loads, "TOML"), text


def read_json(path: str | os.PathLike, most_bytes: int = _MOST_BYTES) -> Any:
    """Read a JSON file, each key of whose objects may stand once -> its tree. Raises ConfigError in one line."""
    return parse_json(path, read_text(path, most_bytes))


def parse_json(path: str | os.PathLike, text: str) -> Any:
    """Parse JSON text of a file, each key of whose objects may stand once -> its tree. Raises ConfigError."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Make a dict of an object's pairs."""
        counts = Counter(key for key, _ in pairs)
        twice = [f"{one_line(key)}: stands {n} times, must stand once" for key, n in counts.items() if n > 1]
        if twice:
            raise ConfigError(join_lines(f"{one_line(path)}: {line}" for line in twice))
        return dict(pairs)

    return parse_text(path, text, lambda text: json.loads(text, object_pairs_hook=make_object), "JSON")


def is_number(value: object) -> bool:
    """Return True if a value of a JSON file is a number, NaN or infinite, and no whole number beyond float64."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def format_json(tree: Mapping[str, object]) -> str:
    """Format a JSON object with a line for each of its keys, as people read it."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in tree.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"
