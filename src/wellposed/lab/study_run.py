"""Running a study: tune every arm alike, run the evaluation seeds, judge the claims."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..datasets.registry import find_dataset, is_installed
from ..papers.catalogue import Card
from .fingerprint import commit_of, fingerprint, machine
from .progress import Watch
from .protocol import Protocol, StudyArm
from .runner import run_trials
from .store import Store
from .study import MissingTrial, Seed, Study, claim_values, judge_claims, protocol_of
from .trial import Outcome, Phase, Setting, Trial
from .tuning import Tuned, mean_score, tune_arms
from .verdicts import Verdict

SCALES = ("smoke", "laptop", "paper")
SMOKE_SEEDS = 2


class StudyError(ValueError):
    """A study cannot run as asked: an option is wrong, or data are missing. Raised before any training."""


@dataclass(frozen=True)
class StudyOptions:
    """How a study runs.

    Attributes:
        scale: "smoke", "laptop" or "paper".
        output: folder of trials, page and numbers.
        seeds: number of evaluation seeds; None is what the card registers.
        overrides: settings that replace those of every arm (`--set epochs=3`).
        workers, engine: as `run_trials` takes them.
        command: what the user typed, for the record.
    """

    scale: str
    output: Path
    seeds: int | None = None
    overrides: Mapping[str, Setting] = field(default_factory=dict)
    workers: int = 1
    engine: str = "loky"
    command: str = ""


@dataclass
class ArmRecord:
    """One arm of a finished run.

    Attributes:
        arm: as registered.
        settings: the evaluation's configuration, tuned and fixed.
        tuning: every configuration tried, with its score (None: it failed or diverged).
        outcomes: one an evaluation seed, in their order.
    """

    arm: StudyArm
    settings: dict[str, Setting]
    tuning: list[tuple[dict[str, Setting], float | None]]
    outcomes: list[Outcome | None]

    def metric(self, name: str, worst: Mapping[str, float]) -> list[float]:
        """One metric of all seeds, diverged ones at their worst value; seeds without it are left out."""
        found = []
        for number, outcome in enumerate(self.outcomes):
            metrics = Seed(number, {self.arm.name: outcome}, worst)[self.arm.name]
            if outcome is not None and outcome.done and (name in metrics):
                found.append(metrics[name])
        return found

    def curves(self, name: str) -> list[list[float]]:
        """One curve of all seeds that have it."""
        return [o.curves[name] for o in self.outcomes if o is not None and name in o.curves]


@dataclass
class StudyRun:
    """A finished run of a study."""

    study: Study
    card: Card
    protocol: Protocol
    options: StudyOptions
    seeds: list[int]
    arms: dict[str, ArmRecord]
    verdicts: dict[str, Verdict]
    values: dict[str, dict[str, list[float]]]
    fingerprint: str
    commit: str | None
    machine: dict[str, Any]
    date: str
    seconds: float
    compute_seconds: float
    """Sum over all trials; `seconds` is the wall time, at least what the trials of a continued run took side by side."""

    @property
    def judged(self) -> bool:
        """Whether verdicts were drawn: at laptop scale, never at smoke scale; paper scale shows numbers."""
        return self.options.scale == "laptop"

    @property
    def as_registered(self) -> bool:
        """Whether nothing differs from the card: only such a run may enter the ledger."""
        return not self.options.overrides and self.options.seeds in (None, self.protocol.seeds)


def study_fingerprint(study: Study) -> str:
    """Of the study's module and all that it trains with; the laboratory itself changes no trial."""
    return fingerprint(study.run, without=("wellposed.lab", "wellposed.papers"))


def run_study(study: Study, card: Card, options: StudyOptions, console: Console | None = None) -> StudyRun:
    """Run a study. Finished trials are kept in the output folder: the same call continues a killed run.

    Args:
        study: the module's.
        card: the card that registers its claims and arms.
        options: scale, seeds, engine, ...
        console: where progress goes; standard error by default.

    Raises:
        StudyError: before any training, for options out of range, or data that are not here.
        ValueError: for a study that does not fit its card.
    """
    if options.workers < 1:
        raise StudyError(f"--workers must be at least 1, got {options.workers}")
    if options.scale not in SCALES:
        raise StudyError(f"--scale must be one of {', '.join(SCALES)}, got '{options.scale}'")
    if options.seeds is not None and options.seeds < 2:
        raise StudyError(f"--seeds must be at least 2, got {options.seeds}")
    protocol = protocol_of(card)
    if options.scale == "paper":
        protocol = _published(protocol, card)
    else:
        study.check(card)
    if options.scale == "laptop":
        for name in study.needs:
            if not is_installed(entry := find_dataset(name)):
                raise StudyError(entry.how_to_get)
    if study.prepare is not None and options.scale != "smoke":
        study.prepare(protocol)
    known = {name for arm in protocol.arms.values() for name in (*arm.fixed, *arm.space)} | set(protocol.smoke)
    if unknown := sorted(set(options.overrides) - known):
        raise StudyError(f"--set: no setting '{unknown[0]}' in this study; it has: {', '.join(sorted(known))}")
    return _Runner(study, card, protocol, options, console).run()


def _published(protocol: Protocol, card: Card) -> Protocol:
    """The protocol of the scale "paper": the published arms, as they are."""
    if protocol.paper is None:
        raise StudyError(f"{card.slug}: no published configuration is written down ([protocol.paper] in its card)")
    return dataclasses.replace(protocol, arms=protocol.paper.arms, seeds=protocol.paper.seeds, smoke={})


class _Runner:
    def __init__(
        self, study: Study, card: Card, protocol: Protocol, options: StudyOptions, console: Console | None
    ) -> None:
        self.study, self.card, self.protocol, self.options, self.console = study, card, protocol, options, console
        self.smoke = options.scale == "smoke"
        self.overrides = {**(protocol.smoke if self.smoke else {}), **options.overrides}
        self.fingerprint = study_fingerprint(study)
        self.commit = commit_of(__file__)
        count = options.seeds or (SMOKE_SEEDS if self.smoke else protocol.seeds)
        self.seeds = [1000 + i for i in range(count)]
        self.tuning_seeds = range(1 if self.smoke else protocol.tuning_seeds)
        self.outcomes: dict[str, Outcome] = {}
        self.tuned: dict[str, Tuned] = {}

    def run(self) -> StudyRun:
        started = time.monotonic()
        self.options.output.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.options.output / "trials.sqlite")
        try:
            with Watch(self.console) as self.watch:
                for number, wave in enumerate(self._waves()):
                    self._tune(wave, "tuning" if number == 0 else f"tuning {number + 1}")
                evaluated = self._evaluate()
        finally:
            self.store.close()
        if self.smoke:
            self._raise_failures(evaluated)
        worst = self.protocol.worst
        seeds = [Seed(s, {arm: evaluated[arm][s] for arm in evaluated}, worst) for s in self.seeds]
        values = self._values(seeds)
        judged = self.options.scale == "laptop"
        verdicts = judge_claims(self.study, self.card, seeds) if judged else {}
        arms = {
            name: ArmRecord(arm, self._settings(arm), self._history(arm), [evaluated[name][s] for s in self.seeds])
            for name, arm in self.protocol.arms.items()
        }
        computing = sum(outcome.seconds for outcome in self.outcomes.values())
        return StudyRun(
            self.study, self.card, self.protocol, self.options, self.seeds, arms, verdicts, values, self.fingerprint,
            self._commits(), machine(), datetime.date.today().isoformat(),
            max(time.monotonic() - started, computing / self.options.workers), computing,
        )  # fmt: skip

    def _commits(self) -> str | None:
        """The commits under which the trials ran: a run that was continued may have several."""
        return ", ".join(sorted({o.commit for o in self.outcomes.values() if o.commit})) or None

    def _waves(self) -> list[list[StudyArm]]:
        """Arms to tune, those that build on another's tuned settings after it."""
        waves: list[list[StudyArm]] = []
        depth: dict[str, int] = {}
        for arm in self.protocol.arms.values():
            base = arm.settings_of or arm.trials_of
            depth[arm.name] = depth[base] + 1 if base else 0
            if arm.space:
                while len(waves) <= depth[arm.name]:
                    waves.append([])
                waves[depth[arm.name]].append(arm)
        return [wave for wave in waves if wave]

    def _tune(self, wave: Sequence[StudyArm], title: str) -> None:
        rounds = {arm.name: 1 if self.smoke else arm.rounds for arm in wave}
        self.watch.stage(title, sum(rounds.values()) * len(self.tuning_seeds))
        self.tuned |= tune_arms(
            {arm.name: arm.space for arm in wave},
            lambda name, settings, seed: self._trial("tune", self.protocol.arms[name], settings, seed),
            self._run,
            rounds=rounds,
            seeds=list(self.tuning_seeds),
            score={arm.name: arm.score for arm in wave},
        )
        self.watch.end_stage()

    def _trial(self, phase: Phase, arm: StudyArm, chosen: Mapping[str, Setting], seed: int) -> Trial:
        settings = {**self._base(arm), **arm.fixed, **chosen, **self.overrides}
        name = arm.trials_of or arm.name
        return Trial(f"study:{self.study.slug}", name, self.options.scale, phase, settings, seed, self.fingerprint)

    def _base(self, arm: StudyArm) -> dict[str, Setting]:
        return self._settings(self.protocol.arms[arm.settings_of]) if arm.settings_of else {}

    def _settings(self, arm: StudyArm) -> dict[str, Setting]:
        """The configuration that the evaluation runs."""
        if arm.trials_of:
            return self._rescored(arm)
        chosen = self.tuned[arm.name].settings if arm.space else {}
        return {**self._base(arm), **arm.fixed, **chosen, **self.overrides}

    def _rescored(self, arm: StudyArm) -> dict[str, Setting]:
        scored = [(score, settings) for settings, score in self._history(arm) if score is not None]
        if not scored:
            raise RuntimeError(f"arm {arm.name!r}: no tuning trial of {arm.trials_of!r} has a finite {arm.score!r}")
        base = self.protocol.arms[arm.trials_of]
        return {**self._base(base), **base.fixed, **max(scored, key=lambda pair: pair[0])[1], **self.overrides}

    def _history(self, arm: StudyArm) -> list[tuple[dict[str, Setting], float | None]]:
        """Configurations tried, each with the arm's own score."""
        if not arm.trials_of:
            return self.tuned[arm.name].history if arm.space else []
        base = self.protocol.arms[arm.trials_of]
        rows: list[tuple[dict[str, Setting], float | None]] = []
        for settings, _ in self.tuned[base.name].history:
            found = [self.outcomes.get(self._trial("tune", base, settings, s).key) for s in self.tuning_seeds]
            rows.append((settings, mean_score(found, arm.score)))
        return rows

    def _evaluate(self) -> dict[str, dict[int, Outcome | None]]:
        wanted = {
            (name, seed): dataclasses.replace(
                self._trial("evaluate", arm, {}, seed), settings=self._settings(arm)
            )
            for seed in self.seeds
            for name, arm in self.protocol.arms.items()
        }  # fmt: skip
        trials = list({trial.key: trial for trial in wanted.values()}.values())
        self.watch.stage("seeds", len(trials))
        self._run(trials)
        self.watch.end_stage()
        found: dict[str, dict[int, Outcome | None]] = {name: {} for name in self.protocol.arms}
        for (name, seed), trial in wanted.items():
            found[name][seed] = self.outcomes.get(trial.key)
        return found

    @staticmethod
    def _raise_failures(evaluated: Mapping[str, Mapping[int, Outcome | None]]) -> None:
        """Smoke exists to find what does not run; elsewhere a failed trial is recorded and told."""
        for name, by_seed in evaluated.items():
            for seed, outcome in by_seed.items():
                if outcome is not None and outcome.status == "failed":
                    raise StudyError(f"smoke: the trial of arm {name!r}, seed {seed}, failed:\n{outcome.error}")

    def _run(self, trials: Sequence[Trial]) -> list[Outcome | None]:
        outcomes = run_trials(
            trials,
            self.study.run,
            self.store,
            workers=self.options.workers,
            engine=self.options.engine,
            on_done=lambda trial, outcome: self.watch.advance(),
            commit=self.commit,
        )
        self.outcomes.update({t.key: o for t, o in zip(trials, outcomes, strict=True) if o is not None})
        return outcomes

    def _values(self, seeds: Sequence[Seed]) -> dict[str, dict[str, list[float]]]:
        """Every estimand is computed at every scale, so that smoke runs them, too."""
        found: dict[str, dict[str, list[float]]] = {}
        for claim in self.card.claims:
            if claim.id in self.study.estimands:
                try:
                    found[claim.id] = claim_values(self.study, claim, seeds)
                    if claim.id in self.study.regimes:
                        self.study.regimes[claim.id](seeds)
                except MissingTrial:
                    continue  # the verdict says which trial it needs
        if self.smoke:
            for name, cases in self.study.exact.items():
                if not cases():
                    raise ValueError(f"claim {name!r}: an exact claim needs at least one case")
        return found


def default_workers(scale: str = "laptop") -> int:
    """One process a core that this process may use; at paper scale one a GPU, where there is one."""
    if scale == "paper":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
