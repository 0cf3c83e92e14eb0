"""Labels of points in a plot, placed where they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from .drawing import INK, MUTED, PAPER


def place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Put every label at the nearest place where it covers nothing and cannot be taken for another point's.

    Args:
        figure: with its final size.
        axes: with their final limits.
        points: `(label, x, y)`; an empty label is not drawn, but its point is not covered either.
    """
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    at = [tuple(xy) for xy in axes.transData.transform([(x, y) for _, x, y in points]).tolist()]
    named = [i for i, (label, _, _) in enumerate(points) if label]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in at]
    back = axes.transData.inverted()
    for i in sorted(named, key=lambda i: -at[i][1]):
        background = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        text = axes.text(*points[i][1:], points[i][0], fontsize=9, ha="center", va="center", color=INK, bbox=background)
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        others = [xy for j, xy in enumerate(at) if j != i]
        box, radius = _free_place(at[i], (size.width, size.height), taken, others, axes.get_window_extent())
        taken.append(box)
        text.set_position(tuple(back.transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))))
        if radius > 8:
            (x, y), (u, v) = back.transform([at[i], _nearest(box, at[i])])
            axes.plot([x, u], [y, v], "-", color=MUTED, linewidth=0.6, zorder=0.5, scalex=False, scaley=False)


def _free_place(
    point: tuple[float, ...],
    size: tuple[float, float],
    taken: Sequence[Bbox],
    others: Sequence[tuple[float, ...]],
    inside: Bbox,
) -> tuple[Bbox, float]:
    """The best box for a label around a point, with its distance: nearest first, at its sides before above or below."""
    found: list[tuple[float, Bbox, float]] = []
    for radius in (8, 13, 20, 28, 38, 50, 64, 80, 100, 120):
        for angle in (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90):
            x = point[0] + math.cos(math.radians(angle)) * (radius + size[0] / 2)
            y = point[1] + math.sin(math.radians(angle)) * (radius + size[1] / 2)
            box = Bbox.from_bounds(x - size[0] / 2, y - size[1] / 2, *size)
            outside = sum(
                max(0, d) for d in (inside.x0 - box.x0, box.x1 - inside.x1, inside.y0 - box.y0, box.y1 - inside.y1)
            )
            own = math.dist(point, _nearest(box, point))
            mistaken = sum(math.dist(other, _nearest(box, other)) < own + 2 for other in others)
            # A thin line tells whose label it is where another point is nearer, so that this is the least evil.
            cost = 100 * sum(box.overlaps(other) for other in taken) + 10 * outside + 20 * mistaken + 0.5 * radius
            found.append((cost, box, radius))
    return min(found, key=lambda entry: entry[0])[1:]


def _nearest(box: Bbox, point: tuple[float, ...]) -> tuple[float, float]:
    """The point of a box that is nearest to a point."""
    return min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)
