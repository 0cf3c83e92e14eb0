"""One trial of `wellposed tune`: train with one seed, learning or not, and measure the network that is kept."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from ..bilevel import BilevelProblem
from ..evaluation import predict
from ..fit import FitResult, fit
from ..indexed_dataset import TensorLoader
from ..lab.trial import Trial, TrialResult
from ..objective import Criterion, cross_entropy, squared_error
from ..step import DivergenceError, Step
from ..tuner import Tuner
from ..tuning import Schedule, Search
from .errors import UserError
from .models import default_model, load_user_model
from .task import Task
from .tune_live import Report
from .tune_methods import Descent, Pace, make_tuner
from .tune_options import APPLIED, METHODS, TuneOptions
from .tune_plan import Plan, choose, leave_out_what_has_no_derivative, make_plan

BATCH, VALIDATION_BATCH = 64, 128


def run_tune_trial(trial: Trial, folder: str, model: str | None = None, live: str | None = None) -> TrialResult:
    """Train and measure; what the laboratory's workers call.

    Args:
        trial: its arm is "untuned", a method, or "applied"; its settings hold `learn` (names with commas), `epochs`, of
            a search `trials`, of applied values `values` (JSON, by label), and `linear` for a method that trains a
            linear model.
        folder: where the prepared task lies.
        model: `module:function` of the user's model, or None for the default.
        live: folder of reports on the training under way.
    """
    task = _task(folder, trial.study)
    method = METHODS.get(trial.arm)
    if (method is not None and method.linear) or trial.settings.get("linear"):
        from .tune_linear import run_linear_trial

        return run_linear_trial(task, trial)
    network = load_user_model(model, task, trial.seed) if model else default_model(task, trial.seed)
    learn = str(trial.settings["learn"])
    plan = plan_of(task, network, learn.split(",") if learn else None)
    if trial.arm == APPLIED:
        plan.set_(json.loads(str(trial.settings["values"])))
    pace = Pace(max(1, math.ceil(task.sizes["train"] / BATCH)), int(trial.settings["epochs"]))
    report = Report(live, f"{trial.arm} {trial.seed}")
    trainings = int(trial.settings.get("trials", 1))
    try:
        training = _Training(
            task, trial.arm, plan, network, task.tensors(trial.seed), pace, trainings, trial.seed, report
        )
        return training.run()
    finally:
        report.end()


def rehearse(task: Task, options: TuneOptions, network: nn.Module) -> dict[str, str]:
    """A few steps of the method on a few rows, so that what cannot work fails now and not in an hour.

    Returns:
        What the method leaves out, and why.

    Raises:
        UserError: naming the method and what it cannot do.
    """
    data = task.tensors(0)
    for part in ("train", "validation"):
        for name in ("inputs", "targets"):
            data[f"{part}_{name}"] = data[f"{part}_{name}"][: 2 * BATCH]
    network = copy.deepcopy(network)
    plan = plan_of(task, network, options.learn)
    pace = Pace(math.ceil(len(data["train_targets"]) / BATCH), 1)
    training = _Training(task, options.method, plan, network, data, pace, 1, 0, Report(None, ""), rehearsal=True)
    try:
        training.fit()
    except UserError:
        raise
    except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        learned = ", ".join(part.name for part in plan.parts)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--method {options.method} cannot learn {learned} with this model: {reason}") from error
    return plan.left_out


class _Training:
    def __init__(
        self,
        task: Task,
        arm: str,
        plan: Plan,
        network: nn.Module,
        data: dict[str, Tensor],
        pace: Pace,
        trainings: int,
        seed: int,
        report: Report,
        rehearsal: bool = False,
    ) -> None:
        self.task, self.arm, self.plan, self.network, self.data = task, arm, plan, network, data
        self.pace, self.trainings, self.seed, self.report = pace, trainings, seed, report
        method = METHODS.get(arm)
        self.searches = method is None or method.search
        self.needs_derivative = method is not None and method.derivative
        self.descent = Descent(pace)
        self.make = make_tuner(arm, plan, pace, self.descent, seed, rehearsal)
        self.curves: dict[str, list[float]] = {}
        self.schedule = Schedule()
        self.schedule.record(0, plan.present())
        self.tuner: Tuner | None = None

    def run(self) -> TrialResult:
        started = time.perf_counter()
        result = self.fit()
        seconds = time.perf_counter() - started
        if isinstance(self.tuner, Search):
            self._curves_of_search(self.tuner)
        data = self.data
        metrics = {
            **measure(self.task, result.model, data, "validation"),
            **measure(self.task, result.model, data, "test"),
            "train_seconds": seconds,
            "trainings": float(self.trainings),
            "kept": self._kept(),
        }
        if not np.isfinite(list(metrics.values())).all():
            raise DivergenceError(f"{self.arm}: a metric of the trained model is not finite: {metrics}")
        artifacts = {
            "values": self.plan.values(),
            "schedule": None if self.searches else self.schedule.to_json(),
            "left_out": self.plan.left_out,
        }
        return TrialResult(metrics, self.curves, artifacts)

    def fit(self) -> FitResult:
        """Train to the end."""
        data, seed = self.data, self.seed
        return fit(
            self.network,
            TensorLoader(data["train_inputs"], data["train_targets"], batch_size=BATCH, shuffle=True, seed=seed),
            validation=TensorLoader(
                data["validation_inputs"],
                data["validation_targets"],
                batch_size=VALIDATION_BATCH,
                shuffle=True,
                seed=seed,
            ),
            epochs=self.pace.epochs * self.trainings,
            regularizer=self.plan.method,
            criterion=criterion_of(self.task),
            tuner=self._make_tuner,
            # A search keeps its best checkpoint itself; the others keep their best epoch here, by the same measure.
            early_stopping=None if self.searches else self.pace.epochs,
            seed=seed,
            on_epoch_end=self._on_epoch_end,
        )

    def _make_tuner(self, problem: BilevelProblem) -> Tuner:
        if self.needs_derivative:
            rows = slice(0, 2 * BATCH)
            sample = (self.data["train_inputs"][rows], self.data["train_targets"][rows])
            index = torch.arange(len(sample[0]))
            leave_out_what_has_no_derivative(self.plan, problem, (*sample, index))
        self.tuner = self.make(problem)
        if not self.searches:
            self.descent.begin_epoch(0)
        return self.tuner

    def _on_epoch_end(self, step: Step, entry: dict[str, float]) -> None:
        """Lower the learning rate, remember the values, and tell the live table."""
        assert self.tuner is not None
        epoch = int(entry["epoch"])
        if not self.searches:
            self.descent.begin_epoch(epoch)
            self.schedule.record(epoch * self.pace.steps_per_epoch, self.plan.present())
            self.curves.setdefault("epoch", []).append(float(epoch))
            self.curves.setdefault("validation loss", []).append(entry["validation_loss"])
            for label, value in self.plan.values().items():
                self.curves.setdefault(label, []).append(value)
        self.report.write(
            step=epoch * self.pace.steps_per_epoch,
            steps=self.pace.steps * self.trainings,
            loss=entry["validation_loss"],
            values=self.plan.values(),
        )

    def _curves_of_search(self, tuner: Search) -> None:
        """Of a search: the epochs of its first training, or one point for each training."""
        if self.trainings == 1:
            losses = tuner.trials[0].losses
            self.curves = {
                "epoch": [steps / self.pace.steps_per_epoch for steps, _ in losses],
                "validation loss": [loss for _, loss in losses],
            }
            return
        self.curves = {"training": [], "validation loss": []}
        for one in tuner.trials:
            if one.losses and one.status == "finished":
                self.curves["training"].append(float(one.number + 1))
                self.curves["validation loss"].append(one.loss)
                for name, value in one.values.items():
                    strength = self.plan.strength_of(tuner.problem.hypers[name])
                    for label, entry in zip(strength.labels, value.reshape(-1).tolist(), strict=True):
                        self.curves.setdefault(label, []).append(entry)

    def _kept(self) -> float:
        """The epoch whose weights are kept, or the training."""
        if isinstance(self.tuner, Search) and self.trainings > 1:
            assert self.tuner.best is not None
            return float(self.tuner.best.number + 1)
        losses = self.curves["validation loss"]
        return self.curves["epoch"][int(np.argmin(losses))]


def plan_of(task: Task, network: nn.Module, learn: Sequence[str] | None) -> Plan:
    """The plan for a network: strengths by name, or the usual ones."""
    return make_plan(choose(learn, task), network, task)


def criterion_of(task: Task) -> Criterion:
    """The unreduced task loss."""
    return cross_entropy if task.kind == "classification" else squared_error


def measure(task: Task, model: nn.Module, data: dict[str, Tensor], part: str) -> dict[str, float]:
    """Score in points and mean task loss of a network on one part of the data."""
    outputs, targets = predict(model, TensorLoader(data[f"{part}_inputs"], data[f"{part}_targets"], batch_size=1024))
    loss = float(criterion_of(task)(outputs, targets).mean())
    return {part: task.score(outputs, targets), f"{part}_loss": loss}


@cache
def _task(folder: str, study: str) -> Task:
    # The study names the data: another data set in the same folder must not be taken for them.
    return Task.load(folder)
