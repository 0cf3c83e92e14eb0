"""Figures as inline SVG that follow the page's light or dark theme. They know no method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .drawing import ACCENT, INK, MUTED, PAPER, SECOND, THIRD, house_style, new_figure, to_svg
from .labels import place_labels

Kind = Literal["better", "reference", "within noise", "worse"]
# Shape says it too: full = a claim, hollow = none, square = what all are compared with.
_MARKS: dict[str, dict[str, Any]] = {
    "better": {"marker": "o", "color": ACCENT, "markerfacecolor": ACCENT},
    "within noise": {"marker": "o", "color": INK, "markerfacecolor": PAPER},
    "reference": {"marker": "s", "color": INK, "markerfacecolor": INK},
    "worse": {"marker": "v", "color": SECOND, "markerfacecolor": SECOND},
}
LINES: dict[str, tuple[str, str, Any]] = {
    "train": (MUTED, "muted", (0, (1.2, 1.4))),
    "validation": (SECOND, "second", (0, (5, 2))),
    "test": (ACCENT, "accent", "-"),
    "memorized": (THIRD, "third", (0, (4, 1.4, 1, 1.4))),
}
"""Colour, its name in the style sheet, and dashes of the lines of training curves."""


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot.

    Attributes:
        label: of the row.
        estimate, low, high: its score with interval.
        values: the scores behind it, one a seed.
        gap: its difference to the reference with interval; None for the reference.
        kind: what may be claimed of it.
    """

    label: str
    estimate: float
    low: float
    high: float
    values: Sequence[float] = ()
    gap: tuple[float, float, float] | None = None
    kind: Kind = "within noise"


def dot_plot(rows: Sequence[Dot], reference: float, labels: tuple[str, str], title: str, narrow: bool = False) -> str:
    """Scores with intervals and every seed as a faint dot; beside them the differences to the reference.

    Args:
        rows: from top to bottom.
        reference: score at which a line is drawn.
        labels: of the axes of scores and of differences.
        title: for screen readers.
        narrow: for a phone: the two parts one below the other, row labels above the rows.

    Returns:
        An `<svg>` element.
    """
    with house_style():
        height = (0.5 if narrow else 0.34) * len(rows) + 0.62
        if narrow:
            figure, (left, right) = new_figure(4.4, 2 * height + 0.2, 2, 1)
        else:
            figure, (left, right) = new_figure(8.6, height, 1, 2, width_ratios=[1.25, 1])
        left.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        right.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        scores = _limits([(row.estimate, min(row.low, *row.values), max(row.high, *row.values)) for row in rows])
        gaps = _limits([row.gap for row in rows if row.gap is not None] + [(0.0, 0.0, 0.0)])
        for y, row in zip(range(len(rows), 0, -1), rows, strict=True):
            left.plot(row.values, [y - 0.24] * len(row.values), "o", color=INK, alpha=0.25, ms=3.6, mew=0)
            _interval(left, y, (row.estimate, row.low, row.high), row.kind, scores)
            if row.gap is not None:
                _interval(right, y, row.gap, row.kind, gaps)
        for axes, limits, label in ((left, scores, labels[0]), (right, gaps, labels[1])):
            axes.set(xlim=limits, ylim=(0.3, len(rows) + (0.85 if narrow else 0.6)), xlabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
        _row_labels((left, right) if narrow else (left,), rows, narrow)
        return to_svg(figure, title, f"dots{narrow:d}")


def _row_labels(where: Sequence[Axes], rows: Sequence[Dot], above: bool) -> None:
    for axes in where:
        if not above:
            axes.set_yticks(range(len(rows), 0, -1), [row.label for row in rows])
            axes.tick_params(axis="y", length=0, pad=6, labelsize=9.5)
            for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
                tick.set_color(ACCENT if row.kind == "better" else INK)
                tick.set_fontweight("bold" if row.kind in ("better", "reference") else "normal")
            continue
        for y, row in zip(range(len(rows), 0, -1), rows, strict=True):
            weight = "bold" if row.kind in ("better", "reference") else "normal"
            colour = ACCENT if row.kind == "better" else INK
            place = axes.get_yaxis_transform()
            axes.text(0, y + 0.22, row.label, transform=place, fontweight=weight, color=colour, va="bottom")


def _interval(axes: Axes, y: float, values: tuple[float, float, float], kind: str, limits: tuple[float, float]) -> None:
    """A mark with its interval, or a number with an arrow where it lies outside the axes."""
    estimate, low, high = values
    mark = _MARKS[kind]
    if estimate < limits[0]:
        axes.text(limits[0], y, f"← {estimate:.1f}", color=mark["color"], va="center", ha="left")
        return
    axes.plot([low, high], [y, y], "-", color=mark["color"], linewidth=1.7, solid_capstyle="round", clip_on=True)
    axes.plot([estimate], [y], markersize=6, markeredgewidth=1.5, linestyle="", **mark)


def _limits(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Room for all intervals, unless an arm fell so far that it would squeeze all others into a corner."""
    estimates = np.array([row[0] for row in rows])
    middle = float(np.median(estimates))
    spread = max(float(estimates.max()) - middle, *(middle - row[1] for row in rows if row[0] >= middle), 1e-6)
    shown = [row for row in rows if row[0] >= middle - 4 * spread]
    low = max(min(row[1] for row in shown), middle - 5 * spread)
    high = min(max(row[2] for row in shown), float(estimates.max()) + 5 * spread)
    room = 0.04 * (high - low or 1.0)
    return low - room, high + room


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot: cost as a ratio, benefit with its interval; named in the plot or not."""

    label: str
    cost: float
    benefit: tuple[float, float, float]
    kind: Kind = "within noise"
    named: bool = True


def scatter(points: Sequence[Point], x_label: str, y_label: str, title: str) -> str:
    """Cost against benefit; labels stand where there is room, with a thin line to a point that is not beside them.

    A point so far below all others that it would squeeze them together is left out.

    Returns:
        An `<svg>` element, readable at the width of a phone.
    """
    with house_style():
        figure, (axes,) = new_figure(4.5, 3.9, 1, 1)
        limits = _limits([point.benefit for point in points])
        points = [point for point in points if limits[0] <= point.benefit[0] <= limits[1]]
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        for point in points:
            y, low, high = point.benefit
            colour = _MARKS[point.kind]["color"]
            axes.plot([point.cost] * 2, [low, high], "-", color=colour, linewidth=1, alpha=0.35, zorder=1)
            axes.plot([point.cost], [y], markersize=6.5, markeredgewidth=1.5, linestyle="", **_MARKS[point.kind])
        # Never zoom in on the noise of a clock: the axis spans at least a quarter of the reference's cost.
        costs = [point.cost for point in points]
        low_x, high_x = min(*costs, 0.9), max(*costs, 1.15)
        if high_x / low_x > 4:
            axes.set_xscale("log", base=2)
            axes.set_xlim(low_x / 1.25, high_x * 1.5)
        else:
            axes.set_xlim(low_x - 0.12 * (high_x - low_x), high_x + 0.3 * (high_x - low_x))
        axes.set_ylim(limits)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        axes.set(xlabel=x_label, ylabel=y_label)
        place_labels(figure, axes, [(p.label if p.named else "", p.cost, p.benefit[0]) for p in points])
        return to_svg(figure, title, "cost" + x_label)


def curve_panel(
    lines: Mapping[str, Sequence[Sequence[float]]],
    limits: tuple[float, float],
    title: str,
    kept: Sequence[float] = (),
    epochs: float | None = None,
) -> str:
    """Training curves of one arm: means over seeds, bands from the lowest to the highest seed.

    Args:
        lines: name -> seeds x epochs; names are those of `LINES`. Seeds may differ in length; an epoch that fewer
            than half of them reached is not drawn. A line called "epoch" gives the places of the points; else they
            are numbered from 1.
        limits: of the vertical axis, shared by all panels of a page.
        title: for screen readers.
        kept: epochs whose weights were kept, one a seed: a tick each, and a line at their median.
        epochs: end of the horizontal axis, shared by all panels of a page.

    Returns:
        An `<svg>` element.
    """
    with house_style():
        figure, (axes,) = new_figure(3.2, 2.1, 1, 1, margins=(0.115, 0.185, 0.975, 0.975))
        places = curve_places(lines)
        for name in [name for name in LINES if name in lines]:
            colour, _, dashes = LINES[name]
            mean, low, high = _over_seeds(lines[name])
            steps = places[: len(mean)]
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(steps, mean, color=colour, linewidth=1.7, linestyle=dashes)
        if len(kept):
            axes.axvline(float(np.median(kept)), color=INK, linewidth=0.8, zorder=0)
            axes.plot(kept, [0.0] * len(kept), "|", color=INK, ms=7, alpha=0.6, transform=axes.get_xaxis_transform())
        axes.set(ylim=limits, xlim=None if epochs is None else (min(places[0], epochs - 0.5), epochs))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("epoch")
        return to_svg(figure, title, "curves" + title)


def line_plot(
    lines: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
    narrow: bool = False,
) -> str:
    """Named lines over their own places: the mean over seeds, and a band from the least to the greatest.

    Args:
        lines: by label: places on the x axis, and one list of values a seed.
        x_label, y_label: of the axes.
        title: for screen readers.
        log_x: logarithmic x axis; a place of 0 is drawn at half of the next one.
        log_y: logarithmic y axis, for positive values.
        narrow: for a figure of half the page's width, with letters of the same size.

    Returns:
        An `<svg>` element.

    Example:
        >>> line_plot({"a": ([1, 2], [[0.0, 1.0], [0.2, 0.8]])}, "step", "score", "Scores")[:4]
        '<svg'
    """
    styles = [
        (ACCENT, "-"),
        (SECOND, (0, (5, 2))),
        (THIRD, (0, (4, 1.4, 1, 1.4))),
        (INK, (0, (1.2, 1.4))),
        (MUTED, "-"),
    ]
    with house_style():
        figure, (axes,) = new_figure(*((4.2, 2.6) if narrow else (6.4, 3.4)), 1, 1)
        for number, (label, (places, seeds)) in enumerate(lines.items()):
            colour, dashes = styles[number % len(styles)]
            mean, low, high = _over_seeds(seeds)
            x = np.asarray(places, float)[: len(mean)]
            if log_x:
                x = np.where(x > 0, x, x[x > 0].min() / 2)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(x, mean, color=colour, linewidth=1.8, linestyle=dashes, label=label)
        if log_x:
            axes.set_xscale("log")
        elif all(float(place).is_integer() for places, _ in lines.values() for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))  # half an epoch is no place
        if log_y:
            axes.set_yscale("log")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(frameon=False, loc="best")
        return to_svg(figure, title, "lines" + title)


def curve_places(lines: Mapping[str, Sequence[Sequence[float]]]) -> np.ndarray:
    """The epochs at which the points of an arm's curves lie, as its longest seed has them."""
    if lines.get("epoch"):
        return np.asarray(max(lines["epoch"], key=len), float)
    return np.arange(1.0, 1 + max(len(seed) for seeds in lines.values() for seed in seeds))


def curve_limits(panels: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> tuple[float, float]:
    """Limits that fit the means of all panels, but for the first steps of a run that starts far below."""
    drawn = [seeds for lines in panels for name, seeds in lines.items() if name in LINES]
    means = np.concatenate([_over_seeds(seeds)[0] for seeds in drawn])
    low, high = float(np.quantile(means, 0.02)), float(means.max())
    room = 0.05 * (high - low or 1.0)
    return low - room, high + room


def _over_seeds(seeds: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, least and greatest value of each epoch that at least half of the seeds reached."""
    length = int(np.median([len(seed) for seed in seeds]))
    columns = [[seed[epoch] for seed in seeds if len(seed) > epoch] for epoch in range(length)]
    return tuple(np.array([f(column) for column in columns]) for f in (np.mean, min, max))  # type: ignore[return-value]
