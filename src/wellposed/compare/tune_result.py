"""`TuneResult`: everything the terminal, the page and the files say about what was learned."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..lab.trial import Outcome
from .outcomes import best_seed, by_name, failure_note, first_error, good_seeds
from .task import Task
from .tune_job import FinishedTuning
from .tune_options import APPLIED, SINGLE, UNTUNED
from .tune_record import KIND, VERSION, TwoArms
from .tune_snippet import apply_values, learn_again, replay_schedule

THIRD = {APPLIED: "its values, fixed", SINGLE: "one penalty for all"}
"""Labels of the arms that say what a gain is made of."""

LINEAR = (
    "MAID learned the penalties of a linear model ({model}), not those of a network: the numbers here are not comparable "
    "with those of the other methods. Nothing in it is random; a seed redraws which rows are for training and which for "
    "validation."
)


@dataclass
class TuneArm:
    """One arm: the initial values, or the method; lists are by seed.

    Attributes:
        name, label: of the arm.
        scores: test score in points; a seed that failed counts as the worst.
        losses: test loss.
        validation_losses: validation loss of the checkpoint that was kept.
        seconds: wall time, None where it failed.
        trainings: whole trainings for one seed.
        kept: epoch (or training) whose weights were kept.
        values: learned values by label.
        curves: by name, lists by seed.
        failures: seeds that diverged or failed.
        error: of the first of them.
    """

    name: str
    label: str
    scores: list[float]
    losses: list[float]
    validation_losses: list[float]
    seconds: list[float | None]
    trainings: int
    kept: list[float]
    values: dict[str, list[float]]
    curves: dict[str, list[list[float]]]
    failures: list[int] = field(default_factory=list)
    error: str | None = None


@dataclass
class TuneResult(TwoArms[TuneArm]):
    """All that `wellposed tune` found; written to `results.json`."""

    name: str
    data: str
    split: str
    model: str
    metric: str
    kind: str
    test_rows: int
    method: str
    about: str
    arms: list[TuneArm]
    seeds: list[int]
    epochs: int
    strengths: list[dict[str, Any]]
    best_seed: int
    usage: str
    replay: str
    again: str
    command: str
    machine: dict[str, Any]
    fingerprint: str
    commit: str | None
    seconds: float
    notes: list[str] = field(default_factory=list)
    report: str = KIND
    version: int = VERSION

    @property
    def third(self) -> TuneArm | None:
        """The arm that says what the gain is made of, where there is one."""
        return self.arms[2] if len(self.arms) > 2 else None

    @property
    def loss_name(self) -> str:
        """What the loss is called."""
        return "log loss" if self.kind == "classification" else "squared error"


def collect_tuning(finished: FinishedTuning) -> tuple[TuneResult, str | None]:
    """Gather what the trainings left behind.

    Returns:
        The result, and the schedule of the best seed as text; None where values were fixed.
    """
    task, options, plan = finished.task, finished.options, finished.plan
    method = options.chosen
    untuned = _arm(UNTUNED, "initial values", finished.outcomes[UNTUNED], task)
    tuned = _arm(method.name, method.label, finished.outcomes[method.name], task)
    arms = [untuned, tuned]
    for name, label in THIRD.items():
        if name in finished.outcomes:
            arms.append(_arm(name, label, finished.outcomes[name], task))
    best = best_seed(finished.outcomes[method.name], finished.seeds)
    chosen = finished.outcomes[method.name][best].artifacts if best is not None else {}
    schedule = chosen.get("schedule")
    usage = replay = again = ""
    if plan is not None and chosen:
        usage = apply_values(plan, chosen["values"], finished.epochs)
        if schedule is not None:
            replay = replay_schedule(plan, plan.values(), str(options.output / "schedule.json"), finished.epochs)
            again = learn_again(plan, plan.values(), method.name, finished.epochs)
    elif chosen:
        from .tune_linear import linear_usage

        usage, again = linear_usage(task), linear_usage(task, "single")
    notes = list(finished.notes)
    if method.linear:
        notes.append(LINEAR.format(model=finished.model.split(",")[0]))
        notes += [f"certificate: {chosen['certificate']}"] if "certificate" in chosen else []
    for arm in arms:
        notes += failure_note(arm.label, arm.failures, finished.seeds, f"{task.worst_score:.0f} points", arm.error)
    left_out = set() if plan is None else set(plan.left_out)
    strengths: list[dict[str, Any]] = []
    if plan is None:
        names = options.features or tuple(map(str, range(len(chosen.get("values", ())))))
        shown = dict(zip(chosen.get("values", ()), (f"penalty of {name}" for name in names), strict=True))
        for arm in arms:
            arm.values = {shown.get(label, label): found for label, found in arm.values.items()}
        strengths = [{"label": "penalty", "labels": list(shown.values()), "log": True, "left_out": False}]
    else:
        for strength in plan.strengths:
            log = strength.hyper.chart == "exp"
            strengths.append(
                {"label": strength.label, "labels": strength.labels, "log": log, "left_out": strength.label in left_out}
            )
    result = TuneResult(
        task.name, task.describe(), task.describe_split(), finished.model, task.metric, task.kind, task.sizes["test"],
        method.name, f"{method.title}: {options.about}", arms, finished.seeds, finished.epochs, strengths,
        finished.seeds[0] if best is None else best, usage, replay, again, options.command, finished.machine,
        finished.fingerprint, finished.commit, finished.seconds, notes,
    )  # fmt: skip
    return result, schedule


def tune_result_from(content: Mapping[str, Any]) -> TuneResult:
    """The result that `results.json` holds.

    Raises:
        TypeError: if the content is that of another version.
    """
    return TuneResult(**{**content, "arms": [TuneArm(**arm) for arm in content["arms"]]})


def worst_loss(task: Task) -> float:
    """The loss of a model that learned nothing: a uniform prediction, or the mean of the training targets."""
    return math.log(task.num_outputs) if task.kind == "classification" else 1.0


def _arm(name: str, label: str, by_seed: Mapping[int, Outcome], task: Task) -> TuneArm:
    good = good_seeds(by_seed)

    def metric(key: str, worst: float) -> list[float]:
        return [good[seed].metrics[key] if seed in good else worst for seed in by_seed]

    return TuneArm(
        name, label, metric("test", task.worst_score), metric("test_loss", worst_loss(task)),
        metric("validation_loss", worst_loss(task)),
        [good[seed].metrics["train_seconds"] if seed in good else None for seed in by_seed],
        round(plain.median([o.metrics["trainings"] for o in good.values()] or [1.0])),
        [o.metrics["kept"] for o in good.values()], by_name(o.artifacts["values"] for o in good.values()),
        by_name(o.curves for o in good.values()), [seed for seed in by_seed if seed not in good], first_error(by_seed),
    )  # fmt: skip
