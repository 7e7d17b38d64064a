"""SVG of a chart: elements, axes, a legend; colours are CSS variables, so that a page has them light and dark."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from hpcmoe.report.page.numbers import choose_ticks, format_short

WIDTH = 380  # of a chart, in its own units: about its pixels on any screen
NUM_COLOURS = 8
_LETTER = 6.4  # width of a letter of a label, about
_LEGEND_ROW = 16


class Frame(NamedTuple):
    """The part of a chart in which its values are, and what it spans."""

    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place_x(self, value: float) -> float:
        """Return where a value is from left to right."""
        return self.left + (self.right - self.left) * (value - self.x_low) / ((self.x_high - self.x_low) or 1)

    def place_y(self, value: float) -> float:
        """Return where a value is from top to bottom."""
        return self.bottom - (self.bottom - self.top) * (value - self.y_low) / ((self.y_high - self.y_low) or 1)


def make_element(name: str, content: str = "", **attributes: object) -> str:
    """Make an element; class_ and the like lose their underscore, those inside become hyphens."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(format_attribute(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{words}>{content}</{name}>" if content else f"<{name}{words}/>"


def format_attribute(value: object) -> str:
    """Write an attribute's value; coordinates to a tenth."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def make_label(x: float, y: float, text: str, anchor: str = "start", class_: str = "label") -> str:
    """Make a label."""
    return make_element("text", escape(text), x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def make_path(points: Iterable[tuple[float, float]]) -> str:
    """Make a path's data through points; it is interrupted where one is not finite."""
    words, pen = [], "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            words.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(words)


def make_svg(height: float, title: str, parts: Iterable[str]) -> str:
    """Make the whole of a chart, named for those who do not see it."""
    inside = make_element("title", escape(title)) + "".join(parts)
    return make_element(
        "svg", inside, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height:.0f}", role="img",
        aria_label=title,
    )  # fmt: skip


def shorten(text: str, pixels: float) -> str:
    """Cut a text that would be wider than so many pixels, in its middle."""
    most = max(4, int(pixels / _LETTER))
    return text if len(text) <= most else f"{text[: most - 1 - most // 3]}…{text[-(most // 3) :]}"


def measure_text(text: str) -> float:
    """Return about how wide a label is."""
    return _LETTER * len(text)


def draw_legend(entries: Sequence[tuple[str, str]], left: float = 2, top: float = 2) -> tuple[list[str], float]:
    """Draw a legend of (name, sample of 14 x 10) in rows -> (elements, height)."""
    parts, x, y = [], left, top
    for name, sample in entries:
        name = shorten(name, WIDTH - left - 24)
        width = 20 + measure_text(name) + 12
        if x > left and x + width > WIDTH:
            x, y = left, y + _LEGEND_ROW
        parts.append(make_element("g", sample, transform=f"translate({x:.0f} {y + 1:.0f})"))
        parts.append(make_label(x + 19, y + 10, name))
        x += width
    return parts, (y - top + _LEGEND_ROW + 4 if entries else 0)


def draw_axes(frame: Frame, x_title: str, y_title: str) -> list[str]:
    """Draw grid lines, ticks and the titles of both axes."""
    parts = []
    for tick in choose_ticks(frame.y_low, frame.y_high):
        y = frame.place_y(tick)
        parts.append(make_element("path", d=f"M{frame.left:.1f} {y:.1f}H{frame.right:.1f}", class_="grid"))
        parts.append(make_label(frame.left - 5, y + 3.5, format_short(tick), "end"))
    for tick in choose_ticks(frame.x_low, frame.x_high):
        x = frame.place_x(tick)
        parts.append(make_element("path", d=f"M{x:.1f} {frame.bottom:.1f}v4", class_="axis"))
        parts.append(make_label(x, frame.bottom + 16, format_short(tick), "middle"))
    line = f"M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"
    parts.append(make_element("path", d=line, class_="axis"))
    parts.append(make_label(frame.right, frame.bottom + 30, x_title, "end", "axis-title"))
    if y_title:
        parts.append(make_label(2, frame.top - 7, y_title, "start", "axis-title"))
    return parts
