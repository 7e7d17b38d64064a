"""Numbers as figures show them: few digits, round ticks, curves of few points, maps of few cells."""

import math

import numpy as np

_PREFIXES = (("G", 1e9, 9.995e8), ("M", 1e6, 9.995e5), ("k", 1e3, 1e4))  # name, size, from where it is used


def format_short(value: float) -> str:
    """Write a number in a few characters: 3.14, 0.0012, 41.2k, 7.5M."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value}"
    for prefix, size, least in _PREFIXES:
        if abs(value) >= least:
            return f"{value / size:.3g}{prefix}" if abs(value) < 999.5 * size else f"{value / size:.0f}{prefix}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-")


def choose_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose round numbers of [low, high], at most so many."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low] if math.isfinite(low) else []
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def round_to_few_digits(value: float) -> float:
    """Round a positive number up to one of few digits: 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(
        factor * power for factor in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if value <= factor * power * 1.000001
    )


def thin_curve(x: np.ndarray, y: np.ndarray, most: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to about so many points, keeping the least and the largest of each stretch."""
    if len(x) <= most:
        return x, y
    filled = np.nan_to_num(y, nan=0.0)
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        kept |= {int(stretch[filled[stretch].argmin()]), int(stretch[filled[stretch].argmax()])}
    rows = np.array(sorted(kept))
    return x[rows], y[rows]


def group_evenly(count: int, most: int) -> np.ndarray:
    """Return where groups of neighbours begin, so that there are at most so many -> [groups] int64."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).astype(np.int64)[:-1])


def group_cells(values: np.ndarray, most: int, axis: int) -> np.ndarray:
    """Group neighbours along an axis to at most so many, each the largest of its values."""
    filled = np.where(np.isnan(values), -np.inf, values)
    grouped = np.maximum.reduceat(filled, group_evenly(values.shape[axis], most), axis=axis)
    return np.where(np.isneginf(grouped), np.nan, grouped)


def name_groups(count: int, most: int) -> list[str]:
    """Name groups of neighbours by their numbers: `8-15`."""
    starts = group_evenly(count, most).tolist()
    ends = [*starts[1:], count]
    return [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(starts, ends, strict=True)]
