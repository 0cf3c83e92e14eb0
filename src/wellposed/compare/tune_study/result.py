"""`StudyTuneResult`: what the terminal, the page and the files say of a study's arm that was tuned."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...lab.trial import Outcome, Setting
from ..errors import UserError
from ..outcomes import best_seed, by_name, failure_note, first_error, good_seeds
from ..tune_options import APPLIED, UNTUNED
from ..tune_record import KIND, VERSION, TwoArms
from .job import LEDGER, FinishedStudy
from .snippet import learn_study, run_settings
from .training import HEADLINE

UNITS = ("points", "nats")
LABELS = {UNTUNED: "registered defaults", LEDGER: "the ledger's settings", APPLIED: "its values, fixed"}


@dataclass
class TriedArm:
    """One way to choose the settings; lists are by seed.

    Attributes:
        name, label: of it.
        scores: the study's metric; a seed that failed counts as the card says.
        seconds: wall time of a training, None where it failed.
        settings: of all seeds, or None where each seed learned its own.
        values: learned values by name, one a seed that finished.
        curves: by name, lists by seed.
        failures: seeds that diverged or failed.
        error: of the first of them.
    """

    name: str
    label: str
    scores: list[float]
    seconds: list[float | None]
    settings: dict[str, Setting] | None
    values: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    error: str | None = None


@dataclass
class StudyTuneResult(TwoArms[TriedArm]):
    """All that `wellposed tune STUDY` found; written to `results.json`."""

    slug: str
    title: str
    arm: str
    arm_label: str
    problem: str
    redraws: str
    score: str
    metric: str
    words: str
    unit: str
    lower_is_better: bool
    method: str
    method_label: str
    about: str
    arms: list[TriedArm]
    seeds: list[int]
    tuned_names: list[str]
    logs: list[str]
    history: list[tuple[dict[str, Setting], float | None]]
    tuning_seeds: int
    tuning_seconds: float
    ledger_rounds: int
    best_seed: int
    usage: str
    again: str
    command: str
    machine: dict[str, Any]
    fingerprint: str
    commit: str | None
    seconds: float
    notes: list[str] = field(default_factory=list)
    study: bool = True
    report: str = KIND
    version: int = VERSION

    def find(self, name: str) -> TriedArm | None:
        """An arm by name."""
        return next((arm for arm in self.arms if arm.name == name), None)


def collect_study(finished: FinishedStudy) -> tuple[StudyTuneResult, str | None]:
    """Gather what the trainings left behind.

    Returns:
        The result, and the schedule of the best seed as text; None where settings were fixed.

    Raises:
        UserError: if a training failed, and the card does not say what that counts as.
    """
    prepared, options = finished.prepared, finished.prepared.options
    method, worst = options.chosen, prepared.protocol.worst.get(prepared.metric)
    settings: dict[str, dict[str, Setting] | None] = {
        UNTUNED: prepared.defaults,
        LEDGER: prepared.ledger,
        method.name: None if finished.tuned is None else {**prepared.defaults, **finished.tuned.settings},
    }
    arms = [
        _arm(name, LABELS.get(name, method.label), by_seed, settings.get(name), prepared.metric, worst)
        for name, by_seed in finished.outcomes.items()
    ]
    # One number is below its worst value: less of it is better.
    lower = worst is not None and worst > plain.median(arms[0].scores)
    by_seed = finished.outcomes[method.name]
    best = best_seed(by_seed, finished.seeds) if finished.tuned is None else finished.seeds[0]
    chosen = by_seed[best].artifacts if best is not None else {}
    names = list(prepared.space) if method.search else prepared.learned
    words, _, unit = prepared.words.partition(", ")
    words, unit = (words, unit) if unit in UNITS else (prepared.words, "")
    notes = list(finished.notes)
    for arm in arms:
        notes += failure_note(arm.label, arm.failures, finished.seeds, f"{worst or 0.0:g}", arm.error)
    best_settings = settings[method.name] or {**prepared.defaults, **chosen.get("values", {})}
    slug, arm_name, seed = prepared.card.slug, prepared.arm.name, finished.seeds[0] if best is None else best
    result = StudyTuneResult(
        slug, prepared.card.name, arm_name, prepared.arm.label, prepared.protocol.problem,
        prepared.protocol.redraws, prepared.protocol.score, prepared.metric, words, unit, lower, method.name,
        method.label, f"{method.title}: {options.about}", arms, finished.seeds, names,
        [name for name in names if getattr(prepared.space[name], "log", False)],
        [] if finished.tuned is None else finished.tuned.history, finished.tuning_seeds, finished.tuning_seconds,
        prepared.ledger_rounds, seed,
        run_settings(slug, arm_name, best_settings, seed, prepared.metric),
        "" if method.search else learn_study(slug, arm_name, prepared.defaults, seed, method.name),
        options.command, finished.machine, finished.fingerprint, finished.commit, finished.seconds, notes,
    )  # fmt: skip
    return result, chosen.get("schedule")


def study_result_from(content: Mapping[str, Any]) -> StudyTuneResult:
    """The result that `results.json` holds.

    Raises:
        TypeError: if the content is that of another version.
    """
    rest = {**content, "arms": [TriedArm(**arm) for arm in content["arms"]]}
    rest["history"] = [(settings, score) for settings, score in content["history"]]
    return StudyTuneResult(**rest)


def _arm(
    name: str,
    label: str,
    by_seed: Mapping[int, Outcome],
    settings: dict[str, Setting] | None,
    metric: str,
    worst: float | None,
) -> TriedArm:
    good, error = good_seeds(by_seed), first_error(by_seed)
    failures = [seed for seed in by_seed if seed not in good]
    if failures and worst is None:
        raise UserError(f"{label}: the training of seed {failures[0]} failed ({error})")
    scores = []
    for seed in by_seed:
        found = good[seed].metrics if seed in good else {metric: float(worst or 0.0)}
        if HEADLINE not in found and metric not in found:
            raise UserError(f"this arm measures no '{metric}', but {', '.join(sorted(found))}: take another --arm")
        scores.append(found[HEADLINE] if HEADLINE in found else found[metric])
    seconds = [good[seed].seconds if seed in good else None for seed in by_seed]
    learned = [outcome for outcome in good.values() if HEADLINE in outcome.metrics]
    values, curves = by_name(o.artifacts["values"] for o in learned), by_name(o.curves for o in learned)
    return TriedArm(name, label, scores, seconds, settings, values, curves, failures, error)
