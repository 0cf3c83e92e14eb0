"""What may be said of what was learned: paired differences with intervals, and the sentence that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..lab.statistics import Interval, direction, mean_interval, paired_interval
from .ranking import capital, signed
from .tune_options import APPLIED
from .tune_result import TuneArm, TuneResult
from .tune_words import LEVEL, gap_words, mean_words, ratio, time_ratio, too_few


@dataclass
class Contrast:
    """One measure of an arm against the initial values.

    Attributes:
        label: of the measure.
        untuned, tuned: mean of the initial values and of the arm, with intervals.
        difference: the arm minus the initial values, paired by seed.
        verdict: +1 where the arm is better beyond noise, -1 where it is worse, else 0.
        decimals: that the numbers deserve.
    """

    label: str
    untuned: Interval
    tuned: Interval
    difference: Interval
    verdict: int
    decimals: int

    def number(self, value: float) -> str:
        """A value of the measure."""
        return f"{value:.{self.decimals}f}"

    def mean(self, interval: Interval) -> str:
        """A mean with half the width of its interval."""
        return mean_words(interval, self.decimals)

    @property
    def gap(self) -> str:
        """The difference with its interval."""
        return gap_words(self.difference, self.decimals)

    def signed(self, value: float) -> str:
        """A difference with its sign."""
        return signed(value, self.decimals)


@dataclass
class Answer:
    """The answer, and the numbers behind it.

    Attributes:
        score, loss: contrasts on the test set.
        time: median ratio of wall times; None where unknown.
        sentence: the answer in words.
        third: contrasts of the arm that says what the gain is made of; empty where there is none.
        applied: whether that arm is the learned values, fixed from the start.
        outdone: whether that arm is a simpler method, and does better than this one beyond noise.
    """

    score: Contrast
    loss: Contrast
    time: float | None
    sentence: str
    third: list[Contrast]
    applied: bool
    outdone: bool = False

    @property
    def helps(self) -> bool:
        """Whether learning was worth it."""
        return _helps(self.score, self.loss) and not self.outdone

    @property
    def values_help(self) -> bool:
        """Whether copying the learned values is worth it."""
        return _helps(*self.third) if self.applied else self.helps


def answer(result: TuneResult) -> Answer:
    """Compare the arms, seed by seed, and say what may be said."""
    old, new, arm = result.untuned, result.tuned, result.third
    score, loss = _contrasts(result, new)
    third = [] if arm is None else _contrasts(result, arm)
    for one, other in zip((score, loss), third, strict=False):  # side by side, they have as many decimals
        one.decimals = other.decimals = min(one.decimals, other.decimals)
    applied = arm is not None and arm.name == APPLIED
    time = time_ratio(old.seconds, new.seconds)
    made_of, outdone = "", False
    if arm is not None and applied:
        made_of = _fixed(third)
    elif arm is not None:
        made_of, outdone = _against_single(score.label, new, arm)
    sentence = _sentence(result, score, loss, time, made_of)
    return Answer(score, loss, time, sentence, third, applied, outdone)


def _contrasts(result: TuneResult, arm: TuneArm) -> list[Contrast]:
    metric = "R² × 100" if result.kind == "regression" else result.metric
    old = result.untuned
    return [
        _contrast(metric, old.scores, arm.scores, +1, 1),
        _contrast(result.loss_name, old.losses, arm.losses, -1, 4),
    ]


def _helps(score: Contrast, loss: Contrast) -> bool:
    return score.verdict >= 0 and max(score.verdict, loss.verdict) > 0


def _contrast(label: str, old: Sequence[float], new: Sequence[float], better: int, decimals: int) -> Contrast:
    difference = paired_interval(new, old, LEVEL)
    gaps = [b - a for a, b in zip(old, new, strict=True)]
    if decimals > 1:
        # One or two digits of the interval: a loss may be 0.01 or 10.
        while decimals > 1 and difference.half_width >= 10 ** (1 - decimals):
            decimals -= 1
    elif difference.half_width < 0.15:
        decimals = 2
    return Contrast(
        label, mean_interval(old), mean_interval(new), difference, better * direction(gaps, LEVEL), decimals
    )


def _sentence(result: TuneResult, score: Contrast, loss: Contrast, time: float | None, made_of: str) -> str:
    name, measure = capital(result.tuned.label), capital(score.label)
    unit = "points" if result.kind == "regression" else f"points of {result.metric}"
    gaps = f"{score.label} {score.gap}, {loss.label} {loss.gap}"
    if few := too_few(len(result.seeds), gaps, "initial values"):
        return few
    change = f"{score.signed(score.difference.estimate)} {unit}"
    interval = f"(95 % interval {score.signed(score.difference.low)} to {score.signed(score.difference.high)})"
    price = _price(result.tuned, time)
    fall = _fall(loss)
    more = f" {capital(fall)}." if loss.verdict else ""
    if score.verdict < 0:
        return f"{name} makes it worse: {change} against the initial values {interval}. Keep the initial values.{more}"
    if score.verdict > 0:
        return f"{name} helps: {change} over the initial values {interval}, {price}.{more}{made_of}"
    if loss.verdict > 0:
        return f"{name} helps a little: {fall}, {price}. {measure} does not change beyond noise ({score.gap}).{made_of}"
    if loss.verdict < 0:
        return (
            f"{name} makes it worse: {fall}. {measure} does not change beyond noise ({score.gap}). Keep the initial "
            "values."
        )
    return f"Nothing is gained here beyond noise: {gaps}. Keep the initial values."


def _fall(loss: Contrast) -> str:
    return (
        f"{loss.label} {'falls' if loss.difference.estimate < 0 else 'rises'} from {loss.number(loss.untuned.estimate)} to "
        f"{loss.number(loss.tuned.estimate)} (difference {loss.gap})"
    )


def _fixed(applied: Sequence[Contrast]) -> str:
    """What copying the numbers is worth."""
    score, loss = applied
    what = f"{score.label} {score.gap}, {loss.label} {loss.gap}"
    if _helps(score, loss):
        return f" Its values, fixed from the start of a plain training, help too: {what}."
    if min(score.verdict, loss.verdict) < 0:
        return f" Its values, fixed from the start of a plain training, do not help: {what}."
    return f" Its values, fixed from the start of a plain training, gain nothing beyond noise: {what}."


def _against_single(label: str, each: TuneArm, single: TuneArm) -> tuple[str, bool]:
    """What one penalty for each feature adds to one for all, and whether one for all is better."""
    contrast = _contrast(label, single.scores, each.scores, +1, 1)
    gap = f"{label} {contrast.gap}"
    if contrast.verdict < 0:
        return (
            f" But one learned penalty for all features does better: a penalty for each gives {gap} against it. Take one for all.",
            True,
        )
    if contrast.verdict > 0:
        return f" A penalty for each feature is better than one learned for all: {gap}.", False
    return f" Against one learned penalty for all features it gains nothing beyond noise: {gap}.", False


def _price(arm: TuneArm, time: float | None) -> str:
    trainings = "one training" if arm.trainings == 1 else f"{arm.trainings} trainings"
    if time is None:
        return f"in {trainings}"
    return f"in {trainings} and {ratio(time)} times the wall time"
