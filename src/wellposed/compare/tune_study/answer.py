"""What may be said of a tuned arm: paired differences to the registered defaults and to the ledger's settings."""

from __future__ import annotations

import statistics as plain
from dataclasses import dataclass

from ...lab.statistics import direction, mean_interval, paired_interval
from ...lab.study_words import decimals_for
from ..ranking import capital
from ..tune_options import APPLIED
from ..tune_words import LEVEL, gap_words, mean_words, ratio, time_ratio, too_few
from .job import LEDGER
from .result import StudyTuneResult, TriedArm


@dataclass
class Line:
    """One arm in the table.

    Attributes:
        label: of the arm.
        mean: with half the width of its interval.
        gap: difference to the registered defaults with its interval; empty for themselves.
        verdict: +1 where the arm is better beyond noise, -1 where it is worse, else 0.
        time: median wall time of a training, and its ratio to the defaults.
    """

    label: str
    mean: str
    gap: str
    verdict: int
    time: str


@dataclass
class StudyAnswer:
    """The answer, and the numbers behind it.

    Attributes:
        sentence: the answer in words.
        lines: one an arm.
        helps: whether the method beat the registered defaults.
        values_help: whether its settings, fixed from the start, did.
        decimals: of the metric.
    """

    sentence: str
    lines: list[Line]
    helps: bool
    values_help: bool
    decimals: int


def answer_study(result: StudyTuneResult) -> StudyAnswer:
    """Compare the arms, seed by seed, and say what may be said."""
    gaps = [paired_interval(arm.scores, result.untuned.scores, LEVEL) for arm in result.arms[1:]]
    halves = [gap.half_width for gap in gaps if gap.half_width > 0]
    decimals = decimals_for(plain.median(halves) if halves else 0.0, abs(plain.fmean(result.untuned.scores)))
    words = _Words(result, decimals)
    lines = [words.line(arm) for arm in result.arms]
    verdicts = {arm.name: words.verdict(arm, result.untuned) for arm in result.arms[1:]}
    helps = verdicts[result.method] > 0
    values_help = verdicts.get(APPLIED, verdicts[result.method]) > 0
    return StudyAnswer(words.sentence(verdicts), lines, helps, values_help, decimals)


class _Words:
    def __init__(self, result: StudyTuneResult, decimals: int) -> None:
        self.result, self.decimals = result, decimals
        self.unit = f" {result.unit}" if result.unit else ""

    def line(self, arm: TriedArm) -> Line:
        first, shown = self.result.untuned, mean_words(mean_interval(arm.scores, LEVEL), self.decimals)
        if arm is first:
            return Line(arm.label, shown, "", 0, self.time(arm))
        return Line(arm.label, shown, self.gap(arm, first), self.verdict(arm, first), self.time(arm))

    def time(self, arm: TriedArm) -> str:
        known = [s for s in arm.seconds if s is not None]
        if not known:
            return "–"
        took = f"{plain.median(known):.2g} s"
        return took if arm is self.result.untuned else f"{took} {self.price(arm)}".rstrip()

    def price(self, arm: TriedArm) -> str:
        """Median ratio of wall times to the defaults."""
        found = time_ratio(self.result.untuned.seconds, arm.seconds)
        return "" if found is None else f"{ratio(found)}×"

    def verdict(self, arm: TriedArm, other: TriedArm) -> int:
        better = -1 if self.result.lower_is_better else 1
        return better * direction([a - b for a, b in zip(arm.scores, other.scores, strict=True)], LEVEL)

    def gap(self, arm: TriedArm, other: TriedArm) -> str:
        return gap_words(paired_interval(arm.scores, other.scores, LEVEL), self.decimals)

    def sentence(self, verdicts: dict[str, int]) -> str:
        result, method, first = self.result, capital(self.result.method_label), self.result.untuned
        if result.history and result.tuned.settings == first.settings:
            count = len(result.history)
            return (
                f"Of {count} configurations none scored higher on the tuning seeds than the registered defaults. Keep them."
            ) + self.against_ledger()
        gap = f"{result.words} {self.gap(result.tuned, first)}{self.unit} against the registered defaults"
        if few := too_few(len(result.seeds), gap, "registered defaults"):
            return few
        verdict = verdicts[result.method]
        if verdict > 0:
            text = f"{method} improves {result.arm_label}: {gap}, {self.spent()}."
        elif verdict < 0:
            text = f"{method} makes {result.arm_label} worse: {gap}. Keep the registered defaults."
        else:
            text = f"{method} gains nothing beyond noise: {gap}. Keep the registered defaults."
        return text + self.against_ledger() + self.applied(verdicts.get(APPLIED))

    def spent(self) -> str:
        """What the settings cost to find."""
        result = self.result
        if result.history:
            return f"found by {len(result.history) * result.tuning_seeds} trainings on tuning seeds"
        price = self.price(result.tuned)
        return f"in one training and {price.rstrip('×')} times the wall time" if price else "in one training"

    def against_ledger(self) -> str:
        kept = self.result.find(LEDGER)
        if kept is None:
            return ""
        found = {1: "better", -1: "worse", 0: "no difference beyond noise"}[self.verdict(self.result.tuned, kept)]
        return (
            f" Against the ledger's settings, the best of {self.result.ledger_rounds} configurations: "
            f"{self.gap(self.result.tuned, kept)}{self.unit}, {found}."
        )

    def applied(self, verdict: int | None) -> str:
        fixed = self.result.find(APPLIED)
        if fixed is None or verdict is None:
            return ""
        end = {1: "help, too", -1: "make it worse", 0: "gain nothing beyond noise"}[verdict]
        if verdict > 0 and self.verdict(self.result.tuned, self.result.untuned) <= 0:
            end = "do help"
        return f" Its last values, fixed from the start, {end}: {self.gap(fixed, self.result.untuned)}{self.unit}."
