"""MAID's grid: the settings that every arm runs, and what their final losses say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ...lab.trial import Trial
from .bilevel_reference import Reference

ACCURACIES = (1e1, 1e-1, 1e-3, 1e-5)
STEP_SIZES = (1e-2, 1e-1, 1.0, 1e1, 1e2)
"""In multiples of 1 / |z_0|_inf; for HOAG in multiples of its own first step size."""
GRID = tuple((eps, size) for eps in ACCURACIES for size in STEP_SIZES)
GAP = 0.05
"""Relative gap that counts as success."""


def grid_of(trial: Trial) -> list[tuple[int, float, float]]:
    """Settings that this trial runs, with their numbers: all of them but at smoke scale."""
    every = int(trial.settings.get("every", 1))
    return [(number, *setting) for number, setting in enumerate(GRID) if number % every == 0]


def finite(loss: float, otherwise: float) -> float:
    """The loss, or another number where it is not finite."""
    return loss if math.isfinite(loss) else otherwise


def summary(trial: Trial, losses: Sequence[float], reference: Reference | None) -> dict[str, float]:
    """What the final losses over the grid say; by setting, and by first accuracy."""
    logs = [math.log(loss) for loss in losses]
    found = {
        "spread": max(logs) - min(logs),
        "mean_log_loss": statistics.fmean(logs),
        "median_log_loss": statistics.median(logs),
        "least_loss": min(losses),
        "most_loss": max(losses),
    }
    if reference is not None:
        gaps = [reference.gap(loss) for loss in losses]
        found["success"] = statistics.fmean(gap <= GAP for gap in gaps)
        for eps in ACCURACIES:
            part = [gap <= GAP for gap, (_, own, _) in zip(gaps, grid_of(trial), strict=True) if own == eps]
            if part:
                found[f"success_{eps:g}"] = statistics.fmean(part)
    return found
