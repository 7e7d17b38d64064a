"""Quantities as people write them, "400 Gb/s", "2 us", "80 GiB", as numbers in bytes, seconds and FLOP."""

import math
import re
from collections.abc import Mapping

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_PREFIXES = _DECIMAL | {f"{letter}i": 2.0**power for letter, power in zip("KMGTPE", range(10, 70, 10), strict=True)}
_SIZES = {"B": 1.0, "byte": 1.0, "bytes": 1.0, "b": 0.125, "bit": 0.125, "bits": 0.125}
_RATES = {f"{unit}{per}": size for unit, size in _SIZES.items() for per in ("/s", "ps")}
_OPERATIONS = dict.fromkeys(("FLOP/s", "FLOPS", "FLOPs/s", "FLOPs", "Flop/s", "flop/s", "FLOPps"), 1.0)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_UNITS: Mapping[str, tuple[Mapping[str, float], Mapping[str, float], str]] = {  # by kind: prefixes, units, an example
    "bytes": (_PREFIXES, _SIZES, "80 GiB"),
    "bytes_per_second": (_PREFIXES, _RATES, "400 Gb/s"),
    "flops": (_DECIMAL, _OPERATIONS, "990 TFLOP/s"),
    "seconds": ({"": 1.0}, _SECONDS, "2 us"),
}
_WRITTEN = re.compile(r"([+-]?[0-9]+(?:[_0-9]*[0-9])?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?) *(.*)", re.ASCII)


def parse_quantity(value: object, kind: str) -> float:
    """Read a number, in bytes, seconds or FLOP/s, or a text with a unit -> float. Raises ValueError: what it must be.

    kind: "bytes", "bytes_per_second", "flops" or "seconds"; bits have a small b.
    """
    prefixes, units, example = _UNITS[kind]
    number = math.nan
    if isinstance(value, str) and (match := _WRITTEN.fullmatch(value.strip())):
        scale = find_scale(match[2], prefixes, units)
        number = float(match[1]) * scale
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value) if abs(value) < 1e300 else math.inf
    least = "0 or above" if kind == "seconds" else "above 0"
    if not math.isfinite(number) or number < 0 or (number == 0 and kind != "seconds"):
        raise ValueError(f'must be a number {least} with its unit, such as "{example}"')
    return number


def find_scale(unit: str, prefixes: Mapping[str, float], units: Mapping[str, float]) -> float:
    """Find what a unit with its prefix stands for; NaN where it is not known."""
    for prefix, factor in prefixes.items():
        if unit.startswith(prefix) and unit.removeprefix(prefix) in units:
            return factor * units[unit.removeprefix(prefix)]
    return math.nan
