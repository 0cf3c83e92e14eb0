"""A dirty corpus and a crooked task: digits learned upright with wrong labels, then adapted to rotated, imbalanced, noisy ones.

MNIST in disjoint blocks: each seed has images of its own. At smoke scale the digits that ship with scikit-learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...datasets.registry import load_dataset

CLASSES = 10
MINORITY_CLASSES, MINORITY_EXAMPLES = 5, 3
ADAPTATION_NOISE = 0.15
DEGREES = 30.0
MEAN, DEVIATION = 0.13, 0.3
TRAINING_IMAGES, BLOCK = 60_000, 5_000
SIZES = {"mnist": (700, 500, 500, 3300), "digits": (300, 300, 100, 400)}
"""Examples of pretraining, adaptation pool, validation and test."""
FIRST_EVALUATION_SEED = 1000

Source = Literal["mnist", "digits"]


@dataclass(frozen=True)
class RotatedDigits:
    """One draw of the problem. Inputs are float32 (examples, pixels), labels int64.

    Attributes:
        upright, upright_labels: pretraining examples, upright, with their TRUE labels (see `corrupted`).
        train, labels: adaptation examples, rotated and imbalanced, with the given labels, partly wrong.
        truth: their true labels.
        validation, validation_labels: rotated, balanced as they come, true labels.
        test, test_labels: likewise.
        minority: which classes were cut.
    """

    upright: Float[Tensor, "upright pixels"]
    upright_labels: Int[Tensor, " upright"]
    train: Float[Tensor, "train pixels"]
    labels: Int[Tensor, " train"]
    truth: Int[Tensor, " train"]
    validation: Float[Tensor, "validation pixels"]
    validation_labels: Int[Tensor, " validation"]
    test: Float[Tensor, "test pixels"]
    test_labels: Int[Tensor, " test"]
    minority: Bool[Tensor, " classes"]


def rotated_digits(seed: int, source: Source = "mnist") -> RotatedDigits:
    """Draw blocks, minority classes and label noise.

    Args:
        seed: of MNIST, seeds from 1000 take one of twelve disjoint blocks of 5000 training images each, and seeds below
            one of two blocks of the 10,000 test images, all cut from one fixed permutation; of the digits, a new split.
        source: "mnist" or "digits".

    Raises:
        DatasetNotInstalled: saying how to get MNIST with `wellposed data get`.
        ValueError: for an unknown source.

    Example:
        >>> problem = rotated_digits(1000, "digits")
        >>> len(problem.upright), int(problem.minority.sum()), problem.train.shape[1]
        (300, 5, 64)
    """
    if source not in SIZES:
        raise ValueError(f"rotated_digits: source must be one of {sorted(SIZES)}, got {source!r}")
    images, targets = _images(source)
    generator = torch.Generator().manual_seed(seed)
    rows = _block(seed) if source == "mnist" else torch.arange(len(targets))
    rows = rows[torch.randperm(len(rows), generator=generator)]
    upright, pool, validation, test = rows[: sum(SIZES[source])].split(SIZES[source])
    minority = torch.zeros(CLASSES, dtype=torch.bool)
    minority[torch.randperm(CLASSES, generator=generator)[:MINORITY_CLASSES]] = True
    pool = _imbalanced(pool, targets[pool], minority)
    truth = targets[pool]
    return RotatedDigits(
        _scaled(images[upright]), targets[upright],
        _scaled(rotated(images[pool])), corrupted(truth, ADAPTATION_NOISE, generator), truth,
        _scaled(rotated(images[validation])), targets[validation],
        _scaled(rotated(images[test])), targets[test],
        minority,
    )  # fmt: skip


def corrupted(labels: Int[Tensor, " examples"], rate: float, generator: torch.Generator) -> Int[Tensor, " examples"]:
    """A share `rate` of the labels, rounded to a number of examples, replaced by another class, drawn uniformly.

    Example:
        >>> labels = torch.zeros(10, dtype=torch.int64)
        >>> int((corrupted(labels, 0.3, torch.Generator().manual_seed(0)) != labels).sum())
        3
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"corrupted: rate must lie in [0, 1], got {rate}")
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    moved = torch.randint(1, CLASSES, (len(chosen),), generator=generator)
    given = labels.clone()
    given[chosen] = (labels[chosen] + moved) % CLASSES
    return given


def rotated(images: Float[Tensor, "batch 1 side side"], degrees: float = DEGREES) -> Float[Tensor, "batch 1 side side"]:
    """Images turned counter-clockwise around their centre, bilinearly; what comes from outside is black (0).

    Example:
        >>> image = torch.zeros(1, 1, 3, 3)
        >>> image[0, 0, 1, 2] = 1.0
        >>> rotated(image, 90.0)[0, 0].round().tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    angle = math.radians(degrees)
    # `affine_grid` maps output to input positions, with the vertical axis downwards.
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _imbalanced(rows: Tensor, labels: Tensor, minority: Tensor) -> Tensor:
    """All rows of the majority classes, and the first three of each minority class, in their order."""
    place = torch.stack([(labels == c).cumsum(0) for c in range(CLASSES)])[labels, torch.arange(len(labels))]
    return rows[~minority[labels] | (place <= MINORITY_EXAMPLES)]


def _scaled(images: Tensor) -> Tensor:
    return ((images - MEAN) / DEVIATION).flatten(1)


def _block(seed: int) -> Tensor:
    """Rows of a seed's block: of the test images while tuning, else of the training images."""
    order = np.random.default_rng(0)
    train = order.permutation(TRAINING_IMAGES)
    held_out = TRAINING_IMAGES + order.permutation(2 * BLOCK)
    rows = train if seed >= FIRST_EVALUATION_SEED else held_out
    number = seed % FIRST_EVALUATION_SEED % (len(rows) // BLOCK)
    return torch.from_numpy(rows[number * BLOCK : (number + 1) * BLOCK])


@cache
def _images(source: Source) -> tuple[Tensor, Tensor]:
    data = load_dataset(source)
    images = torch.from_numpy(data.inputs)
    # MNIST is pooled to 14 x 14; the 8 x 8 digits stay what they are.
    return F.avg_pool2d(images, 2) if source == "mnist" else images, torch.from_numpy(data.targets)
