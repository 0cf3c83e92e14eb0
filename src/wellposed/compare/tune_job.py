"""The job of `wellposed tune`: trainings with and without learning for every seed, finished ones kept, within a budget."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from torch import nn

from ..lab.fingerprint import commit_of, fingerprint, machine
from ..lab.runner import run_trials
from ..lab.store import Store
from ..lab.trial import FIRST_EVALUATION_SEED, Outcome, Setting, Trial
from ..lab.tuning import seconds_left
from ..papers.arms import load_arms
from .comparison import EFFICIENCY
from .errors import UserError
from .models import check_model, describe_model
from .task import Task
from .tune_live import TuneWatch
from .tune_options import APPLIED, METHODS, SINGLE, UNTUNED, TuneOptions, check_tune_options
from .tune_plan import Plan
from .tune_training import BATCH, plan_of, rehearse, run_tune_trial

SCALE = "tune"
STEPS = 1000
"""Steps of one training: learning a schedule takes longer than the 450 or so of `wellposed compare`."""

MOST_EPOCHS = 300
FEWEST_SEEDS = 2


@dataclass
class FinishedTuning:
    """Everything that was found, for the result.

    Attributes:
        task: the prepared data.
        options: as given.
        plan: what is learned, at its initial values; None for a linear model.
        outcomes: arm -> seed -> outcome.
        seeds: those that all arms finished.
        epochs: of one training.
        model: description of the network.
        fingerprint, commit, machine, seconds: for the record.
        notes: what a reader must know.
    """

    task: Task
    options: TuneOptions
    plan: Plan | None
    outcomes: dict[str, dict[int, Outcome]]
    seeds: list[int]
    epochs: int
    model: str
    fingerprint: str
    commit: str | None
    machine: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)


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


class _Job:
    def __init__(self, prepared: Prepared, console: Console | None) -> None:
        self.prepared, self.console = prepared, console
        self.task, self.options = prepared.task, prepared.options
        options = self.options
        options.output.mkdir(parents=True, exist_ok=True)
        folder = options.output / "data"
        self.task.save(folder)
        self.live = options.output / "live"
        self.store = Store(options.output / "trials.sqlite")
        trained = "tune_linear" if options.chosen.linear else "tune_training"
        own = [options.model.partition(":")[0]] if options.model else []
        names = {part.name for part in prepared.plan.parts} if prepared.plan else set()
        arms = [arm.factory.partition(":")[0] for arm in load_arms() if arm.factory and arm.name in names]
        self.fingerprint = fingerprint(f"wellposed.compare.{trained}", *own, *arms)
        self.commit = commit_of(__file__)
        self.function = partial(
            run_tune_trial, folder=str(folder.resolve()), model=options.model, live=str(self.live.resolve())
        )
        self.started = time.monotonic()
        self.deadline = None if options.budget is None else self.started + options.budget
        self.trial_seconds = 0.0
        self.notes: list[str] = list(prepared.plan.notes) if prepared.plan else []

    def run(self) -> FinishedTuning:
        arms = self.arms
        seeds = list(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + self.options.seeds))
        found: dict[str, dict[int, Outcome]] = {arm: {} for arm in arms}
        with TuneWatch(self.console, self.live) as self.watch:
            self.watch.stage("training", len(arms) * len(seeds))
            first = len(seeds) if self.deadline is None else min(FEWEST_SEEDS, len(seeds))
            self._run(seeds[:first], found)
            if first < len(seeds):
                seeds = seeds[: self._affordable(first, len(seeds))]
                self.watch.stage("training", len(arms) * len(seeds))
                self._run(seeds[first:], found)
        self.store.close()
        whole = [seed for seed in seeds if all(seed in by_seed for by_seed in found.values())]
        if len(whole) < FEWEST_SEEDS:
            raise UserError(
                f"the budget ended before {FEWEST_SEEDS} seeds were done; raise --budget or lower --epochs. Finished "
                "trainings are kept: the same command continues"
            )
        if len(whole) < self.options.seeds:
            self.notes.append(
                f"the budget of {self.options.budget:g} s allowed {len(whole)} seeds (asked: {self.options.seeds})"
            )
        prepared = self.prepared
        return FinishedTuning(
            self.task, self.options, prepared.plan,
            {arm: {seed: by_seed[seed] for seed in whole} for arm, by_seed in found.items()},
            whole, prepared.epochs, prepared.model, self.fingerprint, self.commit, machine(),
            time.monotonic() - self.started, [*self.task.notes, *self.notes],
        )  # fmt: skip

    @property
    def arms(self) -> tuple[str, ...]:
        """The initial values, the method, and a third that says what the gain is made of.

        Where the method finds a schedule: its values, fixed from the start; for a linear model: one penalty for all.
        """
        method = self.options.chosen
        third = (APPLIED,) if method.schedule else (SINGLE,) if method.linear else ()
        return (UNTUNED, method.name, *third)

    def _affordable(self, done: int, wanted: int) -> int:
        """Seeds that the budget allows, decided by time alone, before any result is seen."""
        each = max(1e-3, self.trial_seconds / self.options.workers / done)
        return min(wanted, done + max(0, math.floor(EFFICIENCY * seconds_left(self.deadline) / each)))

    def _run(self, seeds: list[int], found: dict[str, dict[int, Outcome]]) -> None:
        # Seed by seed: if time runs out, all arms have the same seeds.
        at_once = [arm for arm in self.arms if arm != APPLIED]
        self._run_trials([self._trial(arm, seed) for seed in seeds for arm in at_once], found)
        if APPLIED not in found:
            return
        learned = found[self.options.method]
        trials = []
        for seed in (seed for seed in seeds if seed in learned):
            if learned[seed].status == "finished":
                trials.append(self._trial(APPLIED, seed, json.dumps(learned[seed].artifacts["values"])))
            else:
                found[APPLIED][seed] = learned[seed]  # nothing was learned that could be applied
                self.watch.advance()
        self._run_trials(trials, found)

    def _run_trials(self, trials: list[Trial], found: dict[str, dict[int, Outcome]]) -> None:
        def on_done(trial: Trial, outcome: Outcome) -> None:
            self.trial_seconds += outcome.seconds
            self.watch.advance()

        # A planned training may overrun its budget by half before it is cut: an answer beats a stopwatch.
        deadline = None if self.deadline is None else self.deadline + 0.5 * (self.options.budget or 0)
        outcomes = run_trials(
            trials, self.function, self.store, workers=self.options.workers, engine=self.options.engine,
            on_done=on_done, deadline=deadline, commit=self.commit,
        )  # fmt: skip
        for trial, outcome in zip(trials, outcomes, strict=True):
            if outcome is not None:
                found[trial.arm][trial.seed] = outcome

    def _trial(self, arm: str, seed: int, values: str | None = None) -> Trial:
        study = f"{self.task.digest}:{self.options.model or 'default'}"
        settings: dict[str, Setting] = {"learn": ",".join(self.options.learn or ()), "epochs": self.prepared.epochs}
        if self.options.chosen.linear:
            settings["linear"] = True
        if arm in METHODS and METHODS[arm].search:
            settings["trials"] = self.options.trainings
        if values is not None:
            settings["values"] = values
        return Trial(study, arm, SCALE, "evaluate", settings, seed, self.fingerprint)
