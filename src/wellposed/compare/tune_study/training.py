"""One trial of `wellposed tune STUDY`: the study's own, or the same training under a method that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...bilevel import BilevelProblem
from ...compose import Compose
from ...evaluation import predict
from ...fit import FitResult, fit
from ...lab.trial import Trial, TrialResult
from ...lab.tune_problem import TuneProblem
from ...step import DivergenceError, Step
from ...tuner import Tuner
from ...tuning import Schedule
from ..tune_live import Report
from ..tune_methods import Descent, Pace, make_tuner
from ..tune_options import METHODS
from ..tune_parts import Part, Strength
from ..tune_plan import Plan, leave_out_what_has_no_derivative

SCALE = "laptop"
"""Of the study's own trials: they are those of `wellposed run`."""

LEARNING = "tune-"
"""Before the name of the method, the scale of trials that learn."""

HEADLINE = "headline"
"""Metric under which a training that learns reports the study's own."""


def run_study_trial(
    trial: Trial,
    run: Callable[[Trial], TrialResult],
    offer: Callable[[Trial], TuneProblem] | None,
    live: str | None = None,
    titles: Mapping[str, str] | None = None,
) -> TrialResult:
    """Train and measure; what the laboratory's workers call.

    Args:
        trial: of the study; its scale says whether a method learns.
        run: the study's function.
        offer: the study's offer, for trials that learn.
        live: folder of reports on the training under way.
        titles: of trials by key, as the live table shows them.
    """
    report = Report(live, (titles or {}).get(trial.key, trial.arm))
    try:
        if trial.scale.startswith(LEARNING):
            assert offer is not None
            return Learning(offer(trial), trial.scale.removeprefix(LEARNING), trial.seed, report).run()
        report.write(None, None, None, {name: float(v) for name, v in trial.settings.items() if is_number(v)})
        return run(trial)
    finally:
        report.end()


@dataclass
class StudyPace(Pace):
    """How long a study's training is, under the study's own learning rates.

    Attributes:
        recipe: the learning rate's factor at a share of training.
    """

    recipe: Callable[[float], float]

    def factor(self, epoch: int) -> float:
        """The learning rate's factor in an epoch."""
        return self.recipe(min(epoch, self.epochs - 1) / self.epochs)


class Learning:
    """A study's training under a method that learns; as in the study, the last epoch is kept.

    Args:
        problem: the study's.
        method: its name.
        seed: of the loop and of the method.
        report: where it says how far it is.
        rehearsal: whether every kind of step must come within the first batches.
    """

    def __init__(self, problem: TuneProblem, method: str, seed: int, report: Report, rehearsal: bool = False) -> None:
        self.problem, self.method, self.seed, self.report = problem, method, seed, report
        self.plan = plan_of(problem)
        self.pace = StudyPace(len(problem.train), problem.epochs, problem.factor)
        self.descent = Descent(self.pace, problem.optimizer)
        self.make = make_tuner(method, self.plan, self.pace, self.descent, seed, rehearsal)
        self.curves: dict[str, list[float]] = {"epoch": [], "validation loss": []}
        self.schedule = Schedule()
        self.schedule.record(0, self.plan.present())

    def run(self) -> TrialResult:
        """Train, and measure on the test data."""
        result = self.fit()
        headline = self.problem.metric(*predict(result.model, self.problem.test))
        metrics = {HEADLINE: headline, "validation_loss": self.curves["validation loss"][-1]}
        if not all(math.isfinite(value) for value in metrics.values()):
            raise DivergenceError(f"{self.method}: a metric of the trained network is not finite: {metrics}")
        artifacts = {
            "values": self.plan.values(), "schedule": self.schedule.to_json(), "left_out": self.plan.left_out,
        }  # fmt: skip
        return TrialResult(metrics, self.curves, artifacts)

    def fit(self) -> FitResult:
        """Train to the end."""
        problem = self.problem
        return fit(
            problem.model,
            problem.train,
            validation=problem.validation,
            epochs=problem.epochs,
            regularizer=self.plan.method,
            criterion=problem.criterion,
            tuner=self._make_tuner,
            seed=self.seed,
            on_epoch_end=self._on_epoch_end,
        )

    def _make_tuner(self, bilevel: BilevelProblem) -> Tuner:
        if METHODS[self.method].derivative:
            batch = next(iter(self.problem.train))
            sample = tuple(part for part in (batch.inputs, batch.targets, batch.index) if part is not None)
            leave_out_what_has_no_derivative(self.plan, bilevel, sample)
        tuner = self.make(bilevel)
        self.descent.begin_epoch(0)
        return tuner

    def _on_epoch_end(self, step: Step, entry: dict[str, float]) -> None:
        epoch = int(entry["epoch"])
        self.descent.begin_epoch(epoch)
        done = epoch * self.pace.steps_per_epoch
        self.schedule.record(done, self.plan.present())
        self.curves["epoch"].append(float(epoch))
        self.curves["validation loss"].append(entry["validation_loss"])
        values = self.plan.values()
        for label, value in values.items():
            self.curves.setdefault(label, []).append(value)
        self.report.write(done, self.pace.steps, entry["validation_loss"], values)


def plan_of(problem: TuneProblem) -> Plan:
    """A problem's strengths under the names of their settings."""
    strengths = [Strength(name, h, (h.low, h.high, h.chart == "exp")) for name, h in problem.strengths.items()]
    return Plan([Part("study", Compose(problem.regularizer), strengths, "", lambda code: "")])


def is_number(value: Any) -> bool:
    """Whether a setting is a number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
