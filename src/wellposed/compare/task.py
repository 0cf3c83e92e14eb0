"""`Task`: data split once, standardised by the training part, with labels flipped on request; the test set set aside."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import accuracy, balanced_accuracy, r2_score
from .errors import UserError
from .source import Source

SPLIT_SEED = 0
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
CONSTANT = 1e-10
"""A column whose standard deviation is below this share of its mean is constant but for rounding."""
IMBALANCE = 1.5
"""Above this ratio of the largest class to an equal share, accuracy would reward ignoring the small ones."""


@dataclass
class Task:
    """Prepared data.

    Attributes:
        name: shown to the user.
        kind: "classification" or "regression".
        inputs: float32 (rows, ...), standardised by the training part.
        targets: int64 classes, or float32 values standardised by the training part; without flips.
        parts: row numbers of "train", "validation" and "test".
        row_ids: number of each row in the user's data.
        classes: names of the classes.
        columns: number of features before encoding, 0 for images.
        noise: share of training and validation labels that are flipped.
        target_scale: standard deviation of the training targets, for regression.
        source_digest: of the data as read.
        notes: what a reader must know.
    """

    name: str
    kind: str
    inputs: np.ndarray
    targets: np.ndarray
    parts: dict[str, np.ndarray]
    row_ids: np.ndarray
    classes: tuple[str, ...] = ()
    columns: int = 0
    noise: float = 0.0
    target_scale: float = 1.0
    source_digest: str = ""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def prepare(cls, source: Source, noise: float = 0.0) -> Task:
        """Split a source and standardise it.

        Args:
            source: what `read_source` returned.
            noise: share of training and validation labels to flip, in [0, 1).

        Raises:
            UserError: for noise out of range or on regression.
        """
        if not 0 <= noise < 1:
            raise UserError(f"--noise must lie in [0, 1), got {noise:g}")
        if noise and source.kind == "regression":
            raise UserError("--noise flips labels: it applies to classification only")
        parts = split(source.targets if source.kind == "classification" else None, len(source.targets))
        inputs, targets, scale = source.inputs, source.targets, 1.0
        train = parts["train"]
        if inputs.ndim == 2:
            inputs = _standardised(inputs, train)
        if source.kind == "regression":
            mean, scale = float(targets[train].mean()), float(targets[train].std()) or 1.0
            targets = ((targets - mean) / scale).astype(np.float32)
        return cls(
            source.name, source.kind, inputs.astype(np.float32), targets, parts, source.row_ids, source.classes,
            source.columns, noise, scale, source.digest, list(source.notes),
        )  # fmt: skip

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.inputs.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Number of classes, or 1."""
        return len(self.classes) if self.kind == "classification" else 1

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in each part."""
        return {name: len(rows) for name, rows in self.parts.items()}

    @cached_property
    def metric(self) -> str:
        """ "accuracy", "balanced accuracy" where the largest class exceeds 1.5 times an equal share, or "R²"."""
        if self.kind == "regression":
            return "R²"
        counts = np.bincount(self.targets, minlength=self.num_outputs)
        return "balanced accuracy" if counts.max() > IMBALANCE * counts.mean() else "accuracy"

    @property
    def worst_score(self) -> float:
        """What a model that learned nothing scores: a diverged run counts as this."""
        return 0.0 if self.kind == "regression" else 100.0 / self.num_outputs

    @cached_property
    def digest(self) -> str:
        """Identifies data, split and noise."""
        digest = hashlib.sha256(f"{self.source_digest}{self.noise}{SPLIT_SEED}{sorted(SHARES.items())}".encode())
        digest.update(np.ascontiguousarray(self.inputs).tobytes())
        digest.update(np.ascontiguousarray(self.targets).tobytes())
        return digest.hexdigest()[:16]

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric in points (per cent); higher is better.

        Args:
            outputs: logits (rows, classes), or predictions (rows, 1).
            targets: (rows,).
        """
        if self.kind == "regression":
            return 100 * float(r2_score(outputs.reshape(-1), targets.reshape(-1)))
        function = balanced_accuracy if self.metric == "balanced accuracy" else accuracy
        return 100 * float(function(outputs, targets))

    def tensors(self, seed: int) -> dict[str, Tensor]:
        """Inputs and targets of every part; the flips of training and validation labels are drawn by `seed`.

        Test labels are never flipped. `true_targets` are the training labels before the flips.
        """
        found: dict[str, Tensor] = {}
        noisy = self.noisy_targets(seed)
        for name, rows in self.parts.items():
            found[f"{name}_inputs"] = torch.from_numpy(self.inputs[rows])
            found[f"{name}_targets"] = torch.from_numpy((self.targets if name == "test" else noisy)[rows])
        found["true_targets"] = torch.from_numpy(self.targets[self.parts["train"]])
        return found

    def noisy_targets(self, seed: int) -> np.ndarray:
        """(rows,) targets with a share `noise` of the training and validation labels replaced by another class."""
        if not self.noise:
            return self.targets
        random = np.random.default_rng([seed, 7])
        noisy = self.targets.copy()
        for name in ("train", "validation"):
            rows = self.parts[name]
            flipped = rows[random.random(len(rows)) < self.noise]
            shift = random.integers(1, self.num_outputs, len(flipped))
            noisy[flipped] = (noisy[flipped] + shift) % self.num_outputs
        return noisy

    def describe(self) -> str:
        """ "8,214 rows, 31 features, 2 classes (12.4 % positive)"."""
        rows = f"{len(self.targets):,} rows"
        if len(self.input_shape) == 3:
            channels, height, width = self.input_shape
            what = f"images {height}x{width}{'' if channels == 1 else f', {channels} channels'}"
        else:
            count = self.columns or self.input_shape[0]
            what = f"{count} feature{'s' if count > 1 else ''}"
        if self.kind == "regression":
            return f"{rows}, {what}, a number to predict"
        share = f" ({100 * self.targets.mean():.1f} % '{self.classes[1]}')" if self.num_outputs == 2 else ""
        return f"{rows}, {what}, {self.num_outputs} classes{share}"

    def describe_split(self) -> str:
        """How the rows were split, and what the result is measured in."""
        sizes = " / ".join(f"{count:,} {name.replace('train', 'training')}" for name, count in self.sizes.items())
        how = "stratified, " if self.kind == "classification" else ""
        flips = f" · {100 * self.noise:g} % of training and validation labels flipped" if self.noise else ""
        return f"split once: {sizes} ({how}seed {SPLIT_SEED}) · metric: {self.metric}{flips}"

    def save(self, folder: str | Path) -> None:
        """Write to a folder, so that worker processes can map the arrays instead of copying them."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = {"inputs": self.inputs, "targets": self.targets, "row_ids": self.row_ids, **self.parts}
        for name, array in arrays.items():
            draft = path / f"{name}.part.npy"
            np.save(draft, array)
            draft.replace(path / f"{name}.npy")
        facts: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("name", "kind", "classes", "columns", "noise", "target_scale", "source_digest", "notes")
        }
        (path / "task.json").write_text(json.dumps(facts, indent=1), "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Task:
        """Read what `save` wrote."""
        path = Path(folder)
        facts = json.loads((path / "task.json").read_text("utf-8"))
        facts["classes"] = tuple(facts["classes"])
        # Copy-on-write maps: shared among workers, yet writable for torch.
        read = {
            name: np.load(path / f"{name}.npy", mmap_mode="c") for name in ("inputs", "targets", "row_ids", *SHARES)
        }
        parts = {name: np.asarray(read.pop(name)) for name in SHARES}
        return cls(inputs=read["inputs"], targets=read["targets"], row_ids=read["row_ids"], parts=parts, **facts)


def split(labels: np.ndarray | None, rows: int, seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Disjoint row numbers of training, validation and test parts, sorted.

    Args:
        labels: classes to stratify by, or None.
        rows: number of rows.
        seed: of the split.

    Example:
        >>> {name: len(part) for name, part in split(None, 100).items()}
        {'train': 60, 'validation': 20, 'test': 20}
    """
    random = np.random.default_rng(seed)
    groups = [np.arange(rows)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    for group in groups:
        order = random.permutation(group)
        n_test = max(1, round(SHARES["test"] * len(order)))
        n_validation = max(1, round(SHARES["validation"] * len(order)))
        parts["test"].append(order[:n_test])
        parts["validation"].append(order[n_test : n_test + n_validation])
        parts["train"].append(order[n_test + n_validation :])
    return {name: np.sort(np.concatenate(rows)) for name, rows in parts.items()}


def _standardised(inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance in the training part; a column that is constant there is zero everywhere.

    What nothing was learned about must not decide a prediction, and its scale is unknown.
    """
    mean = inputs[train].mean(0, dtype=np.float64)
    scale = inputs[train].std(0, dtype=np.float64)
    # The mean of equal numbers is rounded, so that their deviation is tiny instead of zero.
    varies = scale > CONSTANT * np.abs(mean)
    return np.asarray(np.where(varies, (inputs - mean) / np.where(varies, scale, 1.0), 0.0), np.float32)
