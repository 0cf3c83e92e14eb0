"""`compare`: tune every arm alike, run the seeds, rank, report. The main job of wellposed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..lab.fingerprint import commit_of, fingerprint, machine
from ..lab.progress import Watch
from ..lab.runner import run_trials
from ..lab.statistics import simultaneous_level, smallest_n
from ..lab.store import Store
from ..lab.trial import FIRST_EVALUATION_SEED, Outcome, Setting, Trial
from ..lab.tuning import Tuned, seconds_left, tune_arms
from ..papers.arms import Arm
from .amounts import check_amounts, check_budget
from .arms import REFERENCE, applicable_arms, build_regularizer, search_space
from .errors import UserError
from .models import check_model, describe_model
from .task import Task
from .training import run_trial

SCALE = "compare"
MINIMUM = (2, 3)
"""Fewest tuning rounds and seeds that a budget may leave."""

EFFICIENCY = 0.9
"""Share of the time in which workers train; the rest is starting, waiting for the last one, and the report."""

EVALUATION_COST = 1.1
"""An evaluation also measures curves and the test set."""


@dataclass(frozen=True)
class Options:
    """What a comparison does.

    Attributes:
        methods: names of arms, or None for all that apply.
        model: `module:function` of the user's model, or None.
        budget: wall-clock seconds for tuning and seeds together, or None for no limit.
        seeds: evaluation seeds an arm.
        rounds: tuning configurations an arm.
        workers: processes.
        engine: "loky" or "serial".
        output: folder of the store and the report.
        command: the command line, for the report.
    """

    methods: Sequence[str] | None = None
    model: str | None = None
    budget: float | None = None
    seeds: int = 12
    rounds: int = 8
    workers: int = 2
    engine: str = "loky"
    output: Path = Path("wellposed-report")
    command: str = ""


@dataclass
class Finished:
    """Everything that a comparison found, for ranking and report.

    Attributes:
        task: the prepared data.
        options: as given.
        arms: those that took part.
        tuned: what tuning found for each.
        outcomes: arm -> seed -> outcome.
        rounds, seeds: as many as the budget allowed.
        model: description of the network.
        fingerprint, commit, machine, seconds: for the record.
        notes: what a reader must know.
    """

    task: Task
    options: Options
    arms: list[Arm]
    tuned: dict[str, Tuned]
    outcomes: dict[str, dict[int, Outcome]]
    rounds: int
    seeds: list[int]
    model: str
    fingerprint: str
    commit: str | None
    machine: dict[str, Any]
    seconds: float
    notes: list[str]


def check_options(options: Options) -> None:
    """Check what does not depend on the data.

    Raises:
        UserError: naming the option, its value and what is allowed.
    """
    check_amounts(
        ("--seeds", options.seeds, 2), ("--tuning-trials", options.rounds, 1), ("--workers", options.workers, 1)
    )
    check_budget(options.budget)


def compare(task: Task, options: Options, console: Console | None = None) -> Finished:
    """Run a comparison. Finished trials are kept in the output folder: the same call continues a killed run.

    Args:
        task: the prepared data.
        options: what to do.
        console: where progress goes; standard error by default.

    Raises:
        UserError: before any training, for options or a model that do not fit.
    """
    check_options(options)
    arms = applicable_arms(task, options.methods)
    network = check_model(options.model, task)
    for arm in arms:
        settings = {name: part.middle() for name, part in search_space(arm, task).items()}
        build_regularizer(arm, task, settings)  # a wrong setting must fail now, not in an hour
    return _Comparison(task, options, arms, describe_model(network, task), console).run()


class _Comparison:
    def __init__(self, task: Task, options: Options, arms: list[Arm], model: str, console: Console | None) -> None:
        self.task, self.options, self.arms, self.model = task, options, arms, model
        options.output.mkdir(parents=True, exist_ok=True)
        folder = options.output / "data"
        task.save(folder)
        self.store = Store(options.output / "trials.sqlite")
        # The user's model is part of what a result depends on.
        modules = ("wellposed.compare.training", *([options.model.partition(":")[0]] if options.model else []))
        modules += tuple(arm.factory.partition(":")[0] for arm in arms if arm.factory)
        self.fingerprint = fingerprint(*modules)
        self.commit = commit_of(__file__)
        self.function = partial(run_trial, folder=str(folder.resolve()), model=options.model)
        self.console = console
        self.started = time.monotonic()
        self.deadline = None if options.budget is None else self.started + options.budget
        self.notes: list[str] = []
        self.rounds, self.n_seeds = options.rounds, options.seeds
        self.trial_seconds = 0.0

    def run(self) -> Finished:
        with Watch(self.console) as watch:
            self.watch = watch
            tuned = self._tune()
            seeds, outcomes = self._evaluate(tuned)
        self.store.close()
        return Finished(
            task=self.task,
            options=self.options,
            arms=self.arms,
            tuned=tuned,
            outcomes=outcomes,
            rounds=max(len(t.history) for t in tuned.values()),
            seeds=seeds,
            model=self.model,
            fingerprint=self.fingerprint,
            commit=self.commit,
            machine=machine(),
            seconds=time.monotonic() - self.started,
            notes=self.notes,
        )

    def _tune(self) -> dict[str, Tuned]:
        spaces = {arm.name: search_space(arm, self.task) for arm in self.arms}
        self.watch.stage("tuning", len(spaces) * self.rounds)
        tuned = tune_arms(
            spaces,
            partial(self._trial, "tune"),
            self._run,
            rounds=self.rounds,
            keep_going=self._plan_budget,
        )
        self.watch.end_stage()
        self._plan_seeds(max(len(t.history) for t in tuned.values()))
        return tuned

    def _plan_budget(self, done: int) -> bool:
        """After the first round, which shows what a trial costs, decide how many rounds the budget allows."""
        if done == 1 and self.deadline is not None:
            rounds = EFFICIENCY * seconds_left(self.deadline) / self._round_seconds(done)
            wanted = (self.rounds - 1) + EVALUATION_COST * self.n_seeds
            # Seeds come first: below this number no difference can be shown, however well the arms are tuned.
            enough = min(self.n_seeds, smallest_n(simultaneous_level(len(self.arms) - 1)))
            seeds = max(enough, math.floor(self.n_seeds * rounds / wanted))
            affordable = 1 + math.floor(rounds - EVALUATION_COST * seeds)
            self.rounds = min(self.rounds, max(MINIMUM[0], affordable))
        return done < self.rounds

    def _plan_seeds(self, done: int) -> None:
        """As many seeds as the time left allows; decided by time alone, before any result is seen."""
        if self.deadline is not None:
            cost = EVALUATION_COST * self._round_seconds(done)
            affordable = math.floor(EFFICIENCY * seconds_left(self.deadline) / cost)
            self.n_seeds = min(self.n_seeds, max(MINIMUM[1], affordable))
        asked = self.options
        if self.rounds < asked.rounds or self.n_seeds < asked.seeds:
            self.notes.append(
                f"the budget of {asked.budget:g} s allowed {self.rounds} tuning trials and {self.n_seeds} seeds an arm "
                f"(asked: {asked.rounds} and {asked.seeds})"
            )

    def _round_seconds(self, rounds: int) -> float:
        """Wall time of one trial of every arm, from what the trials themselves took: workers start only once."""
        return max(1e-3, self.trial_seconds / self.options.workers / rounds)

    def _evaluate(self, tuned: dict[str, Tuned]) -> tuple[list[int], dict[str, dict[int, Outcome]]]:
        seeds = list(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + self.n_seeds))
        # Seed by seed through all arms: if time runs out, every arm has the same seeds.
        trials = [self._trial("evaluate", arm, tuned[arm].settings, seed) for seed in seeds for arm in tuned]
        self.watch.stage("seeds", len(trials))
        # A planned evaluation may overrun its budget by half before it is cut: an answer beats a stopwatch.
        deadline = None if self.deadline is None else self.deadline + 0.5 * (self.options.budget or 0)
        outcomes = self._run(trials, deadline=deadline)
        self.watch.end_stage()
        found: dict[str, dict[int, Outcome]] = {arm: {} for arm in tuned}
        for trial, outcome in zip(trials, outcomes, strict=True):
            if outcome is not None:
                found[trial.arm][trial.seed] = outcome
        whole = [seed for seed in seeds if all(seed in by_seed for by_seed in found.values())]
        if len(whole) < 2:
            raise UserError(
                f"the budget ended before two seeds of all {len(self.arms)} arms were done; raise --budget or name "
                "fewer --methods. Finished trials are kept: the same command continues"
            )
        if len(whole) < len(seeds):
            self.notes.append(f"time ran out: {len(whole)} of {len(seeds)} seeds are complete, the others are left out")
        return whole, {arm: {seed: by_seed[seed] for seed in whole} for arm, by_seed in found.items()}

    def _trial(self, phase: Any, arm: str, settings: dict[str, Setting], seed: int) -> Trial:
        study = f"{self.task.digest}:{self.options.model or 'default'}"
        return Trial(study, arm, SCALE, phase, settings, seed, self.fingerprint)

    def _run(self, trials: list[Trial], deadline: float | None = None) -> list[Outcome | None]:
        def on_done(trial: Trial, outcome: Outcome) -> None:
            self.trial_seconds += outcome.seconds
            self.watch.advance()

        return run_trials(
            trials,
            self.function,
            self.store,
            workers=self.options.workers,
            engine=self.options.engine,
            on_done=on_done,
            deadline=deadline,
            commit=self.commit,
        )


__all__ = ["REFERENCE", "Finished", "Options", "check_options", "compare"]
