"""What a reader returns, and what it raises for damaged files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class DatasetError(ValueError):
    """A data set is unknown or damaged."""


@dataclass(frozen=True)
class Arrays:
    """A loaded data set.

    Attributes:
        inputs: float32 (examples, features), or images (examples, channels, height, width) in [0, 1].
        targets: int64 classes, or float32 values.
        task: "classification" or "regression".
        classes: names of the classes.
        features: names of the features, empty for images.
    """

    inputs: np.ndarray
    targets: np.ndarray
    task: str
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
