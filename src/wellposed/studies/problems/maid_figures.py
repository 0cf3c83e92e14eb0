"""MAID's figures: how many settings reach the optimum, and the final losses of all settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .maid_grid import ACCURACIES

if TYPE_CHECKING:
    from ...lab.study import Figure

_SHOWN = {
    "maid": "MAID",
    "hoag_geometric": "HOAG, geometric",
    "fixed_step": "fixed step",
    "fixed_armijo": "fixed accuracy, line search",
}


def figures(run: Any) -> list[Figure]:
    """How many settings reach the optimum, by first accuracy and by gap; final losses of all settings in order."""
    from ...lab.figures import line_plot
    from ...lab.study import Figure

    def curves(problem: str, name: str) -> dict[str, list[list[float]]]:
        found = {label: run.arms[f"{problem}_{arm}"].curves(name) for arm, label in _SHOWN.items()}
        return {label: seeds for label, seeds in found.items() if seeds}

    drawn: list[Figure] = []
    shares: dict[str, tuple[Sequence[float], list[list[float]]]] = {}
    for arm, label in _SHOWN.items():
        by_eps = {eps: run.arms[f"denoising_{arm}"].metric(f"success_{eps:g}", {}) for eps in ACCURACIES}
        kept = {eps: values for eps, values in sorted(by_eps.items()) if values}
        if kept:
            shares[label] = (list(kept), [list(row) for row in zip(*kept.values(), strict=True)])
    if shares:
        svg = line_plot(
            shares, "first accuracy", "share of step sizes", "Settings that reach the optimum, by accuracy", log_x=True
        )
        caption = (
            "Denoising: share of the five first step sizes that end within 5 % of the way to the optimum. A fixed accuracy "
            "with the same line search is as good as MAID where it is fine enough; MAID does not have to know it."
        )
        drawn.append(Figure("Which accuracy must one know?", caption, svg))
    for problem, title, y_label in (
        ("denoising", "Final losses of all settings: denoising", "upper loss"),
        ("logistic", "Final losses of all settings: 650 hyperparameters", "validation cross-entropy"),
    ):
        found = {
            label: (range(1, 1 + len(seeds[0])), [sorted(losses) for losses in seeds])
            for label, seeds in curves(problem, "loss").items()
        }
        if found:
            svg = line_plot(found, "settings, from best to worst", y_label, title)
            caption = "Each line orders the settings of one method by their final loss: flat means that the choice does not matter."
            drawn.append(Figure(title, caption, svg))
    return drawn
