"""Figures of base-to-novel generalisation: where the arms end, and when plain training turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...lab.drawing import ACCENT, INK, MUTED, PAPER, THIRD, house_style, new_figure, to_svg
from ...lab.figures import line_plot
from ...lab.labels import place_labels

if TYPE_CHECKING:
    from ...lab.study import Figure

STEPS = (20, 40, 80, 120, 150)
LEFT_OUT = "stand_in"


def drawn(run: Any) -> list[Figure]:
    """Both figures of a finished run."""
    from ...lab.study import Figure

    found = []
    points = [
        point
        for name, record in run.arms.items()
        if not name.startswith(LEFT_OUT)
        for point in [base_and_novel(record)]
        if point is not None
    ]
    if points:
        svg = tradeoff_plot(points)
        found.append(Figure("Base classes against novel ones", caption(run), svg))
    curve = run.arms["lora_long"].outcomes
    rows = [[outcome.metrics[f"hm_{step}"] for step in STEPS] for outcome in curve if _complete(outcome)]
    if rows:
        svg = line_plot({"LoRA, lr 5e-3": (STEPS, rows)}, "step", "harmonic mean", "Harmonic mean along plain training")
        words = (
            "Plain LoRA at the fixed recipe of 150 steps (mean and range over the seeds). It fits its 80 images early; what "
            "it gains afterwards it pays for on novel classes."
        )
        found.append(Figure("When plain tuning turns", words, svg))
    return found


def _complete(outcome: Any) -> bool:
    return outcome is not None and all(f"hm_{step}" in outcome.metrics for step in STEPS)


def base_and_novel(record: Any) -> tuple[str, str, float, float] | None:
    """Label, role and mean accuracies of an arm; None where no seed finished."""
    outcomes = [o for o in record.outcomes if o is not None and "novel" in o.metrics]
    if not outcomes:
        return None
    base, novel = (float(np.mean([o.metrics[name] for o in outcomes])) for name in ("base", "novel"))
    return record.arm.label, record.arm.role, base, novel


def caption(run: Any) -> str:
    """How long tuning lets plain LoRA and the family train.

    Example:
        >>> from types import SimpleNamespace as Arm
        >>> arms = {"lora": Arm(settings={"steps": 40}), "glad": Arm(settings={"steps": 80, "rule": "mix"})}
        >>> caption(Arm(arms=arms))[-56:]
        'Tuning chose 40 steps for LoRA and 80 with the rule mix.'
    """
    own = run.arms["glad"].settings
    return (
        "Mean accuracy in the target domain over the seeds; the lines join points of one harmonic mean. Triangles are the "
        f"paper's. Tuning chose {run.arms['lora'].settings['steps']} steps for LoRA and {own['steps']} with the rule "
        f"{own['rule']}."
    )


def tradeoff_plot(points: Sequence[tuple[str, str, float, float]]) -> str:
    """Novel accuracy over base accuracy, with lines of equal harmonic mean.

    Args:
        points: label, role, base and novel accuracy.

    Example:
        >>> tradeoff_plot([("LoRA", "baseline", 0.8, 0.7), ("GLAD", "method", 0.8, 0.75)])[:4]
        '<svg'
    """
    marks = {"method": ("^", ACCENT, ACCENT), "witness": ("s", MUTED, MUTED), "control": ("D", THIRD, PAPER)}
    with house_style():
        figure, (axes,) = new_figure(6.4, 4.4, 1, 1)
        x, y = (np.array([point[i] for point in points]) for i in (2, 3))
        room = 0.08 * max(float(np.ptp(x)), float(np.ptp(y)), 0.02)
        axes.set(xlim=(x.min() - room, x.max() + 3 * room), ylim=(y.min() - room, y.max() + room))
        grid = np.meshgrid(np.linspace(*axes.get_xlim(), 60), np.linspace(*axes.get_ylim(), 60))
        mean = 2 * grid[0] * grid[1] / np.maximum(grid[0] + grid[1], 1e-9)
        lines = axes.contour(*grid, mean, levels=6, colors=MUTED, linewidths=0.6)
        axes.clabel(lines, fmt="%.2f", fontsize=7.5)
        for _, role, base, novel in points:
            marker, edge, face = marks.get(role, ("o", INK, PAPER))
            axes.plot([base], [novel], marker, color=edge, markerfacecolor=face, ms=6.5, mew=1.4)
        axes.set(xlabel="accuracy on base classes", ylabel="accuracy on novel classes")
        place_labels(figure, axes, [(label, base, novel) for label, _, base, novel in points])
        return to_svg(figure, "Base and novel accuracy of all arms", "basenovel")
