"""Documents of text files: a plain file is one, in a file of JSON lines each line holds one in a field."""

import codecs
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, printable, show_value
from hpcmoe.model.files import Stamp, make_stamp

JSON_LINES = (".jsonl", ".ndjson")  # how the names of such files end
PASSAGE_CHARACTERS = 1 << 17  # of a document at most, that are encoded at once
_NAMES = " or ".join(f"*{name}" for name in JSON_LINES)
_MOST_FIELDS = 5  # that a message lists
_LAST_WORD = re.compile(r".*[^\W_](?=\s)", re.DOTALL)  # before white space, where no usual tokenizer has a token across

log = logging.getLogger(__name__)


class Passage(NamedTuple):
    """A part of a document, as long as memory allows."""

    text: str
    ends: bool  # the document


def read_documents(files: Mapping[str, Stamp], text_field: str) -> Iterator[Passage]:
    """Read the documents of files in turn, each in passages, none of them empty.

    A file *.jsonl or *.ndjson has a JSON object a line whose text_field is a document, unless text_field is "". Raises
    ConfigError, which names file and line or byte, for what is no such object and no UTF-8, and where a file changed.
    """
    for path, stamp in files.items():
        what = f"[data] files: {printable(path)}"
        try:
            if is_json_lines(path, text_field):
                yield from read_json_lines(path, text_field, what)
            else:
                yield from cut_document(decode_file(path, what))
            now = make_stamp(os.stat(path))
        except OSError as error:
            raise ConfigError(f"{what}: cannot be read: {error.strerror}") from None
        if not stamp.holds(now):
            raise ConfigError(f"{what}: has been written or replaced since the run began")


def is_json_lines(path: str, text_field: str) -> bool:
    """Return True if a file holds documents in a field of JSON lines."""
    return text_field != "" and path.lower().endswith(JSON_LINES)


def log_formats(files: Iterable[str], text_field: str) -> None:
    """Warn of files and a text_field that do not go together."""
    num_json_lines = sum(is_json_lines(path, "any") for path in files)
    if text_field and not num_json_lines:
        log.warning("no effect: [data] text_field = %r: no file is named %s", text_field, _NAMES)
    if num_json_lines and not text_field:
        log.warning('[data] text_field = "": %d files %s are read as plain text, not as JSON', num_json_lines, _NAMES)


def read_json_lines(path: str, text_field: str, what: str) -> Iterator[Passage]:
    """Read the documents of a file of JSON lines; lines of white space alone are none."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = read_field(line, text_field, f"{what}, line {number}")
                yield from cut_document([text])


def read_field(line: bytes, text_field: str, what: str) -> str:
    """Return the text in a field of the JSON object on a line. Raises ConfigError, which begins with `what`."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
        text = entry[text_field]
        text.encode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: not UTF-8 at byte {error.start} of the line") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{what}: {text_field!r} holds half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what}: no JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # of a number of too many digits
        raise ConfigError(f"{what}: no JSON: {one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{what}: JSON nested too deeply") from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"{what}: {describe_line(entry, text_field)}") from None
    return text


def describe_line(entry: object, text_field: str) -> str:
    """Describe why a JSON value holds no text in a field."""
    if not isinstance(entry, dict):
        return f"{show_value(entry)}: must be an object with a field {text_field!r}"
    if text_field in entry:
        return f"{text_field!r} = {show_value(entry[text_field])}: must be a string"
    fields = ", ".join(map(repr, list(entry)[:_MOST_FIELDS])) + ", ..." * (len(entry) > _MOST_FIELDS)
    return f"has no field [data] text_field = {text_field!r}; has {printable(fields) or 'none'}"


def decode_file(path: str, what: str) -> Iterator[str]:
    """Read a file of UTF-8 part by part."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            block = file.read(PASSAGE_CHARACTERS)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise ConfigError(f"{what}: not UTF-8 at byte {at}: convert it, or leave it out by exclude") from None
            offset += len(block)
            if not block:
                return


def cut_document(parts: Iterable[str]) -> Iterator[Passage]:
    """Cut the text of a document, given in parts, into passages; one without text has none."""
    rest = ""
    for part in parts:
        text, start = rest + part, 0
        while len(text) - start > PASSAGE_CHARACTERS:
            end = find_cut(text, start)
            yield Passage(text[start:end], False)
            start = end
        rest = text[start:]
    if rest:
        yield Passage(rest, True)


def find_cut(text: str, start: int) -> int:
    """Return where a passage that starts there ends: after the last word that it holds whole, if there is one."""
    found = _LAST_WORD.match(text, start, start + PASSAGE_CHARACTERS)
    return found.end() if found else start + PASSAGE_CHARACTERS
