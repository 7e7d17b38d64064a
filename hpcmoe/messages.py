"""What a user wrote, as messages show it: on one line, printable and short."""

import difflib
import math
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from datetime import date, time

_MOST_SHOWN, _MOST_OF_LINE = 120, 320  # characters of a value in a message, and of a path or an option
_MOST_BITS = 256  # of a whole number that is written out
_MOST_RANGES = 6  # of numbers
_BREAKING = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's controls, surrogates, separators of lines and paragraphs


def printable(text: str) -> str:
    """Escape what would break a line, move a cursor or not show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    """Write a character as Python's strings do."""
    return character.encode("unicode_escape").decode("ascii")


def is_one_line(text: str) -> bool:
    """Return True if a text has neither line breaks, nor other controls, nor bytes that were not UTF-8."""
    return text.isprintable() or not any(unicodedata.category(c) in _BREAKING for c in text)


def one_line(text: object, most: int = _MOST_OF_LINE) -> str:
    """Write a text on one line of at most about so many characters, cut in the middle: its end tells as much."""
    line = printable(str(text)[: 4 * most] + str(text)[4 * most :][-most:])
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-(most // 2 - 5) :]}"


def show_value(value: object) -> str:
    """Write a value of any type, size and depth on one line: as Python does, but true, false, null and dates."""
    return one_line(SHORT.repr(value), _MOST_SHOWN)


class ShortRepr(reprlib.Repr):
    """repr() that is quick and bounded for whatever TOML or JSON may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 4, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = _MOST_SHOWN

    def repr_bool(self, value: bool, _level: int) -> str:
        """Write a truth value as TOML and JSON have it."""
        return str(value).lower()

    def repr_NoneType(self, _value: None, _level: int) -> str:  # noqa: N802 (reprlib looks for the type's name)
        """Write JSON's null."""
        return "null"

    def repr_int(self, number: int, level: int) -> str:
        """Write a whole number, one of thousands of digits by its length: Python itself does not write it."""
        if number.bit_length() > _MOST_BITS:
            return f"a whole number of {number.bit_length()} bits"
        return super().repr_int(number, level)

    def repr_date(self, moment: date | time, _level: int) -> str:
        """Write a date, a time or both."""
        return str(moment)

    repr_datetime = repr_time = repr_date


SHORT = ShortRepr()


def suggest(word: str, known: Iterable[str]) -> str:
    """Name the nearest known word, or all of them."""
    near = difflib.get_close_matches(word[:_MOST_SHOWN], known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known)}"


def format_index(index: Iterable[int]) -> str:
    """Write the indices of a list's entry: `[2][3]`."""
    return "".join(f"[{position}]" for position in index)


def format_more(number: int) -> str:
    """Write that a line stands for so many others: ` (and 2 more)`, nothing for none."""
    return f" (and {number} more)" * (number > 0)


def format_size(num_bytes: int) -> str:
    """Format a number of bytes with the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def format_ranges(numbers: Iterable[int]) -> str:
    """Write ascending numbers as ranges, and how often one comes if more than once: `0-3 5 x2 7`, cut when long."""
    counts = Counter(int(number) for number in numbers)
    runs: list[list[int]] = []
    for number, count in counts.items():
        if runs and runs[-1][1] == number - 1 and runs[-1][2] == count:
            runs[-1][1] = number
        else:
            runs.append([number, number, count])
    words = [f"{a}-{b}"[: None if b > a else len(f"{a}")] + f" x{count}" * (count > 1) for a, b, count in runs]
    cut = f" ... ({len(counts)})" if len(words) > _MOST_RANGES else ""
    return ", ".join(words[:_MOST_RANGES]) + cut


def join_lines(lines: Iterable[str], most: int = 40) -> str:
    """Join the lines of errors; of very many the first."""
    lines = list(lines)
    more = [f"and {len(lines) - most} more errors"] * (len(lines) > most)
    return "\n".join(lines[:most] + more)


def to_json(number: float | None) -> float | None:
    """Return a number as JSON can have it: one that is not finite becomes null."""
    if number is None or isinstance(number, int):
        return number
    return float(number) if math.isfinite(number) else None
