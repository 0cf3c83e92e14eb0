"""`TuneProblem`: a study's own training as a model with data, for methods that learn hyperparameters in one training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..hyperparameter import Hyperparameter
from ..indexed_dataset import TensorLoader
from ..objective import Criterion, cross_entropy
from ..regularizer import Regularizer


class NotTunable(ValueError):
    """A study does not offer an arm as a model with data."""


@dataclass(frozen=True)
class TuneProblem:
    """What one trial of a study trains, with hyperparameters in the place of the arm's floats.

    Attributes:
        model: as the trial begins with it.
        train, validation, test: what the trial trains on, chooses by, and measures.
        regularizer: the arm's method; it reads the hyperparameters.
        strengths: hyperparameters by the name of the setting whose place they take.
        epochs: of the training.
        optimizer: makes the trial's optimizer from parameter groups; what is learned is no part of it.
        factor: the learning rate's factor at a share of training in [0, 1).
        metric: (outputs, targets) of the test data -> the study's headline metric.
        criterion: the unreduced task loss.

    Raises:
        ValueError: if it offers no strength, or one that is not a hyperparameter of the method.
    """

    model: nn.Module
    train: TensorLoader
    validation: TensorLoader
    test: TensorLoader
    regularizer: Regularizer
    strengths: Mapping[str, Hyperparameter]
    epochs: int
    optimizer: Callable[[Any], Optimizer]
    factor: Callable[[float], float]
    metric: Callable[[Tensor, Tensor], float]
    criterion: Criterion = cross_entropy

    def __post_init__(self) -> None:
        if not self.strengths:
            raise ValueError("TuneProblem: strengths is empty; there is nothing to learn")
        held = {id(module) for module in self.regularizer.modules()}
        for name, strength in self.strengths.items():
            if id(strength) not in held:
                raise ValueError(f"TuneProblem: the strength {name!r} is no hyperparameter of the regularizer")
