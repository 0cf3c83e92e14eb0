"""How the weight of a penalty changes over training: factors in [0, 1] of the share of steps that are done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

Schedule = Literal["constant", "cosine", "two_phase", "linear_warmup", "quadratic_warmup"]
Factor = Callable[[float], float]


def cosine_decay(progress: float, floor: float = 0.1) -> float:
    """From 1 down to `floor` along half a cosine: `floor + (1 - floor) (1 + cos(pi t)) / 2`.

    Example:
        >>> cosine_decay(0.0), cosine_decay(1.0)
        (1.0, 0.1)
    """
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def two_phase(progress: float, start: float = 0.2, ramp: float = 0.05) -> float:
    """0 before `start`, then a linear ramp over the share `ramp` of training, then 1.

    Example:
        >>> two_phase(0.1), round(two_phase(0.225), 6), two_phase(0.25)
        (0.0, 0.5, 1.0)
    """
    return 1.0 if progress >= start + ramp else max(0.0, (progress - start) / ramp)


def warmup(progress: float, share: float = 0.1, power: float = 1.0) -> float:
    """`(t / share)^power` up to 1: a linear or quadratic beginning.

    Example:
        >>> warmup(0.05), warmup(0.05, power=2.0), warmup(0.5)
        (0.5, 0.25, 1.0)
    """
    return float(min(1.0, progress / share) ** power)


SCHEDULES: Mapping[str, Factor] = {
    "constant": lambda progress: 1.0,
    "cosine": cosine_decay,
    "two_phase": two_phase,
    "linear_warmup": warmup,
    "quadratic_warmup": lambda progress: warmup(progress, power=2.0),
}


def find_schedule(owner: str, schedule: Schedule | Factor) -> Factor:
    """A schedule by name, or the function itself.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> find_schedule("LogitConsistency", "cosine")(0.0)
        1.0
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"{owner}: schedule must be a function or one of {list(SCHEDULES)}, got {schedule!r}")
    return SCHEDULES[schedule]
