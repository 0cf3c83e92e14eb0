"""The job of `wellposed tune`: trainings with and without learning for every seed, finished ones kept, within a budget."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from torch import nn

from ..lab.fingerprint import fingerprint, machine
from ..lab.trial import Setting, Trial
from ..papers.arms import load_arms
from .models import check_model, describe_model
from .seed_job import FinishedJob, SeedJob
from .task import Task
from .tune_options import APPLIED, METHODS, SINGLE, UNTUNED, TuneOptions, check_tune_options
from .tune_plan import Plan
from .tune_training import BATCH, plan_of, rehearse, run_tune_trial

SCALE = "tune"
STEPS = 1000
"""Steps of one training: learning a schedule takes longer than the 450 or so of `wellposed compare`."""

MOST_EPOCHS = 300


@dataclass(kw_only=True)
class FinishedTuning(FinishedJob):
    """Everything that was found, for the result; the rest as in `FinishedJob`.

    Attributes:
        task: the prepared data.
        options: as given.
        plan: what is learned, at its initial values; None for a linear model.
        epochs: of one training.
        model: description of the network.
    """

    task: Task
    options: TuneOptions
    plan: Plan | None
    epochs: int
    model: str


@dataclass
class Prepared:
    """A job whose arguments all fit together.

    Attributes:
        task: the prepared data.
        options: as given.
        plan: what is learned; None for a linear model.
        model: description of the network.
        epochs: of one training.
    """

    task: Task
    options: TuneOptions
    plan: Plan | None
    model: str
    epochs: int


def default_tune_epochs(task: Task) -> int:
    """Epochs for about `STEPS` steps, at least 4 and at most 300."""
    return int(min(MOST_EPOCHS, max(4, round(STEPS * BATCH / task.sizes["train"]))))


def prepare_tuning(task: Task, options: TuneOptions) -> Prepared:
    """Check everything that can be checked without training: options, names, model, and a few steps on a few rows.

    Raises:
        UserError: naming what does not fit, and what is allowed.
    """
    check_tune_options(options)
    if options.chosen.linear:
        from .tune_linear import describe_linear

        return Prepared(task, options, None, describe_linear(task), 0)
    network: nn.Module = check_model(options.model, task)
    model = describe_model(network, task)
    plan = plan_of(task, network, options.learn)
    plan.left_out.update(rehearse(task, options, network))
    return Prepared(task, options, plan, model, options.epochs or default_tune_epochs(task))


def run_tuning(prepared: Prepared, console: Console | None = None) -> FinishedTuning:
    """Train. Finished trainings are kept in the output folder: the same call continues a killed run.

    Args:
        prepared: the job.
        console: where progress goes; standard error by default.

    Raises:
        UserError: if the budget ended before two seeds were done.
    """
    return _Job(prepared, console).run()


class _Job(SeedJob):
    options: TuneOptions

    def __init__(self, prepared: Prepared, console: Console | None) -> None:
        self.prepared, self.task = prepared, prepared.task
        options = prepared.options
        folder = options.output / "data"
        self.task.save(folder)
        trained = "tune_linear" if options.chosen.linear else "tune_training"
        own = [options.model.partition(":")[0]] if options.model else []
        names = {part.name for part in prepared.plan.parts} if prepared.plan else set()
        arms = [arm.factory.partition(":")[0] for arm in load_arms() if arm.factory and arm.name in names]
        self.fingerprint = fingerprint(f"wellposed.compare.{trained}", *own, *arms)
        super().__init__(options, console)
        self.function = partial(
            run_tune_trial, folder=str(folder.resolve()), model=options.model, live=str(self.live.resolve())
        )
        self.notes += prepared.plan.notes if prepared.plan else []

    def run(self) -> FinishedTuning:
        with self.watch:
            seeds, found = self.train_seeds()
        self.store.close()
        whole, outcomes = self.complete(seeds, found, "raise --budget or lower --epochs")
        prepared = self.prepared
        return FinishedTuning(
            task=self.task, options=self.options, plan=prepared.plan, outcomes=outcomes, seeds=whole,
            epochs=prepared.epochs, model=prepared.model, fingerprint=self.fingerprint, commit=self.commit,
            machine=machine(), seconds=time.monotonic() - self.started, notes=[*self.task.notes, *self.notes],
        )  # fmt: skip

    @property
    def arms(self) -> tuple[str, ...]:
        """The initial values, the method, and a third that says what the gain is made of.

        Where the method finds a schedule: its values, fixed from the start; for a linear model: one penalty for all.
        """
        method = self.options.chosen
        third = (APPLIED,) if method.schedule else (SINGLE,) if method.linear else ()
        return (UNTUNED, method.name, *third)

    def trial(self, arm: str, seed: int) -> Trial:
        return self._trial(arm, seed, {})

    def applied(self, seed: int, values: Mapping[str, Any]) -> Trial:
        return self._trial(APPLIED, seed, {"values": json.dumps(values)})

    def _trial(self, arm: str, seed: int, more: Mapping[str, Setting]) -> Trial:
        study = f"{self.task.digest}:{self.options.model or 'default'}"
        settings: dict[str, Setting] = {"learn": ",".join(self.options.learn or ()), "epochs": self.prepared.epochs}
        if self.options.chosen.linear:
            settings["linear"] = True
        if arm in METHODS and METHODS[arm].search:
            settings["trials"] = self.options.trainings
        return Trial(study, arm, SCALE, "evaluate", {**settings, **more}, seed, self.fingerprint)
