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

VISIBLE = 1.1
"""A ratio of time or memory below this is no visible cost: trials that run side by side differ by as much."""


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
        rows: best mean first.
        reference: name of the reference arm.
        level: of each difference, so that all of them hold together at 95 %.
        seeds: number of seeds.
        tied: names of the arms that are within noise of the winner, best first; none that failed on a seed.
        sentence: the answer in words.
        decimals: that the scores deserve: two where their intervals are narrower than 0.15 points, else one.
    """

    rows: list[Row]
    reference: str
    level: float
    seeds: int
    tied: list[str]
    sentence: str
    decimals: int = 1

    @property
    def baseline(self) -> Row:
        """The row of the reference."""
        return next(row for row in self.rows if row.group == "reference")

    @property
    def winner(self) -> Row:
        """The best arm that beats the reference beyond noise, or the reference itself."""
        return next((row for row in self.rows if row.group == "better"), self.baseline)

    @property
    def shortage(self) -> str:
        """Why no direction could be claimed whatever the scores; empty where there are seeds enough."""
        enough = smallest_n(self.level)
        if self.seeds >= enough:
            return ""
        return f"{self.seeds} seeds cannot show a difference between {len(self.rows)} arms; {enough} or more can."


def rank(arms: Sequence[ArmRuns], reference: str, unit: str = "points") -> Ranking:
    """Rank arms by their mean score; compare each with the reference, paired by seed.

    A direction is claimed only if the Student interval and the exact sign-flip test agree, each at the level at
    which all comparisons hold together at 95 % (Bonferroni). The winner is compared with every other arm in the same
    way: those that cannot be told from it are `tied`.

    Args:
        arms: at least two, one of them the reference, with equally many scores.
        reference: name of the arm to beat.
        unit: of the scores, for the sentence.

    Raises:
        ValueError: if there are fewer than two arms, the reference is missing, or numbers of seeds differ.

    Example:
        >>> base = ArmRuns("base", "base", [1.0, 2.0, 3.0], [1.0] * 3, [None] * 3)
        >>> rank([base, ArmRuns("a", "a", [1.1, 2.1, 3.2], [2.0] * 3, [None] * 3)], "base").rows[0].time
        2.0
    """
    base = next((arm for arm in arms if arm.name == reference), None)
    if base is None:
        raise ValueError(f"rank: no arm is called {reference!r}, there are {[arm.name for arm in arms]}")
    if len(arms) < 2:
        raise ValueError(f"rank: needs at least two arms, got {len(arms)}")
    if len({len(arm.scores) for arm in arms}) != 1:
        counts = {arm.name: len(arm.scores) for arm in arms}
        raise ValueError(f"rank: every arm must have the same number of seeds, got {counts}")
    level = simultaneous_level(len(arms) - 1)
    ordered = sorted(arms, key=lambda arm: -plain.fmean(arm.scores))
    rows = [_row(number, arm, base, level) for number, arm in enumerate(ordered, 1)]
    ranking = Ranking(rows, reference, level, len(base.scores), [], "", _decimals(rows))
    best = next(arm for arm in arms if arm.name == ranking.winner.name)
    ranking.tied = [
        arm.name
        for arm in ordered
        # Seeds that failed make an arm's interval so wide that it would seem level with anything.
        if arm.name not in (best.name, reference) and not arm.failures and direction(_gaps(best, arm), level) == 0
    ]
    ranking.sentence = _sentence(ranking, unit)
    return ranking


def _row(number: int, arm: ArmRuns, base: ArmRuns, level: float) -> Row:
    groups: dict[int, Group] = {1: "better", 0: "within noise", -1: "worse"}
    gaps = _gaps(arm, base)
    own = arm is base
    return Row(
        rank=number,
        name=arm.name,
        label=arm.label,
        mean=mean_interval(arm.scores),
        difference=None if own else paired_interval(arm.scores, base.scores, level),
        p=None if own else sign_flip_p(gaps),
        group="reference" if own else groups[direction(gaps, level)],
        time=_ratio(arm.seconds, base.seconds),
        memory=_ratio(arm.memory, base.memory),
        failures=len(arm.failures),
    )


def _gaps(a: ArmRuns, b: ArmRuns) -> list[float]:
    return [x - y for x, y in zip(a.scores, b.scores, strict=True)]


def _ratio(own: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """Median of the ratios of the seeds that both arms finished."""
    ratios = [a / b for a, b in zip(own, base, strict=True) if a is not None and b]
    return plain.median(ratios) if ratios else None


def _decimals(rows: Sequence[Row]) -> int:
    return 2 if plain.median(row.mean.half_width for row in rows) < 0.15 else 1


def _sentence(ranking: Ranking, unit: str) -> str:
    rows = {row.name: row for row in ranking.rows}
    reference, winner, gap = ranking.baseline.label, ranking.winner, ranking.winner.difference
    if gap is None:
        first = next(row for row in ranking.rows if row.difference is not None)
        gap = first.difference
        assert gap is not None
        numbers = [signed(x, ranking.decimals) for x in (gap.estimate, gap.low, gap.high)]
        best = f"(best: {first.label} {numbers[0]}, interval {numbers[1]} to {numbers[2]})"
        if ranking.shortage:
            return f"{ranking.shortage[:-1]} {best}. Until then, keep {reference}."
        return f"Nothing here beats {reference} on this data beyond noise {best}. Keep {reference}."
    compared = len(ranking.rows) - 1
    together = f", all {compared} comparisons together" if compared > 1 else ""
    low, high = (f"{x:.{ranking.decimals}f}" for x in (gap.low, gap.high))
    text = capital(
        f"{winner.label} helps: {signed(gap.estimate, ranking.decimals)} {unit} over {reference} (95 % interval "
        f"{low} to {high}{together}), {price(winner)}."
    )
    tied = [rows[name].label for name in ranking.tied]
    if tied:
        text += f" {capital(_listed(tied))} {'is' if len(tied) == 1 else 'are'} within noise of it."
    return text


def signed(value: float, decimals: int = 1) -> str:
    """A difference with its sign, and no minus before what rounds to zero.

    Example:
        >>> signed(1.84), signed(-0.02), signed(-0.02, 2)
        ('+1.8', '+0.0', '-0.02')
    """
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


def capital(text: str) -> str:
    """A text that begins a sentence."""
    return text[:1].upper() + text[1:]


def price(row: Row) -> str:
    """What an arm costs beside the reference, in words.

    Example:
        >>> interval = Interval(0.0, 0.0, 0.0, 0.95)
        >>> price(Row(1, "a", "a", interval, None, None, "better", time=2.04, memory=1.0, failures=0))
        'at 2.0 times the training time'
    """
    if row.time is None:
        return "at a cost that was not measured"
    seen = [f"{row.time:.1f} times the training time"] if row.time >= VISIBLE else []
    if row.memory is not None and row.memory >= VISIBLE:
        seen.append(f"{row.memory:.1f} times the memory")
    return f"at {' and '.join(seen)}" if seen else "at no visible cost"


def _listed(names: Sequence[str], most: int = 3) -> str:
    """ "a", "a and b", "a, b and c", "a, b and 3 others"."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
