"""Hyperparameters in the place of an arm's floats, and the recipe that the offers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from ...compose import Compose
from ...hyperparameter import Hyperparameter
from ...lab.space import Range
from ...lab.study import protocol_of
from ...lab.trial import Setting, Trial
from ...papers.catalogue import find_card
from ...regularizer import Regularizer
from ...weights import WeightDecay

Strengths = dict[str, Hyperparameter]
Make = Callable[[Mapping[str, Any]], Regularizer | None]

_LOOP = ("learning_rate",)
"""Settings of the loop: no loss depends on them, so that only a search can tune them."""


def candidates(slug: str, trial: Trial, *, per_example: bool = True) -> Strengths:
    """A hyperparameter for each number that the card's arm searches in a range, at the trial's present value.

    Ranges on a logarithmic scale become positive numbers without an upper end: one step changes them by a share. Others
    keep their ends.

    Args:
        slug: of the paper.
        trial: names the arm, and holds the values to begin with.
        per_example: whether a self-tuning network may give each example its own value.

    Example:
        >>> trial = Trial("elr", "elr", "laptop", "tune", {"strength": 3.0, "weight_decay": 1e-3}, 0, "f")
        >>> {name: round(float(h()), 4) for name, h in candidates("elr", trial).items()}
        {'weight_decay': 0.001, 'strength': 3.0}
    """
    arm = protocol_of(find_card(slug)).arms[trial.arm]
    found: Strengths = {}
    for name, part in arm.space.items():
        if isinstance(part, Range) and not part.integer and name in trial.settings and name not in _LOOP:
            found[name] = _hyperparameter(name, float(trial.settings[name]), part, per_example)
    return found


def _hyperparameter(name: str, value: float, part: Range, per_example: bool) -> Hyperparameter:
    if part.log:
        return Hyperparameter(value, chart="exp", per_example=per_example, name=name)
    # A value at the end of its range has no way back.
    margin = 1e-3 * (part.high - part.low)
    inside = min(max(value, part.low + margin), part.high - margin)
    return Hyperparameter(inside, part.low, part.high, per_example=per_example, name=name)


def taken(make: Make, settings: Mapping[str, Any], offered: Strengths) -> tuple[Strengths, Regularizer | None]:
    """Those hyperparameters that an arm's method takes in the place of its float, and the method that reads them.

    Methods are asked, not listed: one that refuses a hyperparameter, or forgets it, keeps its number.

    Example:
        >>> from wellposed.losses import LabelSmoothing
        >>> offered = {"smoothing": Hyperparameter(0.1, 0.0, 0.5), "alpha": Hyperparameter(0.2, 0.0, 1.0)}
        >>> found, method = taken(lambda s: LabelSmoothing(s["smoothing"]), {"alpha": 0.2}, offered)
        >>> list(found), method.smoothing is found["smoothing"]
        (['smoothing'], True)
    """
    plain = {**settings, **{name: float(h()) for name, h in offered.items() if name not in settings}}
    found: Strengths = {}
    for name, h in offered.items():
        try:
            made = make({**plain, name: h})
        except (TypeError, ValueError, RuntimeError):
            continue
        if made is not None and any(part is h for part in made.modules()):
            found[name] = h
    return found, make({**plain, **found})


def with_decay(slug: str, trial: Trial, make: Make, *, per_example: bool = True) -> tuple[Strengths, Regularizer]:
    """An arm's hyperparameters with SGD's decay of all parameters, as a penalty with the same gradient."""
    offered = candidates(slug, trial, per_example=per_example)
    decay = offered.pop("weight_decay", None)
    found, method = taken(make, trial.settings, offered)
    parts = [] if method is None else [method]
    if decay is not None:
        parts.append(WeightDecay(decay, on="all"))
        found["weight_decay"] = decay
    return found, Compose(*parts)


def sgd(settings: Mapping[str, Setting], learned: Strengths, *, nesterov: bool = False) -> Callable[[Any], Optimizer]:
    """The studies' SGD with momentum 0.9, and with the settings' weight decay unless it is learned."""
    return partial(
        torch.optim.SGD,
        lr=float(settings["learning_rate"]),
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.0 if "weight_decay" in learned else float(settings["weight_decay"]),
    )


def step_decay(progress: float) -> float:
    """The learning rate's factor of the studies' recipe: a tenth from a half on, a hundredth from three quarters.

    Example:
        >>> step_decay(0.4), step_decay(0.5), step_decay(0.75)
        (1.0, 0.1, 0.01)
    """
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
