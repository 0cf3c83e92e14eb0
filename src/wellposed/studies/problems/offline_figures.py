"""Figures of offline optimization, task by task: what a constraint gains, and where it lowers the sharpness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...lab.statistics import mean_interval
from ...lab.study_figures import EstimateRow, estimate_plot
from .offline_tasks import TASKS

if TYPE_CHECKING:
    from ...lab.study import Figure

LABELS = {
    "ackley": "Ackley",
    "styblinski_tang": "Styblinski-Tang",
    "rosenbrock": "log-Rosenbrock",
    "nk": "NK landscape",
    "diabetes": "diabetes forest",
}


def drawn(run: Any) -> list[Figure]:
    """Both figures of a finished run."""
    from ...lab.study import Figure

    found = []
    gains = [row(LABELS[task], pairs(run, "ignite", "base", f"s100_{task}", False)) for task in TASKS]
    if all(gain is not None for gain in gains):
        svg = estimate_plot([g for g in gains if g], "gain in the best design's score", "Gain of IGNITE task by task")
        found.append(Figure("Where the constraint helps", f"{_CAPTION} {epochs(run)}", svg))
    falls = [
        row(f"{LABELS[task]}, {where}", pairs(run, "base", "ignite_at_base", f"norm_{name}_{task}", True))
        for task in TASKS
        for name, where in (("train", "data"), ("designs", "designs"))
    ]
    if all(fall is not None for fall in falls):
        label = "log of the base's gradient norm over IGNITE's"
        svg = estimate_plot([f for f in falls if f], label, "Fall of the sharpness on data and on designs")
        found.append(Figure("Does lower sharpness carry over to unseen designs?", _FALL, svg))
    return found


_CAPTION = (
    "Score of the best of 128 designs, IGNITE minus gradient ascent alone, each with its own tuned settings, which are "
    "the same on all five tasks (mean with 95 % interval, and every seed)."
)
_FALL = (
    "The same settings without and with IGNITE (its limit and rate set by rule): log ratio of the norm of the mean "
    "prediction's gradient in the weights, on the training data and on the 128 designs that the search found. Above 0 "
    "the constraint lowers it."
)


def epochs(run: Any) -> str:
    """How long the two tuned arms train: stopping early is a regularizer, too.

    Example:
        >>> from types import SimpleNamespace as Arm
        >>> epochs(Arm(arms={"base": Arm(settings={"epochs": 5}), "ignite": Arm(settings={"ignite_epochs": 20})}))
        'Tuning chose 5 epochs without it and 20 with it: without the constraint it stops earlier.'
    """
    base, own = run.arms["base"].settings["epochs"], run.arms["ignite"].settings["ignite_epochs"]
    more = ": without the constraint it stops earlier" if base < own else ""
    return f"Tuning chose {base} epochs without it and {own} with it{more}."


def pairs(run: Any, first: str, second: str, metric: str, log: bool) -> list[float]:
    """Differences of a metric (of its logarithm) between two arms, one a seed that both finished."""
    found = []
    for a, b in zip(run.arms[first].outcomes, run.arms[second].outcomes, strict=True):
        values = [o.metrics.get(metric) if o is not None else None for o in (a, b)]
        if all(value is not None and (not log or value > 0) for value in values):
            one, other = (float(value) for value in values if value is not None)
            found.append(math.log(one / other) if log else one - other)
    return found


def row(label: str, values: Sequence[float]) -> EstimateRow | None:
    """A row with mean and interval; None without values."""
    if not values:
        return None
    found = mean_interval(values)
    if not math.isfinite(found.low):
        return EstimateRow(label, values, (found.estimate,) * 3)
    kind = "above" if found.low > 0 else "below" if found.high < 0 else "open"
    numbers = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return EstimateRow(label, values, (found.estimate, found.low, found.high), numbers, kind)
