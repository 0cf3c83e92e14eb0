"""Handwritten digits under fixed pixel noise: 400 to train, so that a network fits them all and errs on a fifth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10
TRAIN, VALIDATION, TEST = 400, 300, 1097
NOISE = 0.35
"""Standard deviation of the noise; pixels lie in [0, 1]."""


@dataclass(frozen=True)
class DigitsInPixelNoise:
    """One draw of the problem. Inputs are float32 (examples, 1, 8, 8), labels int64.

    Attributes:
        train, validation, test: noisy inputs; the noise belongs to the image, every pass sees the same.
        labels, validation_labels, test_labels: true classes.
    """

    train: Float[Tensor, "train 1 8 8"]
    labels: Int[Tensor, " train"]
    validation: Float[Tensor, "validation 1 8 8"]
    validation_labels: Int[Tensor, " validation"]
    test: Float[Tensor, "test 1 8 8"]
    test_labels: Int[Tensor, " test"]


def digits_in_pixel_noise(seed: int, noise: float = NOISE) -> DigitsInPixelNoise:
    """Split the digits that ship with scikit-learn, and add Gaussian noise to every pixel.

    Args:
        seed: re-draws the stratified split and the noise.
        noise: standard deviation, >= 0.

    Raises:
        ValueError: for a negative noise.

    Example:
        >>> problem = digits_in_pixel_noise(seed=0)
        >>> len(problem.train), len(problem.validation), len(problem.test)
        (400, 300, 1097)
    """
    if not noise >= 0:
        raise ValueError(f"digits_in_pixel_noise: noise must be >= 0, got {noise}")
    inputs, labels = _digits()
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=VALIDATION, stratify=labels[rest], random_state=seed)
    generator = np.random.default_rng(seed)
    noisy = inputs + noise * generator.standard_normal(inputs.shape, dtype=np.float32)
    parts = [torch.from_numpy(source[part]) for part in (train, validation, test) for source in (noisy, labels)]
    return DigitsInPixelNoise(*parts)


def convolutional_network(seed: int, dropout: float) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm (16 and 32 channels, the second of stride 2), then 512-96-10 with dropout.

    Args:
        seed: of the initialisation, which is torch's own.
        dropout: rate before the first linear layer.

    Example:
        >>> network = convolutional_network(seed=0, dropout=0.2)
        >>> sum(p.numel() for p in network.parameters() if p.ndim > 1)
        54864
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(512, 96), nn.ReLU(), nn.Linear(96, CLASSES),
        )  # fmt: skip


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = load_digits(return_X_y=True)
    return (inputs / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64)
