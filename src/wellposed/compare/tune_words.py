"""Words for paired differences that the answers of `wellposed tune` share, of data and of a study."""

from __future__ import annotations

import statistics as plain
from collections.abc import Sequence

from ..lab.statistics import Interval, smallest_n
from .ranking import signed

LEVEL = 0.95


def mean_words(interval: Interval, decimals: int) -> str:
    """A mean with half the width of its interval.

    Example:
        >>> mean_words(Interval(96.25, 95.75, 96.75, 0.95), 1)
        '96.2 ± 0.5'
    """
    return f"{interval.estimate:.{decimals}f} ± {interval.half_width:.{decimals}f}"


def gap_words(interval: Interval, decimals: int) -> str:
    """A difference with its interval.

    Example:
        >>> gap_words(Interval(1.0, 0.5, 1.5, 0.95), 1)
        '+1.0 [+0.5, +1.5]'
    """
    estimate, low, high = (signed(value, decimals) for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]"


def too_few(seeds: int, gap: str, keep: str) -> str | None:
    """The answer where there are too few seeds for any, or None.

    Args:
        seeds: how many there are.
        gap: the differences that were found, in words.
        keep: what to keep until there are more.
    """
    enough = smallest_n(LEVEL)
    if seeds >= enough:
        return None
    return f"{seeds} seeds cannot show a difference; {enough} or more can ({gap}). Until then, keep the {keep}."


def time_ratio(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Median ratio of wall times, paired by seed; None where no pair is known.

    Example:
        >>> time_ratio([2.0, None, 2.0], [4.0, 3.0, 5.0])
        2.25
    """
    ratios = [b / a for a, b in zip(before, after, strict=True) if a and b]
    return plain.median(ratios) if ratios else None


def ratio(value: float) -> str:
    """A ratio of times with the digits that it deserves.

    Example:
        >>> ratio(2.24), ratio(148.7)
        ('2.2', '149')
    """
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
