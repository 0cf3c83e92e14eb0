"""MAID in `wellposed tune`: penalties of a linear model, one a feature, against one for all.

Nothing is random in such a training. A seed redraws which rows are for training and which for validation instead; the
test rows stay.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..integrations.scikit_learn import BilevelLogisticRegression, BilevelRidge
from ..lab.trial import Trial, TrialResult
from ..objective import cross_entropy, squared_error
from .task import Task
from .tune_options import SINGLE, UNTUNED

INITIAL = 0.1
"""Penalty of every feature before anything is learned, in units of standardised features."""

TOLERANCE = 1e-3
"""Norm of the hypergradient at which the descent ends: beyond it, work triples and the loss stays."""

HELD_OUT = 0.25
"""Share of the rows outside the test set that are for validation, as in the split of `wellposed compare`."""


def describe_linear(task: Task) -> str:
    """A few words."""
    features = int(np.prod(task.input_shape))
    kind = "logistic regression" if task.kind == "classification" else "ridge regression"
    return f"{kind}, {features} feature{'s' if features > 1 else ''} with a penalty each"


def redrawn(task: Task, seed: int) -> dict[str, np.ndarray]:
    """Rows of the three parts: the test rows stay, the others are divided anew, stratified by class."""
    random = np.random.default_rng([seed, 11])
    rows = np.sort(np.concatenate([task.parts["train"], task.parts["validation"]]))
    labels = task.targets[rows]
    groups = [rows] if task.kind == "regression" else [rows[labels == c] for c in np.unique(labels)]
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    for group in groups:
        order = random.permutation(group)
        held_out = min(len(order) - 1, max(1, round(HELD_OUT * len(order))))
        parts["validation"].append(order[:held_out])
        parts["train"].append(order[held_out:])
    return {**{name: np.sort(np.concatenate(found)) for name, found in parts.items()}, "test": task.parts["test"]}


def run_linear_trial(task: Task, trial: Trial) -> TrialResult:
    """Fit and measure: penalties all at `INITIAL`, one learned for all features, or one learned for each."""
    parts = redrawn(task, trial.seed)
    noisy = task.noisy_targets(trial.seed)
    inputs = task.inputs.reshape(len(task.inputs), -1)
    data = {name: (inputs[rows], (task.targets if name == "test" else noisy)[rows]) for name, rows in parts.items()}
    started = time.perf_counter()
    model = _estimator(task, trial.arm).fit(*data["train"], *data["validation"])
    metrics = {"train_seconds": time.perf_counter() - started, "trainings": 1.0, "kept": float(model.n_iter_)}
    criterion = cross_entropy if task.kind == "classification" else squared_error
    for name in ("validation", "test"):
        outputs, targets = _outputs(task, model, data[name][0]), torch.from_numpy(data[name][1])
        metrics[name] = task.score(outputs, targets)
        metrics[f"{name}_loss"] = float(criterion(outputs, targets).mean())
    penalty = [float(value) for value in model.penalty_]
    curves = {"features": [float(i + 1) for i in range(len(penalty))], "penalty": sorted(penalty)}
    artifacts = {
        "values": {f"penalty {number}": value for number, value in enumerate(penalty)},
        "schedule": None,
        "left_out": {},
        "certificate": model.certificate_,
    }
    return TrialResult(metrics, curves, artifacts)


def linear_usage(task: Task, penalty: str = "per_feature") -> str:
    """Lines of Python for data of one's own."""
    name = "BilevelLogisticRegression" if task.kind == "classification" else "BilevelRidge"
    chosen = "" if penalty == "per_feature" else repr(penalty)
    return "\n".join(
        [
            f"from wellposed.integrations import {name}",
            "",
            f"model = {name}({chosen}).fit(X, y, X_val, y_val)    # a linear model, not a network",
            "model.penalty_    # what was learned, for each feature",
            "model.predict(X_new)",
        ]
    )


def _estimator(task: Task, arm: str) -> Any:
    kind: Any = BilevelLogisticRegression if task.kind == "classification" else BilevelRidge
    penalty = "single" if arm == SINGLE else "per_feature"
    # Under an infinite tolerance the descent has converged where it begins: the same model at its initial penalties.
    return kind(penalty, initial_penalty=INITIAL, tol=math.inf if arm == UNTUNED else TOLERANCE)


def _outputs(task: Task, model: Any, X: np.ndarray) -> Tensor:
    """Log-probabilities (rows, classes), or predictions (rows, 1)."""
    if task.kind == "regression":
        return torch.from_numpy(np.asarray(model.predict(X), np.float32))[:, None]
    # A class that training lacks gets a probability that is tiny, but not zero: the loss stays finite.
    outputs = np.full((len(X), task.num_outputs), 1e-12)
    outputs[:, model.classes_.astype(int)] = np.maximum(model.predict_proba(X), 1e-12)
    return torch.from_numpy(np.log(outputs)).float()
