"""Statistics over seeds: Student intervals, exact sign-flip tests, and when a direction may be claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_EXACT_LIMIT = 20
_CHUNK = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student t interval of a mean.

    Args:
        values: one a seed, at least one; with a single one the interval is infinite.
        level: confidence, in (0, 1).

    Raises:
        ValueError: if there is no value, a value is not finite, or the level is out of range.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
        Interval(estimate=2.0, low=-0.484..., high=4.484..., level=0.95)
    """
    array = _checked(values)
    _check_level(level)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, -math.inf, math.inf, level)
    half = float(stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half, level)


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Student t interval of the mean of a - b, paired by seed."""
    if len(a) != len(b):
        raise ValueError(f"paired_interval: a and b must pair up, got {len(a)} and {len(b)} values")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], level)


def sign_flip_p(values: Sequence[float], draws: int = 200_000, seed: int = 0) -> float:
    """Two-sided p value of the sign-flip test of "the values are symmetric around 0".

    Exact up to 20 values (all 2^n sign patterns); beyond that by seeded draws, counting the observed pattern once.

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0, 4.0])
        0.125
    """
    array = _checked(values)
    observed = abs(array.sum())
    # Sums that tie must tie in the ledger too, whose numbers are rounded to ten digits.
    tolerance = 1e-8 * np.abs(array).sum()
    if len(array) <= _EXACT_LIMIT:
        # All sums of +-v_i, built by doubling: 2^n numbers, no 2^n x n matrix of signs.
        sums = np.zeros(1)
        for value in array:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= observed - tolerance).mean())
    generator, extreme = np.random.default_rng(seed), 0
    for start in range(0, draws, _CHUNK):
        signs = generator.integers(0, 2, (min(_CHUNK, draws - start), len(array)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ array) >= observed - tolerance).sum())
    return (extreme + 1) / (draws + 1)


def simultaneous_level(comparisons: int, level: float = 0.95) -> float:
    """Level at which each of `comparisons` intervals is drawn so that all hold together at `level` (Bonferroni).

    Example:
        >>> round(simultaneous_level(10), 3)
        0.995
    """
    _check_level(level)
    return 1 - (1 - level) / max(1, comparisons)


def smallest_n(level: float) -> int:
    """How many seeds the sign-flip test needs at least to reach `level`: its smallest p value is 2 / 2^n.

    Example:
        >>> smallest_n(0.95), smallest_n(0.995)
        (6, 9)
    """
    _check_level(level)
    n = 1
    while 2.0 ** (1 - n) > (1 - level) * (1 + 1e-9):
        n += 1
    return n


def direction(values: Sequence[float], level: float = 0.95) -> int:
    """+1 or -1 where the Student interval and the sign-flip test agree on a direction at `level`, else 0.

    Example:
        >>> direction([1.0, 1.1, 0.9, 1.2, 1.0, 0.8]), direction([1.0, -1.0, 2.0])
        (1, 0)
    """
    interval = mean_interval(values, level)
    if sign_flip_p(values) > (1 - level) * (1 + 1e-9):
        return 0
    return int(interval.low > 0) - int(interval.high < 0)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be a non-empty list of finite numbers, got {values!r}")
    return array
