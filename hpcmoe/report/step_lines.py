"""A step's figures as lines of `key=value` for people, and by name for programs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmoe.clock import Timer

if TYPE_CHECKING:  # which imports torch
    from hpcmoe.report.meter import StepMetrics

Figures = dict[str, Any]  # a step's, by name: numbers, None where there is none
Pairs = Sequence[tuple[str, str | float | None]]  # of key and value; None is left out
_DIGITS = (4, 3, 2, 1)  # of a number, as many as a line has room for
_DETAILED = (Timer.ROUTE, Timer.DISPATCH, Timer.COMPUTE, Timer.COMBINE, Timer.OPTIMIZER)


def list_pairs(
    loss: float | None, rate: float | None, norm: float | None, metrics: "StepMetrics", memory_bytes: int
) -> Pairs:
    """List a step's main figures, each under its name in the log."""
    return [
        ("loss", loss),
        ("tokens/s", metrics.tokens_per_second),
        ("norm", norm),
        ("lr", rate),
        ("balance", f"{metrics.balancedness:.2f}"),
        ("mem", f"{memory_bytes / 1e9:.{2 if memory_bytes < 1e11 else 0}f}GB"),
    ]


def fit_pairs(pairs: Pairs, most: int) -> str:
    """Format pairs as `key=value key=value`, numbers with as many digits as let the line have `most` characters.

    Where even one digit is too many, what follows a / in a text is left out too.
    """
    shorter = [(key, value.partition("/")[0] if isinstance(value, str) else value) for key, value in pairs]
    lines = [join_pairs(pairs, digits) for digits in _DIGITS] + [join_pairs(shorter, _DIGITS[-1])]
    return next((line for line in lines if len(line) <= most), lines[-1])


def join_pairs(pairs: Pairs, digits: int) -> str:
    """Format pairs with so many digits; those without a value are left out."""
    return " ".join(f"{key}={format_number(value, digits)}" for key, value in pairs if value is not None)


def format_number(value: str | float, digits: int) -> str:
    """Format a number with so many significant digits, where there is room up to a million in full; a text as it is."""
    if isinstance(value, str):
        return value
    if digits > 2 and 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.{digits + (digits > 3)}g}"


def format_duration(seconds: float) -> str:
    """Format a time as two of its units, such as 3d04h, 1h02m, 2m05s or 7s."""
    whole = max(round(seconds), 0)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h" if days < 100 else f"{days}d"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def format_details(step: int, metrics: "StepMetrics") -> Iterator[str]:
    """Yield the lines that a step has beside its main figures: balance by layer, and milliseconds by stage."""
    balance, sigma = metrics.balancedness_of_layer, metrics.link_sigma_of_layer
    yield (
        f"step={step} U_e={format_range(metrics.utilisation)} balance_of_layer={format_range(balance)} "
        f"sigma={metrics.link_sigma:.3f} sigma_of_layer={format_range(sigma)} dropped={metrics.num_dropped}"
    )
    spent = [(timer, 1000 * metrics.seconds_of_stage[timer]) for timer in _DETAILED]
    yield f"step={step} " + " ".join(f"{timer}_ms={milliseconds:.1f}" for timer, milliseconds in spent if milliseconds)


def format_range(values: np.ndarray) -> str:
    """Format the least and the largest of some values."""
    return f"{values.min():.2f}-{values.max():.2f}"


def list_figures(loss: float | None, rate: float | None, norm: float | None, metrics: "StepMetrics") -> Figures:
    """List all figures of a step by name, for files."""
    return {
        "loss": loss,
        "tokens_per_second": metrics.tokens_per_second,
        "gradient_norm": norm,
        "learning_rate": rate,
        "seconds": metrics.seconds,
        "balancedness": metrics.balancedness,
        "link_sigma": metrics.link_sigma,
        "dropped": metrics.num_dropped,
        **name_extremes("utilisation", metrics.utilisation.ravel()),
        **{f"seconds_{timer}": seconds for timer, seconds in metrics.seconds_of_stage.items()},
    }


def name_extremes(name: str, values: Iterable[float]) -> Figures:
    """Return the least and the largest of some values by name."""
    held = [float(value) for value in values]
    return {f"{name}_least": min(held), f"{name}_most": max(held)}
