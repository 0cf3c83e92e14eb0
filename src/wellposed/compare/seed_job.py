"""The part of a job of `wellposed tune` that is alike for data and for a study: arms trained seed by seed, in a budget."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ..lab.fingerprint import commit_of
from ..lab.runner import run_trials
from ..lab.store import Store
from ..lab.trial import FIRST_EVALUATION_SEED, Outcome, Trial
from ..lab.tuning import seconds_left
from ..lab.worker import TrialFunction
from .comparison import EFFICIENCY
from .errors import UserError
from .tune_live import TuneWatch
from .tune_options import APPLIED, JobOptions

FEWEST_SEEDS = 2

Found = dict[str, dict[int, Outcome]]
"""Arm -> seed -> outcome."""


@dataclass(kw_only=True)
class FinishedJob:
    """What every job finds, for the result.

    Attributes:
        outcomes: arm -> seed -> outcome.
        seeds: those that all arms finished.
        fingerprint, commit, machine, seconds: for the record.
        notes: what a reader must know.
    """

    outcomes: Found
    seeds: list[int]
    fingerprint: str
    commit: str | None
    machine: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)


class SeedJob(ABC):
    """Trains all arms with each seed. Finished trainings are kept in the output folder: a killed job continues.

    Args:
        options: how, and for how long.
        console: where progress goes; standard error by default.

    Attributes:
        function: what the laboratory's workers call on a trial; set by the subclass.
        searched: trainings that came before the seeds, and count in the bar.
        notes: what a reader must know.
    """

    function: TrialFunction

    def __init__(self, options: JobOptions, console: Console | None) -> None:
        self.options, self.console = options, console
        options.output.mkdir(parents=True, exist_ok=True)
        self.live = options.output / "live"
        self.store = Store(options.output / "trials.sqlite")
        self.watch = TuneWatch(console, self.live)
        self.commit = commit_of(__file__)
        self.started = time.monotonic()
        self.deadline = None if options.budget is None else self.started + options.budget
        self.trial_seconds, self.trials_done, self.searched = 0.0, 0, 0
        self.notes: list[str] = []

    @property
    @abstractmethod
    def arms(self) -> tuple[str, ...]:
        """Names of the arms: the one that keeps the settings, the method, and others."""

    @abstractmethod
    def trial(self, arm: str, seed: int) -> Trial:
        """The training of an arm, other than that of the learned values, with one seed."""

    @abstractmethod
    def applied(self, seed: int, values: Mapping[str, Any]) -> Trial:
        """The training with a seed's learned values, fixed from the start."""

    def train_seeds(self) -> tuple[list[int], Found]:
        """Train all arms; under a budget two seeds first, then as many as the time left allows.

        Returns:
            The seeds that were tried, and what came of them.
        """
        self.trial_seconds, self.trials_done = 0.0, 0
        wanted = self.options.seeds
        seeds = list(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + wanted))
        found: Found = {arm: {} for arm in self.arms}
        first = wanted if self.deadline is None else min(FEWEST_SEEDS, wanted)
        self._expect(wanted)
        self._train(seeds[:first], found)
        if first < wanted:
            # Decided by time alone, before any result is seen.
            seconds = max(1e-3, self.trial_seconds / self.options.workers / first)
            seeds = seeds[: first + max(0, math.floor(self.affordable(seconds)))]
            self._expect(len(seeds))
            self._train(seeds[first:], found)
        return seeds, found

    def complete(self, seeds: Sequence[int], found: Found, remedy: str) -> tuple[list[int], Found]:
        """The seeds that all arms finished, with their outcomes.

        Raises:
            UserError: with the remedy, if they are fewer than two.
        """
        whole = [seed for seed in seeds if all(seed in by_seed for by_seed in found.values())]
        if len(whole) < FEWEST_SEEDS:
            raise UserError(
                f"the budget ended before {FEWEST_SEEDS} seeds were done; {remedy}. Finished trainings are kept: the same "
                "command continues"
            )
        if len(whole) < self.options.seeds:
            self.notes.append(
                f"the budget of {self.options.budget:g} s allowed {len(whole)} seeds (asked: {self.options.seeds})"
            )
        return whole, {arm: {seed: by_seed[seed] for seed in whole} for arm, by_seed in found.items()}

    def affordable(self, seconds: float) -> float:
        """How often the time left allows what takes so many seconds."""
        return EFFICIENCY * seconds_left(self.deadline) / seconds

    def run_trials(self, trials: list[Trial], deadline: float | None = None) -> list[Outcome | None]:
        """Run trials that the store does not hold."""

        def on_done(trial: Trial, outcome: Outcome) -> None:
            self.trial_seconds += outcome.seconds
            self.trials_done += 1
            self.watch.advance()

        return run_trials(
            trials, self.function, self.store, workers=self.options.workers, engine=self.options.engine,
            on_done=on_done, deadline=deadline, commit=self.commit,
        )  # fmt: skip

    def _expect(self, seeds: int) -> None:
        """Tell the bar how many trainings there are in all, now that it is known."""
        self.watch.stage("training", self.searched + len(self.arms) * seeds)

    def _train(self, seeds: Sequence[int], found: Found) -> None:
        # Seed by seed: if time runs out, all arms have the same seeds.
        at_once = [arm for arm in self.arms if arm != APPLIED]
        self._run_arms([(arm, seed, self.trial(arm, seed)) for seed in seeds for arm in at_once], found)
        if APPLIED not in found:
            return
        learned = found[self.options.method]
        later = []
        for seed in (seed for seed in seeds if seed in learned):
            if learned[seed].status == "finished":
                later.append((APPLIED, seed, self.applied(seed, learned[seed].artifacts["values"])))
            else:
                found[APPLIED][seed] = learned[seed]  # nothing was learned that could be applied
                self.watch.advance()
        self._run_arms(later, found)

    def _run_arms(self, wanted: Sequence[tuple[str, int, Trial]], found: Found) -> None:
        # A search may end where it began, and two arms then share their trials.
        trials = {trial.key: trial for _, _, trial in wanted}
        # A planned training may overrun its budget by half before it is cut: an answer beats a stopwatch.
        deadline = None if self.deadline is None else self.deadline + 0.5 * (self.options.budget or 0)
        done = dict(zip(trials, self.run_trials(list(trials.values()), deadline), strict=True))
        for arm, seed, trial in wanted:
            if (outcome := done[trial.key]) is not None:
                found[arm][seed] = outcome
        for _ in range(len(wanted) - len(trials)):
            self.watch.advance()
