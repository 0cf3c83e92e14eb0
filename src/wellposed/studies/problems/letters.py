"""Letter recognition, and a made-up mixture of classes within super-classes: fitted to the end, and over-confident.

On both a network reaches all training examples while the test error stays at 10 % or more, and classes resemble each
other: the regime in which confidences are worth mending.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...datasets.registry import load_dataset

SIZES = (1500, 500, 4000)
"""Examples to train, to validate and to test."""


@dataclass(frozen=True)
class Split:
    """One draw of a problem: float32 inputs, standardised by the training examples, and int64 labels."""

    train: Float[Tensor, "train features"]
    labels: Int[Tensor, " train"]
    validation: Float[Tensor, "validation features"]
    validation_labels: Int[Tensor, " validation"]
    test: Float[Tensor, "test features"]
    test_labels: Int[Tensor, " test"]
    classes: int


def letters(seed: int, sizes: tuple[int, int, int] = SIZES) -> Split:
    """A random part of letter recognition (Frey and Slate 1991): 16 attributes, 26 classes, 20,000 examples.

    Args:
        seed: re-draws which examples train, validate and test.
        sizes: examples to train, to validate and to test.

    Raises:
        DatasetNotInstalled: saying how to get it with `wellposed data get`.
        ValueError: if the sizes exceed the data.
    """
    inputs, labels = _letters()
    return _split(inputs, labels, 26, sizes, np.random.default_rng(seed))


def hierarchical_mixture(seed: int, sizes: tuple[int, int, int] = SIZES) -> Split:
    """Gaussians around 50 centres, five near each of ten super-centres, bent and mixed by a fixed random layer.

    In a latent space of 16 dimensions: super-centres `3 N(0, I)`, centres at `0.8 N(0, I)` from them, all halved, points at
    `0.6 N(0, I)` from their centre; then `x = B tanh(A z)` with Gaussian A (48 x 16) and B (48 x 48), scaled to preserve
    norms. The centres and maps never change.

    Args:
        seed: re-draws the examples.
        sizes: examples to train, to validate and to test.

    Example:
        >>> problem = hierarchical_mixture(seed=0, sizes=(60, 10, 20))
        >>> problem.train.shape, problem.classes
        (torch.Size([60, 48]), 50)
    """
    fixed, drawn = np.random.default_rng(0), np.random.default_rng(seed + 1)
    centres = 3.0 * fixed.standard_normal((10, 1, 16)) + 0.8 * fixed.standard_normal((10, 5, 16))
    first = fixed.standard_normal((48, 16)) / 4.0
    second = fixed.standard_normal((48, 48)) / np.sqrt(48.0)
    labels = drawn.integers(0, 50, sum(sizes))
    latent = centres.reshape(50, 16)[labels] / 2.0 + 0.6 * drawn.standard_normal((len(labels), 16))
    inputs = np.tanh(latent @ first.T) @ second.T
    return _split(inputs, labels, 50, sizes, drawn)


def _split(
    inputs: np.ndarray, labels: np.ndarray, classes: int, sizes: tuple[int, int, int], generator: np.random.Generator
) -> Split:
    if sum(sizes) > len(labels):
        raise ValueError(f"sizes must not exceed the {len(labels)} examples in all, got {sizes}")
    order = generator.permutation(len(labels))
    train, validation, test = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    # By the training examples alone: test examples must not decide how they are scaled.
    mean, deviation = inputs[train].mean(0), inputs[train].std(0)
    scaled = ((inputs - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    x, y = torch.from_numpy(scaled), torch.from_numpy(labels.astype(np.int64))
    return Split(x[train], y[train], x[validation], y[validation], x[test], y[test], classes)


@cache
def _letters() -> tuple[np.ndarray, np.ndarray]:
    data = load_dataset("letter")
    return data.inputs.astype(np.float64), data.targets
