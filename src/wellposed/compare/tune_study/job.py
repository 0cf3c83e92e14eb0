"""The job of `wellposed tune STUDY`: a search on tuning seeds, then all arms on evaluation seeds, within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, cast

from rich.console import Console

from ...lab.fingerprint import commit_of, fingerprint, machine
from ...lab.runner import run_trials
from ...lab.statistics import smallest_n
from ...lab.store import Store
from ...lab.study_run import study_fingerprint
from ...lab.trial import FIRST_EVALUATION_SEED, Outcome, Phase, Setting, Trial
from ...lab.tuning import Tuned, seconds_left, tune_arms
from ..comparison import EFFICIENCY
from ..errors import UserError
from ..tune_job import FEWEST_SEEDS
from ..tune_live import TuneWatch
from ..tune_options import APPLIED, UNTUNED
from .choice import PreparedStudy
from .training import LEARNING, SCALE, run_study_trial

LEDGER = "ledger"
"""The arm with the settings that the ledger holds."""

FEWEST_ROUNDS = 2
SAMPLER_SEED = 1
"""Not the study's own, 0: with it a search would repeat the ledger's, proposal by proposal."""


@dataclass
class FinishedStudy:
    """Everything that was found, for the result.

    Attributes:
        prepared: the job.
        outcomes: arm -> seed -> outcome; arms "untuned", the method, and where there are such "ledger" and "applied".
        seeds: those that all arms finished.
        tuned: what a search found, or None.
        tuning_seeds: trials of each of its configurations.
        tuning_seconds: of all its trials.
        fingerprint, commit, machine, seconds: for the record.
        notes: what a reader must know.
    """

    prepared: PreparedStudy
    outcomes: dict[str, dict[int, Outcome]]
    seeds: list[int]
    tuned: Tuned | None
    tuning_seeds: int
    tuning_seconds: float
    fingerprint: str
    commit: str | None
    machine: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)


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


class _StudyJob:
    def __init__(self, prepared: PreparedStudy, console: Console | None) -> None:
        self.prepared, self.options, self.console = prepared, prepared.options, console
        options = self.options
        options.output.mkdir(parents=True, exist_ok=True)
        self.live = options.output / "live"
        self.store = Store(options.output / "trials.sqlite")
        self.fingerprint = study_fingerprint(prepared.study)
        self.commit = commit_of(__file__)
        self.started = time.monotonic()
        self.deadline = None if options.budget is None else self.started + options.budget
        self.trial_seconds, self.trials_done = 0.0, 0
        self.rounds = options.configurations
        self.tuning_seeds = prepared.protocol.tuning_seeds if options.chosen.search else 0
        self.notes: list[str] = []

    def run(self) -> FinishedStudy:
        prepared, options = self.prepared, self.options
        seeds = list(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + options.seeds))
        with TuneWatch(self.console, self.live) as self.watch:
            self.total = self.rounds * self.tuning_seeds + len(self.arms) * len(seeds)
            self.watch.stage("training", self.total)
            self.tuned = self._tune() if options.chosen.search else None
            tuning_seconds = self.trial_seconds
            self._expect(len(seeds))
            self.trial_seconds, self.trials_done = 0.0, 0
            found: dict[str, dict[int, Outcome]] = {arm: {} for arm in self.arms}
            first = len(seeds) if self.deadline is None else min(FEWEST_SEEDS, len(seeds))
            self._evaluate(seeds[:first], found)
            if first < len(seeds):
                seeds = seeds[: self._affordable(first, len(seeds))]
                self._expect(len(seeds))
                self._evaluate(seeds[first:], found)
        self.store.close()
        whole = [seed for seed in seeds if all(seed in by_seed for by_seed in found.values())]
        if len(whole) < FEWEST_SEEDS:
            raise UserError(
                f"the budget ended before {FEWEST_SEEDS} seeds were done; raise --budget"
                f"{' or lower --rounds' if options.chosen.search else ''}. Finished trainings are kept: the same command "
                "continues"
            )
        if self.tuned is not None and len(self.tuned.history) < (options.configurations):
            self.notes.append(
                f"the budget allowed {len(self.tuned.history)} configurations (asked: {options.configurations})"
            )
        if len(whole) < options.seeds:
            self.notes.append(f"the budget of {options.budget:g} s allowed {len(whole)} seeds (asked: {options.seeds})")
        return FinishedStudy(
            prepared, {arm: {seed: by_seed[seed] for seed in whole} for arm, by_seed in found.items()}, whole,
            self.tuned, self.tuning_seeds, tuning_seconds, self.fingerprint, self.commit, machine(),
            time.monotonic() - self.started, [*prepared.notes, *self.notes],
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
    def _tune(self) -> Tuned:
        arm = self.prepared.arm

        def run(trials: list[Trial]) -> list[Outcome | None]:
            return self._run_trials(trials, [f"{self.options.chosen.label} tuning {t.seed}" for t in trials])

        return tune_arms(
            {arm.name: self.prepared.space},
            lambda name, settings, seed: self._trial("tune", {**self.prepared.defaults, **settings}, seed),
            run,
            rounds=self.rounds,
            seeds=range(self.tuning_seeds),
            score=arm.score,
            sampler_seed=SAMPLER_SEED,
            sampler=cast(Literal["tpe", "random"], self.options.method),
            keep_going=self._plan_rounds,
        )[arm.name]

    def _plan_rounds(self, done: int) -> bool:
        """After the first round, which shows what a training costs, decide how many rounds the budget allows."""
        if done == 1 and self.deadline is not None:
            trials = EFFICIENCY * seconds_left(self.deadline) / self._each()
            # Seeds come first: below this number no difference can be shown, however well the arm is tuned.
            seeds = min(self.options.seeds, smallest_n(0.95))
            affordable = 1 + math.floor((trials - seeds * len(self.arms)) / self.tuning_seeds)
            self.rounds = min(self.rounds, max(FEWEST_ROUNDS, affordable))
        return done < self.rounds

    def _each(self) -> float:
        """Wall time of one training, from what the trainings themselves took."""
        return max(1e-3, self.trial_seconds / self.options.workers / max(1, self.trials_done))

    def _expect(self, seeds: int) -> None:
        """Tell the bar how many trainings there are in all, now that it is known."""
        searched = 0 if self.tuned is None else len(self.tuned.history) * self.tuning_seeds
        self.watch.stage("training", searched + len(self.arms) * seeds)

    # ── the seeds ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _affordable(self, done: int, wanted: int) -> int:
        """Seeds that the budget allows, decided by time alone, before any result is seen."""
        each = max(1e-3, self.trial_seconds / self.options.workers / done)
        return min(wanted, done + max(0, math.floor(EFFICIENCY * seconds_left(self.deadline) / each)))

    def _evaluate(self, seeds: Sequence[int], found: dict[str, dict[int, Outcome]]) -> None:
        # Seed by seed: if time runs out, all arms have the same seeds.
        at_once = [arm for arm in self.arms if arm != APPLIED]
        self._run_arms([(arm, seed, self._evaluation(arm, seed)) for seed in seeds for arm in at_once], found)
        if APPLIED not in found:
            return
        learned = found[self.options.method]
        later = []
        for seed in (seed for seed in seeds if seed in learned):
            if learned[seed].status == "finished":
                settings = {**self.prepared.defaults, **learned[seed].artifacts["values"]}
                later.append((APPLIED, seed, self._trial("evaluate", settings, seed)))
            else:
                found[APPLIED][seed] = learned[seed]  # nothing was learned that could be applied
                self.watch.advance()
        self._run_arms(later, found)

    def _evaluation(self, arm: str, seed: int) -> Trial:
        prepared = self.prepared
        if arm == LEDGER:
            assert prepared.ledger is not None
            return self._trial("evaluate", prepared.ledger, seed)
        if arm == UNTUNED:
            return self._trial("evaluate", prepared.defaults, seed)
        if self.tuned is not None:
            return self._trial("evaluate", {**prepared.defaults, **self.tuned.settings}, seed)
        return Trial(
            f"study:{prepared.card.slug}", prepared.arm.name, f"{LEARNING}{arm}", "evaluate", prepared.defaults, seed,
            self.learning_fingerprint,
        )  # fmt: skip

    def _run_arms(self, wanted: Sequence[tuple[str, int, Trial]], found: dict[str, dict[int, Outcome]]) -> None:
        names = {UNTUNED: "defaults", self.options.method: self.options.chosen.label}
        # A search may end where it began, and two arms then share their trials.
        trials = {trial.key: (trial, f"{names.get(arm, arm)} {seed}") for arm, seed, trial in wanted}
        # A planned training may overrun its budget by half before it is cut: an answer beats a stopwatch.
        deadline = None if self.deadline is None else self.deadline + 0.5 * (self.options.budget or 0)
        outcomes = self._run_trials([t for t, _ in trials.values()], [title for _, title in trials.values()], deadline)
        done = dict(zip(trials, outcomes, strict=True))
        for arm, seed, trial in wanted:
            if (outcome := done[trial.key]) is not None:
                found[arm][seed] = outcome
        for _ in range(len(wanted) - len(trials)):
            self.watch.advance()

    def _run_trials(
        self, trials: list[Trial], titles: Sequence[str], deadline: float | None = None
    ) -> list[Outcome | None]:
        def on_done(trial: Trial, outcome: Outcome) -> None:
            self.trial_seconds += outcome.seconds
            self.trials_done += 1
            self.watch.advance()

        function = partial(
            run_study_trial, run=self.prepared.study.run, offer=self.prepared.study.tunable,
            live=str(self.live.resolve()), titles={t.key: title for t, title in zip(trials, titles, strict=True)},
        )  # fmt: skip
        return run_trials(
            trials, function, self.store, workers=self.options.workers, engine=self.options.engine, on_done=on_done,
            deadline=deadline, commit=self.commit,
        )  # fmt: skip

    def _trial(self, phase: Phase, settings: Mapping[str, Setting], seed: int) -> Trial:
        prepared = self.prepared
        return Trial(
            f"study:{prepared.card.slug}", prepared.arm.name, SCALE, phase, dict(settings), seed, self.fingerprint
        )
