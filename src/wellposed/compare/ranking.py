"""From scores by arm and seed to a ranking with intervals, and to the sentence that answers the question."""

from __future__ import annotations

import statistics as plain
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..lab.statistics import (
    Interval,
    direction,
    mean_interval,
    paired_interval,
    sign_flip_p,
    simultaneous_level,
    smallest_n,
)

Group = Literal["better", "reference", "within noise", "worse"]


@dataclass
class ArmRuns:
    """What one arm scored.

    Attributes:
        name, label: as in the catalogue.
        scores: test score of each seed, in points; higher is better.
        seconds: training time of each seed, or None where the run failed.
        memory: peak memory of each seed in bytes, or None.
        failures: seeds that diverged or failed, counted at the worst score.
    """

    name: str
    label: str
    scores: list[float]
    seconds: list[float | None]
    memory: list[int | None]
    failures: list[int] = field(default_factory=list)


@dataclass
class Row:
    """One line of the ranking.

    Attributes:
        rank: from 1.
        name, label: of the arm.
        mean: interval of its mean score, at 95 %.
        difference: interval of its paired difference to the reference at the simultaneous level; None for itself.
        p: exact sign-flip p value of that difference.
        group: what may be said of it.
        time, memory: median ratio to the reference; None where unknown.
        failures: seeds that diverged or failed.
    """

    rank: int
    name: str
    label: str
    mean: Interval
    difference: Interval | None
    p: float | None
    group: Group
    time: float | None
    memory: float | None
    failures: int


@dataclass
class Ranking:
    """The answer.

    Attributes:
        rows: best first.
        reference: name of the reference arm.
        level: of each difference, so that all of them hold together at 95 %.
        seeds: number of seeds.
        tied: names of the arms that are within noise of the winner.
        sentence: the answer in words.
    """

    rows: list[Row]
    reference: str
    level: float
    seeds: int
    tied: list[str]
    sentence: str

    @property
    def winner(self) -> Row:
        """The best arm that beats the reference beyond noise, or the reference itself."""
        reference = next(row for row in self.rows if row.group == "reference")
        return next((row for row in self.rows if row.group == "better"), reference)


def rank(arms: Sequence[ArmRuns], reference: str, unit: str = "points") -> Ranking:
    """Rank arms by their mean score; compare each with the reference, paired by seed.

    A direction is claimed only if the Student interval and the exact sign-flip test agree, each at the level at
    which all comparisons hold together at 95 % (Bonferroni).

    Args:
        arms: at least two, one of them the reference, with equally many scores.
        reference: name of the arm to beat.
        unit: of the scores, for the sentence.

    Raises:
        ValueError: if the reference is missing or numbers of seeds differ.

    Example:
        >>> base = ArmRuns("base", "base", [1.0, 2.0, 3.0], [1.0] * 3, [None] * 3)
        >>> rank([base, ArmRuns("a", "a", [1.1, 2.1, 3.2], [2.0] * 3, [None] * 3)], "base").rows[0].time
        2.0
    """
    base = next((arm for arm in arms if arm.name == reference), None)
    if base is None:
        raise ValueError(f"rank: no arm is called {reference!r}")
    if len({len(arm.scores) for arm in arms}) != 1:
        raise ValueError("rank: every arm must have the same number of seeds")
    level = simultaneous_level(len(arms) - 1)
    rows = [_row(arm, base, level) for arm in sorted(arms, key=lambda a: -plain.fmean(a.scores))]
    for number, row in enumerate(rows, 1):
        row.rank = number
    ranking = Ranking(rows, reference, level, len(base.scores), [], "")
    best = next(arm for arm in arms if arm.name == ranking.winner.name)
    for arm in arms:
        if arm.name not in (best.name, reference):
            gap = [x - y for x, y in zip(best.scores, arm.scores, strict=True)]
            if direction(gap, level) == 0:
                ranking.tied.append(arm.name)
    ranking.sentence = _sentence(ranking, unit)
    return ranking


def _row(arm: ArmRuns, base: ArmRuns, level: float) -> Row:
    mean = mean_interval(arm.scores)
    if arm is base:
        return Row(
            0,
            arm.name,
            arm.label,
            mean,
            None,
            None,
            "reference",
            1.0,
            _ratio(arm.memory, base.memory),
            len(arm.failures),
        )
    gaps = [x - y for x, y in zip(arm.scores, base.scores, strict=True)]
    groups: dict[int, Group] = {1: "better", 0: "within noise", -1: "worse"}
    return Row(
        0, arm.name, arm.label, mean, paired_interval(arm.scores, base.scores, level), sign_flip_p(gaps),
        groups[direction(gaps, level)], _ratio(arm.seconds, base.seconds), _ratio(arm.memory, base.memory), len(arm.failures),
    )  # fmt: skip


def _ratio(own: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    ratios = [a / b for a, b in zip(own, base, strict=True) if a is not None and b]
    return plain.median(ratios) if ratios else None


def _sentence(ranking: Ranking, unit: str) -> str:
    rows = {row.name: row for row in ranking.rows}
    reference = rows[ranking.reference].label
    winner = ranking.winner
    others = [row for row in ranking.rows if row.difference is not None]
    if winner.difference is None:
        enough = smallest_n(ranking.level)
        if ranking.seeds < enough:
            return (
                f"{ranking.seeds} seeds cannot show a difference between {len(ranking.rows)} arms ({enough} can); "
                f"until then, keep {reference}."
            )
        best = others[0]
        gap = best.difference
        assert gap is not None
        return (
            f"Nothing here beats {reference} on this data beyond noise (best: {best.label} {gap.estimate:+.1f}, "
            f"interval {gap.low:+.1f} to {gap.high:+.1f}). Keep {reference}."
        )
    gap = winner.difference
    text = (
        f"{winner.label} helps: {gap.estimate:+.1f} {unit} over {reference} (interval {gap.low:+.1f} to {gap.high:+.1f}; "
        f"all {len(others)} comparisons hold together at 95 %), {_price(winner)}."
    )
    tied = [rows[name].label for name in ranking.tied]
    if tied:
        text += f" {_listed(tied)} {'is' if len(tied) == 1 else 'are'} within noise of it."
    return text


def _price(row: Row) -> str:
    if row.time is None:
        return "at a cost that was not measured"
    if row.time < 1.1:
        return "at no visible cost in time"
    return f"at {row.time:.1f} times the training time"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
