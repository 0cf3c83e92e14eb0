"""Figures as inline SVG that follow the page's light or dark theme. They know no method."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib draws with these stand-ins; the page's style sheet gives them their colours, light or dark.
INK, MUTED, LINE, ACCENT, SECOND, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second", THIRD: "third"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wellposed",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a label, an estimate with its interval, and the values behind it."""

    label: str
    estimate: float
    low: float
    high: float
    values: Sequence[float]
    emphasis: bool = False


def dot_plot(rows: Sequence[Dot], reference: float, x_label: str, title: str) -> str:
    """Rows from top to bottom, means with intervals, seeds as faint dots, a line at the reference.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 0.36 * len(rows) + 0.9))
        for y, row in zip(range(len(rows), 0, -1), rows, strict=True):
            colour = ACCENT if row.emphasis else INK
            axes.plot(row.values, [y] * len(row.values), "o", color=MUTED, alpha=0.28, markersize=4, markeredgewidth=0)
            axes.plot([row.low, row.high], [y, y], "-", color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([row.estimate], [y], "o", color=colour, markersize=7)
        axes.axvline(reference, color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(rows), 0, -1), [row.label for row in rows])
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)
        _limit(axes, rows)
        return _svg(figure, title)


def _limit(axes: Axes, rows: Sequence[Dot]) -> None:
    """Show all intervals and seeds, but let no diverged seed squeeze the rest into a corner."""
    ends = np.array([[row.low, row.high] for row in rows if np.isfinite([row.low, row.high]).all()]).ravel()
    seeds = np.concatenate([np.asarray(row.values, float) for row in rows])
    low, high = min(ends.min(), np.quantile(seeds, 0.01)), max(ends.max(), np.quantile(seeds, 0.99))
    room = 0.04 * (high - low or 1.0)
    axes.set_xlim(low - room, high + room)


def scatter(points: Sequence[tuple[str, float, float, bool]], x_label: str, y_label: str, title: str) -> str:
    """Cost against benefit: `(label, x, y, emphasis)`, labels moved apart where they would collide.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 4.2))
        axes.axhline(0, color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
        xs, ys = [p[1] for p in points], [p[2] for p in points]
        for _, x, y, emphasis in points:
            axes.plot([x], [y], "o", color=ACCENT if emphasis else INK, markersize=7)
        axes.set_xlim(min(xs) - 0.05 * (np.ptp(xs) or 1), max(xs) + 0.45 * (np.ptp(xs) or 1))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(axis="y", labelcolor=MUTED)
        heights = _apart(ys, 0.058 * (np.ptp(axes.get_ylim()) or 1))
        for (label, x, y, _), height in zip(points, heights, strict=True):
            place = (x + 0.025 * (np.ptp(axes.get_xlim()) or 1), height)
            link = (
                {"arrowstyle": "-", "color": LINE, "linewidth": 0.7, "shrinkB": 5} if abs(height - y) > 1e-9 else None
            )
            axes.annotate(label, (x, y), place, fontsize=9.5, va="center", color=INK, arrowprops=link)
        return _svg(figure, title)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Heights in the order of `values`, moved until neighbours are at least `gap` apart."""
    order = np.argsort(values)
    placed = np.asarray(values, float)[order]
    for _ in range(200):
        moved = False
        for i in range(1, len(placed)):
            lack = gap - (placed[i] - placed[i - 1])
            if lack > 1e-9:
                placed[i - 1] -= lack / 2
                placed[i] += lack / 2
                moved = True
        if not moved:
            break
    found = np.empty(len(placed))
    found[order] = placed
    return found.tolist()


def curves(
    panels: Sequence[tuple[str, Mapping[str, Sequence[Sequence[float]]], float | None]], y_label: str, title: str
) -> str:
    """Training curves, a panel an arm: `(label, {line: seeds x points}, epoch where it stopped)`.

    A line called "epoch" gives the points' places; else they are numbered from 1.

    Lines are means over seeds, the band is the range from the lowest to the highest seed.

    Returns:
        An `<svg>` element.
    """
    colours = {"train": MUTED, "validation": SECOND, "test": ACCENT, "memorized": THIRD}
    dashes = {"validation": (0, (5, 2)), "memorized": (0, (1, 1.2))}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with mpl.rc_context({**_STYLE, "font.size": 10}):
        figure, grid = plt.subplots(
            lines, columns, figsize=(8.4, 2.5 * lines + 0.3), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, (label, found, stop) in zip(grid.flat, panels, strict=False):
            places = found.get("epoch")
            for name, seeds in found.items():
                if name != "epoch":
                    _band(
                        axes, seeds, places[0] if places else None, name, colours.get(name, INK), dashes.get(name, "-")
                    )
            if stop is not None:
                axes.axvline(stop, color=LINE, linewidth=1)
                axes.annotate(
                    "kept", (stop, 1), xycoords=("data", "axes fraction"), fontsize=8.5, color=MUTED, ha="center"
                )
            axes.set_title(label, fontsize=10, color=INK, pad=12)
            axes.tick_params(axis="y", labelcolor=MUTED)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
        for axes in grid[:, 0]:
            axes.set_ylabel(y_label)
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
        return _svg(figure, title)


def _band(
    axes: Axes, seeds: Sequence[Sequence[float]], places: Sequence[float] | None, name: str, colour: str, dash: Any
) -> None:
    length = min(len(seed) for seed in seeds)
    values = np.array([seed[:length] for seed in seeds], float)
    epochs = np.arange(1, length + 1) if places is None else np.asarray(places[:length])
    axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)
    axes.plot(epochs, values.mean(0), color=colour, linewidth=1.8, linestyle=dash, label=name)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element that scales with the page, has a name for screen readers, and no fixed colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.06, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # Ids of several figures on one page must not meet.
    prefix = re.sub(r"\W+", "", title.lower())[:24]
    text = re.sub(r'(id="|href="#|url\(#)', lambda m: f"{m.group(1)}{prefix}-", text)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1) if size else text
    name = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
