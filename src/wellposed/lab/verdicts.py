"""Verdicts: what twelve seeds may say about a claim that was registered before they ran.

The rule is short, and it is tested by simulation (`docs/verdicts.md`): a claim's values, one a seed, give a Student
interval and an exact sign-flip test; a direction counts only where both agree, and where
the phenomenon exists here at all (the regime, judged on baselines alone).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .statistics import Interval, mean_interval, sign_flip_p, simultaneous_level

Word = Literal["supported", "refuted", "inconclusive", "holds", "fails", "not testable here"]
LEVEL = 0.95


@dataclass(frozen=True)
class Condition:
    """One predicate of a regime.

    Attributes:
        text: what is asked, e.g. "memorises >= 15 % of the wrong labels".
        value: what was found, the mean over the evaluation seeds.
        holds: whether it is so.
    """

    text: str
    value: float
    holds: bool


@dataclass(frozen=True)
class Case:
    """One case of an exact claim; cases are listed from the smallest to the largest.

    Attributes:
        name: what is computed, so that the case can be repeated.
        error: how far it is off, >= 0; not a number counts as off.
        tolerance: how far it may be off.
    """

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Contrast:
    """One comparison of a claim: its values, one a seed, and what they say.

    Attributes:
        name: the rival, or "" where a claim has one estimand.
        values: one a seed; positive is as the paper says.
        interval: at the level of support.
        refuting: at the level of refutation, wider where a claim has several contrasts.
        p: sign-flip p value of "the values are symmetric around the margin"; the larger one where there are two margins.
    """

    name: str
    values: tuple[float, ...]
    interval: Interval
    refuting: Interval
    p: float


@dataclass(frozen=True)
class Verdict:
    """What may be said of a claim.

    Attributes:
        word: the verdict.
        qualifier: what belongs to it: "reversed", "absent", "smaller than claimed", "regime not reached", ...
        contrasts: the comparisons behind it; empty for exact claims.
        level: confidence of `interval`: 95 % for the primary claim, 1 - 0.05/k for one of k secondary claims.
        conditions: the regime, as it was found.
        counterexample: of an exact claim that fails, the smallest case.
    """

    word: Word
    qualifier: str = ""
    contrasts: tuple[Contrast, ...] = ()
    level: float = LEVEL
    conditions: tuple[Condition, ...] = ()
    counterexample: Case | None = None
    cases: int = 0
    worst: float | None = field(default=None)

    @property
    def weakest(self) -> Contrast | None:
        """The contrast with the lowest lower end: a list of contrasts is as strong as this one."""
        return min(self.contrasts, key=lambda c: c.interval.low, default=None)


def judge_effect(
    values: Mapping[str, Sequence[float]],
    margin: float,
    conditions: Sequence[Condition] = (),
    level: float = LEVEL,
) -> Verdict:
    """Verdict on "every contrast exceeds `margin`".

    Where the regime fails, inconclusive. Else supported where every contrast lies above the margin at `level`, refuted
    where one lies below the margin at 1 - (1 - level)/k, k the number of contrasts, and inconclusive otherwise. In
    every case the sign-flip test must agree with the interval.

    Args:
        values: one list a contrast, one value a seed, paired across contrasts.
        margin: the smallest value that would still support the paper, >= 0.
        conditions: the regime: what must be so for the phenomenon to exist here.
        level: of the claim.

    Raises:
        ValueError: for no contrast, contrasts of different lengths, fewer than two seeds, values that are not finite,
            or a margin that is negative or not finite.

    Example:
        >>> judge_effect({"": [2.0, 2.1, 1.9, 2.2, 2.0, 1.8]}, margin=1.0).word
        'supported'
        >>> v = judge_effect({"": [0.5, 0.4, 0.6, 0.5, 0.45, 0.55]}, margin=1.0)
        >>> v.word, v.qualifier
        ('refuted', 'smaller than claimed')
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"judge_effect: margin must be >= 0 and finite, got {margin}")
    contrasts = _contrasts(values, [margin], level)
    regime = all(condition.holds for condition in conditions)
    found = {"contrasts": contrasts, "level": level, "conditions": tuple(conditions)}
    if not regime:
        return Verdict("inconclusive", "regime not reached", **found)  # type: ignore[arg-type]
    if all(_above(c, margin, level) for c in contrasts):
        return Verdict("supported", **found)  # type: ignore[arg-type]
    refuting = simultaneous_level(len(contrasts), level)
    below = [c for c in contrasts if _below(c, margin, refuting)]
    if below:
        lowest = min(below, key=lambda c: c.refuting.high)
        return Verdict("refuted", _size(lowest, refuting), **found)  # type: ignore[arg-type]
    return Verdict("inconclusive", **found)  # type: ignore[arg-type]


def judge_equivalence(
    values: Mapping[str, Sequence[float]],
    margin: float,
    conditions: Sequence[Condition] = (),
    level: float = LEVEL,
    non_inferiority: bool = False,
) -> Verdict:
    """Verdict on "every contrast lies within (-margin, margin)", or above -margin for non-inferiority.

    Supported where the regime holds and every interval lies inside, refuted where it holds and one lies wholly
    outside, else inconclusive; the sign-flip test must agree at each bound that is used.

    Raises:
        ValueError: as `judge_effect`; the margin must be > 0.

    Example:
        >>> judge_equivalence({"": [0.1, -0.1, 0.0, 0.1, -0.1, 0.05]}, margin=1.0).word
        'supported'
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"judge_equivalence: margin must be > 0 and finite, got {margin}")
    contrasts = _contrasts(values, [-margin] if non_inferiority else [-margin, margin], level)
    regime = all(condition.holds for condition in conditions)
    found = {"contrasts": contrasts, "level": level, "conditions": tuple(conditions)}
    if not regime:
        return Verdict("inconclusive", "regime not reached", **found)  # type: ignore[arg-type]
    if all(_above(c, -margin, level) and (non_inferiority or _below(c, margin, level)) for c in contrasts):
        return Verdict("supported", **found)  # type: ignore[arg-type]
    refuting = simultaneous_level(len(contrasts), level)
    under = any(_below(c, -margin, refuting) for c in contrasts)
    over = not non_inferiority and any(_above(c, margin, refuting) for c in contrasts)
    if under or over:
        return Verdict("refuted", "below the margin" if under else "above the margin", **found)  # type: ignore[arg-type]
    return Verdict("inconclusive", **found)  # type: ignore[arg-type]


def judge_exact(cases: Sequence[Case]) -> Verdict:
    """Verdict on an identity, a bound or an invariance: `holds`, or `fails` with the first case that does.

    Raises:
        ValueError: without a case.

    Example:
        >>> judge_exact([Case("n = 2", 1e-15, 1e-12), Case("n = 3", 1e-3, 1e-12)]).counterexample.name
        'n = 3'
    """
    if not cases:
        raise ValueError("judge_exact: an exact claim needs at least one case")
    failing = next((case for case in cases if not case.holds), None)
    errors = [case.error for case in cases]
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    word: Word = "holds" if failing is None else "fails"
    return Verdict(word, counterexample=failing, cases=len(cases), worst=worst)


def secondary_level(claims: int) -> float:
    """Level of each of `claims` secondary claims that are judged by intervals: 1 - 0.05 / claims.

    Example:
        >>> secondary_level(5)
        0.99
    """
    return simultaneous_level(claims, LEVEL)


def _contrasts(values: Mapping[str, Sequence[float]], bounds: Sequence[float], level: float) -> tuple[Contrast, ...]:
    if not values:
        raise ValueError("a claim needs at least one contrast")
    if any(len(v) < 2 for v in values.values()):
        raise ValueError("a claim is judged on at least two seeds")
    if len({len(v) for v in values.values()}) > 1:
        lengths = {name: len(v) for name, v in values.items()}
        raise ValueError(f"all contrasts of a claim need the same seeds, got so many values: {lengths}")
    refuting = simultaneous_level(len(values), level)
    return tuple(
        Contrast(
            name,
            tuple(float(v) for v in column),
            mean_interval(column, level),
            mean_interval(column, refuting),
            max(sign_flip_p([float(v) - bound for v in column]) for bound in bounds),
        )
        for name, column in values.items()
    )


def _above(contrast: Contrast, bound: float, level: float) -> bool:
    return mean_interval(contrast.values, level).low > bound and _flips(contrast, bound, level)


def _below(contrast: Contrast, bound: float, level: float) -> bool:
    return mean_interval(contrast.values, level).high < bound and _flips(contrast, bound, level)


def _flips(contrast: Contrast, bound: float, level: float) -> bool:
    return sign_flip_p([v - bound for v in contrast.values]) <= (1 - level) * (1 + 1e-9)


def _size(contrast: Contrast, level: float) -> str:
    if _below(contrast, 0.0, level):
        return "reversed"
    return "smaller than claimed" if _above(contrast, 0.0, level) else "absent"
