"""Rows of estimates with intervals: the forest plot of a claim, and the dot plot of a study's arms."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from .drawing import ACCENT, INK, LINE, MUTED, PAPER, SECOND, THIRD, house_style, new_figure, to_svg

Form = Literal["plain", "percent", "factor"]
# Shape says it too: full = a claim, hollow = none; roles as the page's legend draws them.
MARKS: dict[str, dict[str, Any]] = {
    "above": {"marker": "o", "color": ACCENT, "markerfacecolor": ACCENT},
    "open": {"marker": "o", "color": INK, "markerfacecolor": PAPER},
    "below": {"marker": "v", "color": SECOND, "markerfacecolor": SECOND},
    "method": {"marker": "o", "color": ACCENT, "markerfacecolor": ACCENT},
    "baseline": {"marker": "o", "color": INK, "markerfacecolor": PAPER},
    "control": {"marker": "D", "color": THIRD, "markerfacecolor": PAPER, "markersize": 5.2},
    "witness": {"marker": "s", "color": MUTED, "markerfacecolor": MUTED, "markersize": 5.2},
}
_BOLD = ("above", "below", "method")
_COLOURS = {"above": ACCENT, "method": ACCENT, "below": SECOND}
_LONGEST_LABEL = 36
_WIDE, _NARROW = 8.6, 4.4
_NARROW_LINE = 50
_BELOW = 0.5
_CHARACTER = 0.073
"""Inches that a character of the row labels takes, on the safe side."""
_BOLD_WIDTH = 1.15
"""Width of bold letters beside others."""


@dataclass(frozen=True)
class EstimateRow:
    """One row of a plot.

    Attributes:
        label: of the row.
        values: one a seed: faint dots.
        interval: estimate, low and high; low = high where there is no interval; None where only the seeds are drawn.
        numbers: what stands at the right.
        kind: a key of `MARKS`.
        published: a number from elsewhere, drawn as a cross.
    """

    label: str
    values: Sequence[float]
    interval: tuple[float, float, float] | None
    numbers: str = ""
    kind: str = "open"
    published: float | None = None


@dataclass(frozen=True)
class Claimed:
    """Where a claim says that its values lie: beyond `low`, below `high`, or between; None is open.

    `text` is written at the bound, e.g. "margin +1".
    """

    low: float | None
    high: float | None
    text: str = ""


def estimate_plot(
    rows: Sequence[EstimateRow],
    x_label: str,
    title: str,
    narrow: bool = False,
    claimed: Claimed | None = None,
    form: Form = "plain",
    align: Sequence[EstimateRow] = (),
    key: str = "",
) -> str:
    """Rows of estimates, each with its interval, its seeds as faint dots below it, and its numbers.

    Args:
        rows: from top to bottom.
        x_label: of the axis.
        title: for screen readers.
        narrow: for a phone: labels and numbers above the rows.
        claimed: a tinted region with its bounds, and a line at 0.
        form: "percent" or "factor": the numbers are log ratios, and the axis says what ratios they are.
        align: rows of all plots whose axes shall begin and end at the same places.
        key: letters and digits that no other plot of the page has; the title by default.

    Returns:
        An `<svg>` element.

    Example:
        >>> estimate_plot([EstimateRow("a", [1.0, 2.0], (1.5, 0.5, 2.5))], "points", "A claim")[:4]
        '<svg'
    """
    with house_style():
        places, top = _places(rows, narrow)
        top += 0.16 * bool(claimed and claimed.text)
        width, height = _NARROW if narrow else _WIDE, top + _BELOW
        left, right = (0.03, 0.97) if narrow else _margins(align or rows, width)
        figure, (axes,) = new_figure(width, height, 1, 1, margins=(left, _BELOW / height, right, 1))
        limits = _limits(rows, claimed)
        axes.set(xlim=limits, ylim=(0, top), xlabel=x_label)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        _set_ticks(axes, limits, form, 4 if narrow else 6)
        if claimed is not None:
            # No line through words: on a phone labels stand above the rows, and the bound's own words at the top.
            spans = [(y - 0.14, y + 0.1) for y in places] if narrow else [(0, top - 0.16 * bool(claimed.text))]
            _draw_claimed(axes, claimed, limits, spans)
        for y, row in zip(places, rows, strict=True):
            _draw_row(axes, y, row, limits)
            _words(axes, y, row, narrow)
        return to_svg(figure, title, f"rows{narrow:d}{key or title}")


def _places(rows: Sequence[EstimateRow], narrow: bool) -> tuple[list[float], float]:
    """Inches of every row above the axis, and of the upper end."""
    heights = [0.44 + 0.15 * (len(_wrapped(row, True)) - 1) if narrow else 0.34 for row in rows]
    below, places = 0.17, []
    for height in reversed(heights):
        places.append(below)
        below += height
    return places[::-1], below - (0.14 if narrow else 0.17)


def _margins(rows: Sequence[EstimateRow], width: float) -> tuple[float, float]:
    """Left and right end of the axes, so that labels and numbers have their room."""
    label = max(
        len(line) * (_BOLD_WIDTH if row.kind in _BOLD else 1.0) for row in rows for line in _wrapped(row, False)
    )
    number = max(len(row.numbers) for row in rows)
    return (label * _CHARACTER + 0.2) / width, 1 - (0.2 + number * _CHARACTER) / width


def _set_ticks(axes: Axes, limits: tuple[float, float], form: Form, count: int) -> None:
    """Round places; of a log ratio the round per cents or factors."""
    steps = [1, 2, 5, 10]
    if form == "plain":
        axes.xaxis.set_major_locator(MaxNLocator(count, steps=steps))
        return
    low, high = (math.exp(max(-300.0, min(300.0, limit))) for limit in limits)
    if form == "percent":
        ratios = [
            1 + place / 100 for place in MaxNLocator(count, steps=steps).tick_values(100 * (low - 1), 100 * (high - 1))
        ]
        words = [f"{100 * (ratio - 1):+.4g}".replace("-", "−") if ratio != 1 else "0" for ratio in ratios]
    else:
        ratios = [float(place) for place in LogLocator(10, (1, 2, 5), numticks=2 * count).tick_values(low, high)]
        words = [f"{ratio:g}×" for ratio in ratios]
    shown = [(math.log(r), word) for r, word in zip(ratios, words, strict=True) if r > 0 and low <= r <= high]
    axes.set_xticks([place for place, _ in shown], [word for _, word in shown])


def _limits(rows: Sequence[EstimateRow], claimed: Claimed | None) -> tuple[float, float]:
    """Room for all rows; in a claim, what lies so far off that it would squeeze the decision is left at the edge."""
    ends = [_hull(row) for row in rows]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if claimed is not None:
        bounds = [bound for bound in (claimed.low, claimed.high) if bound is not None]
        near = min((max(abs(e - bound) for e in end) for end in ends for bound in bounds), default=0.0)
        if near and all(row.interval is not None for row in rows):
            low, high = max(low, min(bounds) - 25 * near), min(high, max(bounds) + 25 * near)
        low, high = min(low, 0.0, *bounds), max(high, 0.0, *bounds)
    if not high > low:
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    room = 0.045 * (high - low)
    return low - room, high + room


def _hull(row: EstimateRow) -> tuple[float, float]:
    numbers = [*row.values, *(row.interval or ())]
    if row.published is not None:
        numbers.append(row.published)
    return min(numbers), max(numbers)


def _draw_claimed(
    axes: Axes, claimed: Claimed, limits: tuple[float, float], spans: Sequence[tuple[float, float]]
) -> None:
    low = limits[0] if claimed.low is None else claimed.low
    high = limits[1] if claimed.high is None else claimed.high
    axes.axvspan(low, high, color=ACCENT, alpha=0.07, linewidth=0, zorder=0)
    bounds = [bound for bound in (claimed.low, claimed.high) if bound is not None]
    for span in spans:
        if 0 not in bounds:
            axes.plot([0, 0], span, color=LINE, linewidth=1, zorder=0.5)
        for bound in bounds:
            axes.plot([bound] * 2, span, color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)), zorder=0.6)
    # The words stand beside the bound, on the side where there is more room.
    bound = bounds[-1] if bounds else 0.0
    side, offset = ("right", -4) if bound - limits[0] > 0.55 * (limits[1] - limits[0]) else ("left", 4)
    place = axes.get_xaxis_transform()
    axes.annotate(claimed.text, (bound, 0.985), (offset, 0), place, "offset points", fontsize=8.5, color=MUTED,
                  ha=side, va="top")  # fmt: skip


def _draw_row(axes: Axes, y: float, row: EstimateRow, limits: tuple[float, float]) -> None:
    inside = [value for value in row.values if limits[0] <= value <= limits[1]]
    below = 0.08 if row.interval is not None else 0.0
    axes.plot(inside, [y - below] * len(inside), "o", color=INK, alpha=0.25, ms=3.6, mew=0, zorder=2)
    if row.published is not None:
        axes.plot([row.published], [y], "x", color=INK, ms=6.5, mew=1.6, zorder=4)
    if row.interval is None:
        return
    estimate, low, high = row.interval
    mark = {"markersize": 6, **MARKS[row.kind]}
    if not limits[0] <= estimate <= limits[1]:
        edge, arrow, side = (limits[0], "←", "left") if estimate < limits[0] else (limits[1], "→", "right")
        axes.text(edge, y, arrow, color=mark["color"], va="center", ha=side)
        return
    axes.plot([low, high], [y, y], "-", color=mark["color"], linewidth=1.7, solid_capstyle="round", zorder=2.5)
    axes.plot([estimate], [y], markeredgewidth=1.5, linestyle="", zorder=3, **mark)


def _wrapped(row: EstimateRow, narrow: bool) -> list[str]:
    """The lines of a label: on a phone what the numbers beside it leave free, else the room at the left."""
    text = row.label.replace(" %", "\N{NO-BREAK SPACE}%")
    room = max(16, _NARROW_LINE - len(row.numbers)) if narrow else _LONGEST_LABEL
    if not narrow and len(text) > room:
        room = max(room // 2, min(room, len(text) // 2 + 5))  # two lines of about the same length
    return textwrap.wrap(text, room, break_on_hyphens=False)[: 3 if narrow else 2] or [""]


def _words(axes: Axes, y: float, row: EstimateRow, narrow: bool) -> None:
    """Label and numbers: beside the row, or above it. Each line by itself: a browser's font is not matplotlib's."""
    lines = _wrapped(row, narrow)
    label: dict[str, Any] = {"color": _COLOURS.get(row.kind, INK), "fontweight": "bold" if row.kind in _BOLD else None}
    common: dict[str, Any] = {
        "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False,
    }  # fmt: skip
    size = 9.0 if narrow else 9.5 if len(lines) == 1 else 8.3
    # Above the row the last line lies lowest; beside it the lines are centred.
    count = len(lines)
    heights = [8 + 11 * (count - 1 - n) if narrow else 5 * (count - 1) - 10 * n for n in range(count)]
    for line, height in zip(lines, heights, strict=True):
        place = ((0, height), "left", "bottom") if narrow else ((-8, height), "right", "center")
        axes.annotate(line, (0, y), place[0], ha=place[1], va=place[2], fontsize=size, **label, **common)
    place = ((0, 8), "right", "bottom") if narrow else ((8, 0), "left", "center")
    axes.annotate(
        row.numbers, (1, y), place[0], ha=place[1], va=place[2], fontsize=min(size + 1, 9.5), color=INK, **common
    )
