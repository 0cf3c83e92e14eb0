"""Groups of points in one figure: what was tried, where it began, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import ACCENT, INK, MUTED, PAPER, house_style, new_figure, to_svg

_STYLES: tuple[dict[str, Any], ...] = (
    {"marker": "o", "color": MUTED, "markerfacecolor": PAPER, "markersize": 5},
    {"marker": "s", "color": INK, "markerfacecolor": INK, "markersize": 5.5},
    {"marker": "o", "color": ACCENT, "markerfacecolor": ACCENT, "markersize": 6.5},
)


def scatter_plot(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    narrow: bool = False,
) -> str:
    """Up to three groups of points, the later ones above: hollow, squares, and full ones in the accent's colour.

    Args:
        groups: by label: places on both axes.
        x_label, y_label: of the axes.
        title: for screen readers.
        log_x: logarithmic x axis, for positive places.
        narrow: for a figure of half the page's width, with letters of the same size.

    Returns:
        An `<svg>` element.

    Example:
        >>> scatter_plot({"tried": ([0.1, 0.2], [1.0, 2.0]), "kept": ([0.2], [2.0])}, "rate", "score", "Scores")[:4]
        '<svg'
    """
    with house_style():
        figure, (axes,) = new_figure(*((4.2, 2.6) if narrow else (6.4, 3.4)), 1, 1)
        for (label, (x, y)), style in zip(groups.items(), _STYLES, strict=False):
            axes.plot(x, y, linestyle="", label=label, clip_on=False, **style)
        if log_x:
            axes.set_xscale("log")
        axes.set(xlabel=x_label, ylabel=y_label)
        # Above the axes: points may lie anywhere in them.
        axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handletextpad=0.2,
            columnspacing=1.2,
        )  # fmt: skip
        return to_svg(figure, title, "points" + title)
