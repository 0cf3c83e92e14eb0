"""Handwritten digits with wrong labels: 1000 to train, 200 to validate (wrong labels too), 597 clean ones to test."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
TRAIN, VALIDATION, TEST = 1000, 200, 597

HUMAN_NOISE = (
    (0.650, 0.066, 0.072, 0.019, 0.019, 0.023, 0.019, 0.017, 0.085, 0.031),
    (0.043, 0.592, 0.015, 0.026, 0.017, 0.015, 0.014, 0.014, 0.016, 0.247),
    (0.055, 0.037, 0.632, 0.046, 0.059, 0.048, 0.050, 0.033, 0.024, 0.017),
    (0.040, 0.034, 0.079, 0.487, 0.043, 0.206, 0.047, 0.024, 0.021, 0.019),
    (0.039, 0.033, 0.070, 0.040, 0.488, 0.106, 0.039, 0.152, 0.021, 0.012),
    (0.033, 0.028, 0.053, 0.183, 0.040, 0.580, 0.027, 0.029, 0.012, 0.013),
    (0.038, 0.038, 0.084, 0.076, 0.051, 0.058, 0.594, 0.029, 0.020, 0.013),
    (0.040, 0.028, 0.024, 0.022, 0.051, 0.062, 0.023, 0.722, 0.017, 0.011),
    (0.082, 0.073, 0.022, 0.014, 0.021, 0.019, 0.016, 0.022, 0.683, 0.048),
    (0.042, 0.282, 0.017, 0.021, 0.018, 0.018, 0.012, 0.014, 0.026, 0.551),
)
"""How crowd workers mislabelled the ten classes of CIFAR-10, worst of three labels, 40.2 % wrong (CIFAR-10N,
Wei et al. 2022): row = true class, column = given class. Counted from the published labels, rounded."""

Noise = Literal["uniform", "other", "human"]


@dataclass(frozen=True)
class NoisyDigits:
    """One draw of the problem. Inputs are float32 (examples, 64) in [0, 1], labels int64.

    Attributes:
        train, validation, test: inputs.
        labels, validation_labels: given labels, partly wrong.
        truth: true labels of the training examples.
        test_labels: true labels.
    """

    train: Float[Tensor, "train pixels"]
    labels: Int[Tensor, " train"]
    truth: Int[Tensor, " train"]
    validation: Float[Tensor, "validation pixels"]
    validation_labels: Int[Tensor, " validation"]
    test: Float[Tensor, "test pixels"]
    test_labels: Int[Tensor, " test"]

    @property
    def wrong(self) -> Tensor:
        """Which training labels are wrong."""
        return self.labels != self.truth


def noisy_digits(seed: int, rate: float, noise: Noise = "uniform") -> NoisyDigits:
    """Split and corrupt the digits that ship with scikit-learn.

    Args:
        seed: re-draws the stratified splits and the noise.
        rate: share of labels that are drawn anew; ignored for "human".
        noise: what they are drawn from: "uniform" over all ten classes (so that a tenth stays right), "other" classes
            only, or "human": each class as crowd workers confused the classes of CIFAR-10.

    Raises:
        ValueError: for a rate outside of [0, 1] or an unknown noise.

    Example:
        >>> problem = noisy_digits(seed=0, rate=0.4, noise="other")
        >>> len(problem.train), len(problem.validation), len(problem.test), float(problem.wrong.float().mean())
        (1000, 200, 597, 0.4...)
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"noisy_digits: rate must lie in [0, 1], got {rate}")
    inputs, truth = _digits()
    rest, test = train_test_split(np.arange(len(truth)), test_size=TEST, stratify=truth, random_state=seed)
    train, validation = train_test_split(rest, test_size=VALIDATION, stratify=truth[rest], random_state=seed)
    generator = np.random.default_rng(seed)
    given = {id(part): corrupted(truth[part], rate, noise, generator) for part in (train, validation)}
    pick = [torch.from_numpy(a) for a in (
        inputs[train], given[id(train)], truth[train], inputs[validation], given[id(validation)], inputs[test],
        truth[test],
    )]  # fmt: skip
    return NoisyDigits(*pick)


def corrupted(labels: np.ndarray, rate: float, noise: Noise, generator: np.random.Generator) -> np.ndarray:
    """Labels, partly drawn anew, from their true values alone (never from labels that were changed before).

    Example:
        >>> import numpy as np
        >>> labels = np.repeat(np.arange(10), 1000)
        >>> float((corrupted(labels, 0.5, "uniform", np.random.default_rng(0)) != labels).mean())
        0.4...
    """
    if noise == "human":
        bounds = np.cumsum(np.asarray(HUMAN_NOISE), axis=1)
        draws = generator.random(len(labels)) * bounds[labels, -1]  # rows sum to 1 up to rounding
        return (draws[:, None] >= bounds[labels]).sum(1).astype(labels.dtype)
    if noise not in ("uniform", "other"):
        raise ValueError(f"noisy_digits: noise must be 'uniform', 'other' or 'human', got {noise!r}")
    chosen = generator.permutation(len(labels))[: round(rate * len(labels))]
    changed = labels.copy()
    if noise == "uniform":
        changed[chosen] = generator.integers(0, CLASSES, len(chosen))
    else:
        changed[chosen] = (labels[chosen] + generator.integers(1, CLASSES, len(chosen))) % CLASSES
    return changed


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = load_digits(return_X_y=True)
    return (inputs / 16).astype(np.float32), labels.astype(np.int64)
