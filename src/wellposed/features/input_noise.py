"""Gaussian noise on the inputs of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batching import map_tensors
from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step


def by_example(value: Tensor, like: Tensor) -> Tensor:
    """A scalar, or one number for each example, shaped to multiply a batch.

    Raises:
        ValueError: if there are neither one value nor as many as examples.

    Example:
        >>> by_example(torch.ones(5), torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 1, 1, 1])
    """
    if value.ndim == 0:
        return value
    if value.ndim > 1 or len(value) not in (1, len(like)):
        raise ValueError(f"a value of each example must have shape ({len(like)},), got {tuple(value.shape)}")
    return value.reshape(-1, *(1,) * (like.ndim - 1))


class InputNoise(Regularizer):
    """Adds N(0, std^2) to every number of the inputs, anew in every training step; evaluation sees none.

    Args:
        std: standard deviation, >= 0, in the units of the inputs: a float or a `Hyperparameter`, with
            `per_example=True` possibly one for each example.

    Raises:
        ValueError: if std is negative; in training, if the inputs hold no floating tensor.

    Example:
        >>> step = Step(torch.nn.Identity(), inputs=torch.zeros(2, 3), generator=torch.Generator().manual_seed(0))
        >>> InputNoise(0.5).on_batch(step)
        >>> bool((step.inputs != 0).all())
        True
    """

    def __init__(self, std: float | Hyperparameter = 0.1) -> None:
        super().__init__()
        check_strength("InputNoise", "std", std)
        self.std = std

    def on_batch(self, step: Step) -> None:
        if not isinstance(self.std, Hyperparameter) and self.std == 0:
            return
        std: Any = value_of(self.std)
        found: list[Tensor] = []

        def noisy(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            found.append(x)
            # Drawn on the CPU, where the step's generator is.
            noise = torch.randn(x.shape, generator=step.generator, dtype=x.dtype).to(x.device)
            return x + noise * (by_example(std.to(x), x) if isinstance(std, Tensor) else std)

        step.inputs = map_tensors(noisy, step.inputs)
        if not found:
            raise ValueError("InputNoise: the inputs hold no floating tensor to add noise to")
