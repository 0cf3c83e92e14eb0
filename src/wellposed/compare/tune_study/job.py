"""The job of `wellposed tune STUDY`: a search on tuning seeds, then all arms on evaluation seeds, within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, cast

from rich.console import Console

from ...lab.fingerprint import fingerprint, machine
from ...lab.statistics import smallest_n
from ...lab.study_run import study_fingerprint
from ...lab.trial import Phase, Setting, Trial
from ...lab.tuning import Tuned, tune_arms
from ..seed_job import FinishedJob, SeedJob
from ..tune_options import APPLIED, UNTUNED
from .options import StudyTuneOptions
from .prepared import PreparedStudy
from .training import LEARNING, SCALE, run_study_trial

LEDGER = "ledger"
"""The arm with the settings that the ledger holds."""

FEWEST_ROUNDS = 2
SAMPLER_SEED = 1
"""Not the study's own, 0: with it a search would repeat the ledger's, proposal by proposal."""


@dataclass(kw_only=True)
class FinishedStudy(FinishedJob):
    """Everything that was found, for the result; the rest as in `FinishedJob`.

    The arms are "untuned", the method, and where there are such "ledger" and "applied".

    Attributes:
        prepared: the job.
        tuned: what a search found, or None.
        tuning_seeds: trials of each of its configurations.
        tuning_seconds: of all its trials.
    """

    prepared: PreparedStudy
    tuned: Tuned | None
    tuning_seeds: int
    tuning_seconds: float


def run_study_tuning(prepared: PreparedStudy, console: Console | None = None) -> FinishedStudy:
    """Tune and evaluate. Finished trials are kept in the output folder: the same call continues a killed run.

    Args:
        prepared: the job.
        console: where progress goes; standard error by default.

    Raises:
        UserError: if the budget ended before two seeds were done.
        TuningError: if no configuration could be run.
    """
    return _StudyJob(prepared, console).run()


class _StudyJob(SeedJob):
    options: StudyTuneOptions

    def __init__(self, prepared: PreparedStudy, console: Console | None) -> None:
        self.prepared = prepared
        self.fingerprint = study_fingerprint(prepared.study)
        super().__init__(prepared.options, console)
        self.titles: dict[str, str] = {}  # of trials by key, for the live table
        self.function = partial(
            run_study_trial, run=prepared.study.run, offer=prepared.study.tunable, live=str(self.live.resolve()),
            titles=self.titles,
        )  # fmt: skip
        self.rounds = self.options.configurations
        self.tuning_seeds = prepared.protocol.tuning_seeds if self.options.chosen.search else 0
        self.tuned: Tuned | None = None

    def run(self) -> FinishedStudy:
        prepared, options = self.prepared, self.options
        with self.watch:
            self.watch.stage("training", self.rounds * self.tuning_seeds + len(self.arms) * options.seeds)
            if options.chosen.search:
                self._tune()
            tuning_seconds = self.trial_seconds
            seeds, found = self.train_seeds()
        self.store.close()
        less = " or lower --rounds" if options.chosen.search else ""
        whole, outcomes = self.complete(seeds, found, f"raise --budget{less}")
        return FinishedStudy(
            prepared=prepared, outcomes=outcomes, seeds=whole, tuned=self.tuned, tuning_seeds=self.tuning_seeds,
            tuning_seconds=tuning_seconds, fingerprint=self.fingerprint, commit=self.commit, machine=machine(),
            seconds=time.monotonic() - self.started, notes=[*prepared.notes, *self.notes],
        )  # fmt: skip

    @cached_property
    def learning_fingerprint(self) -> str:
        """Of the trials that learn: of the study, its offer, and the training here."""
        study = self.prepared.study
        assert study.tunable is not None
        return fingerprint("wellposed.compare.tune_study.training", study.run, study.tunable)

    @property
    def arms(self) -> tuple[str, ...]:
        """Registered defaults, the method, the ledger's settings, and a schedule's last values from the start."""
        kept = (LEDGER,) if self.prepared.ledger is not None else ()
        applied = (APPLIED,) if self.options.chosen.schedule else ()
        return (UNTUNED, self.options.method, *kept, *applied)

    # ── the search ────────────────────────────────────────────────────────────────────────────────────────────────
    def _tune(self) -> None:
        arm, label = self.prepared.arm, self.options.chosen.label
        self.tuned = tune_arms(
            {arm.name: self.prepared.space},
            lambda name, settings, seed: self._trial(
                "tune", {**self.prepared.defaults, **settings}, seed, f"{label} tuning {seed}"
            ),
            self.run_trials,
            rounds=self.rounds,
            seeds=range(self.tuning_seeds),
            score=arm.score,
            sampler_seed=SAMPLER_SEED,
            sampler=cast(Literal["tpe", "random"], self.options.method),
            keep_going=self._plan_rounds,
        )[arm.name]
        done, asked = len(self.tuned.history), self.options.configurations
        self.searched = done * self.tuning_seeds
        if done < asked:
            self.notes.append(f"the budget allowed {done} configurations (asked: {asked})")

    def _plan_rounds(self, done: int) -> bool:
        """After the first round, which shows what a training costs, decide how many rounds the budget allows."""
        if done == 1 and self.deadline is not None:
            # Wall time of one training, from what the trainings themselves took.
            seconds = max(1e-3, self.trial_seconds / self.options.workers / max(1, self.trials_done))
            # Seeds come first: below this number no difference can be shown, however well the arm is tuned.
            seeds = min(self.options.seeds, smallest_n(0.95))
            left = self.affordable(seconds) - seeds * len(self.arms)
            self.rounds = min(self.rounds, max(FEWEST_ROUNDS, 1 + math.floor(left / self.tuning_seeds)))
        return done < self.rounds

    # ── the seeds ─────────────────────────────────────────────────────────────────────────────────────────────────
    def trial(self, arm: str, seed: int) -> Trial:
        prepared, title = self.prepared, f"{self._names.get(arm, arm)} {seed}"
        if arm == LEDGER:
            assert prepared.ledger is not None
            return self._trial("evaluate", prepared.ledger, seed, title)
        if arm == UNTUNED:
            return self._trial("evaluate", prepared.defaults, seed, title)
        if self.tuned is not None:
            return self._trial("evaluate", {**prepared.defaults, **self.tuned.settings}, seed, title)
        return self._titled(
            title,
            Trial(
                f"study:{prepared.card.slug}", prepared.arm.name, f"{LEARNING}{arm}", "evaluate", prepared.defaults,
                seed, self.learning_fingerprint,
            ),
        )  # fmt: skip

    def applied(self, seed: int, values: Mapping[str, Any]) -> Trial:
        return self._trial("evaluate", {**self.prepared.defaults, **values}, seed, f"{APPLIED} {seed}")

    @property
    def _names(self) -> dict[str, str]:
        """Arms as the live table calls them."""
        return {UNTUNED: "defaults", self.options.method: self.options.chosen.label}

    def _trial(self, phase: Phase, settings: Mapping[str, Setting], seed: int, title: str) -> Trial:
        prepared = self.prepared
        study = f"study:{prepared.card.slug}"
        return self._titled(
            title, Trial(study, prepared.arm.name, SCALE, phase, dict(settings), seed, self.fingerprint)
        )

    def _titled(self, title: str, trial: Trial) -> Trial:
        self.titles[trial.key] = title
        return trial
