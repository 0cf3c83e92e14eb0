"""One trial of a comparison: train one arm with one configuration and one seed, and measure it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..evaluation import predict
from ..fit import fit
from ..indexed_dataset import TensorLoader
from ..lab.trial import Setting, Trial, TrialResult
from ..objective import cross_entropy, squared_error
from ..papers.arms import load_arms
from ..step import DivergenceError, Step
from .arms import build_regularizer
from .models import default_model, load_user_model
from .task import Task

CURVE_EXAMPLES = 1000
CURVE_POINTS = 20
"""Curves are measured on at most so many examples of each part, after at most about so many epochs."""


def recipe(task: Task, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The arguments of `wellposed.fit` that all arms share: SGD with momentum under a cosine schedule.

    Args:
        task: the prepared data.
        settings: `learning_rate`, `epochs`, and `weight_decay` (0 if absent).
    """
    optimizer = partial(
        torch.optim.SGD,
        lr=float(settings["learning_rate"]),
        momentum=0.9,
        nesterov=True,
        weight_decay=float(settings.get("weight_decay", 0.0)),
    )
    return {
        "epochs": int(settings["epochs"]),
        "optimizer": optimizer,
        "scheduler": CosineAnnealingLR,
        "criterion": cross_entropy if task.kind == "classification" else squared_error,
        "clip_norm": 5.0,
    }


def run_trial(trial: Trial, folder: str, model: str | None = None) -> TrialResult:
    """Train and measure; what the laboratory's workers call.

    In the phase "tune" nothing of the test set is touched.

    Args:
        trial: arm, settings, seed and phase.
        folder: where the prepared task lies.
        model: `module:function` of the user's model, or None for the default.
    """
    task = _task(folder)
    arm = next(arm for arm in load_arms() if arm.name == trial.arm)
    data = task.tensors(trial.seed)
    regularizer = build_regularizer(arm, task, trial.settings)
    network = load_user_model(model, task, trial.seed) if model else default_model(task, trial.seed)
    evaluating = trial.phase == "evaluate"
    watch = _Curves(task, data, evaluating)
    result = fit(
        network,
        TensorLoader(data["train_inputs"], data["train_targets"], shuffle=True, seed=trial.seed),
        validation=TensorLoader(data["validation_inputs"], data["validation_targets"], batch_size=1024),
        regularizer=regularizer,
        seed=trial.seed,
        on_epoch_end=watch if evaluating else None,
        **recipe(task, trial.settings),
    )
    metrics = {
        "score": _score(task, result.model, data, "validation"),
        "train_seconds": sum(entry["seconds"] for entry in result.history),
        "epochs": float(len(result.history)),
    }
    artifacts: dict[str, Any] = {}
    if evaluating:
        metrics["test"] = _score(task, result.model, data, "test")
        metrics |= {f"test_{k}": v for k, v in _details(task, result.model, data).items()}
        if getattr(regularizer, "best_epoch", None) is not None:
            metrics["best_epoch"] = float(regularizer.best_epoch)  # type: ignore[union-attr, arg-type]
        if hasattr(regularizer, "label_issues"):
            flagged = regularizer.label_issues(data["train_targets"])  # type: ignore[union-attr, operator]
            if task.noise:
                wrong = data["train_targets"] != data["true_targets"]
                found = float((flagged & wrong).sum())
                metrics["issue_precision"] = found / max(1, int(flagged.sum()))
                metrics["issue_recall"] = found / max(1, int(wrong.sum()))
            artifacts["label_issues"] = np.flatnonzero(flagged.cpu().numpy()).tolist()
            artifacts["suggested"] = regularizer.soft_targets().argmax(1)[flagged].tolist()  # type: ignore[union-attr, operator]
    if not np.isfinite(list(metrics.values())).all():
        raise DivergenceError(f"{arm.name}: a metric of the trained model is not finite: {metrics}")
    return TrialResult(metrics, watch.curves, artifacts)


@cache
def _task(folder: str) -> Task:
    return Task.load(folder)


def _score(task: Task, model: nn.Module, data: dict[str, Tensor], part: str) -> float:
    return task.score(*_predict(model, data[f"{part}_inputs"], data[f"{part}_targets"]))


def _details(task: Task, model: nn.Module, data: dict[str, Tensor]) -> dict[str, float]:
    outputs, targets = _predict(model, data["test_inputs"], data["test_targets"])
    if task.kind == "regression":
        error = float((outputs.reshape(-1) - targets.reshape(-1)).square().mean().sqrt())
        return {"rmse": error * task.target_scale}
    return {"nll": float(cross_entropy(outputs, targets).mean())}


def _predict(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return predict(model, TensorLoader(inputs, targets, batch_size=1024))


class _Curves:
    """Scores after every epoch, for the report's figures; nothing is selected by them."""

    def __init__(self, task: Task, data: dict[str, Tensor], evaluating: bool) -> None:
        self.task, self.data = task, data
        self.curves: dict[str, list[float]] = {}
        generator = torch.Generator().manual_seed(0)
        if evaluating:
            self.rows = {
                part: torch.randperm(len(data[f"{part}_targets"]), generator=generator)[:CURVE_EXAMPLES]
                for part in ("train", "validation", "test")
            }
            self.wrong = (data["train_targets"] != data["true_targets"])[self.rows["train"]]

    def __call__(self, step: Step, entry: dict[str, float]) -> None:
        every = max(1, step.epochs // CURVE_POINTS)
        if step.epoch % every and not step.finished:
            return
        self._add("epoch", float(step.epoch))
        for part, rows in self.rows.items():
            outputs, targets = _predict(
                step.model, self.data[f"{part}_inputs"][rows], self.data[f"{part}_targets"][rows]
            )
            self._add(part, self.task.score(outputs, targets))
            if part == "train" and self.task.noise > 0:
                follows = (outputs.argmax(1) == targets)[self.wrong].float().mean()
                self._add("memorized", float(follows) * 100)

    def _add(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(round(value, 3))
