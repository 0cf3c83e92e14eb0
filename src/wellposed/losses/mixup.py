"""Mixup: train on convex combinations of pairs of examples and of their targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..batching import batch_size, cut, map_tensors
from ..hyperparameter import Hyperparameter, check_strength, number_of
from ..regularizer import Regularizer
from ..step import Step


def mix(value: Any, coefficient: Float[Tensor, batch], permutation: Int[Tensor, batch]) -> Any:
    """`c * value + (1 - c) * value[permutation]` for every floating tensor of a nested batch.

    Args:
        value: a tensor (batch, ...), or a tuple or dict of such.
        coefficient: c, the weight of each example itself.
        permutation: each example's partner.

    Raises:
        TypeError: for a tensor that is not floating (token ids cannot be mixed).

    Example:
        >>> mix(torch.tensor([[0.0], [1.0]]), torch.tensor([0.75, 0.75]), torch.tensor([1, 0]))
        tensor([[0.2500],
                [0.7500]])
    """

    def one(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise TypeError(f"Mixup: inputs must be floating tensors, got {tensor.dtype}; mix embeddings instead")
        weight = coefficient.to(tensor).reshape(-1, *[1] * (tensor.ndim - 1))
        return torch.lerp(tensor[permutation], tensor, weight)

    return map_tensors(one, value)


def draw_coefficients(size: int, alpha: float, generator: torch.Generator | None, per_sample: bool) -> Tensor:
    """(size,) draws c = max(b, 1 - b), b ~ Beta(alpha, alpha): one for the whole batch unless `per_sample`."""
    # torch's Beta cannot take a generator, so NumPy draws, from a seed that the step's generator gives.
    seed = int(torch.randint(2**62, (), generator=generator))
    draws = np.random.default_rng(seed).beta(alpha, alpha, size if per_sample else 1)
    return torch.from_numpy(np.maximum(draws, 1.0 - draws)).float().expand(size)


class Mixup(Regularizer):
    """Mixup (Zhang et al. 2018, arXiv 1710.09412): mixes inputs and targets of each batch with a shuffled copy.

    Integer targets become probabilities over the classes; real targets are mixed as they are. The partner's
    position and the weight of the example itself go to `step.extra["partner"]` and `step.extra["mix"]`, for methods
    that keep a memory per example.

    Args:
        alpha: parameter of the Beta distribution, > 0; small values mix rarely. A float or a `Hyperparameter`, which
            `wellposed.tuning.SelfTuner` can learn.
        num_classes: width of the probabilities; None reads it from the model's output once.
        per_sample: draw a coefficient for each example instead of one for each batch.

    Raises:
        ValueError: if alpha is not positive.

    Example:
        >>> inputs, targets = Mixup(alpha=1.0, num_classes=2).mixed(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> inputs.shape, targets.shape
        (torch.Size([4, 3]), torch.Size([4, 2]))
    """

    def __init__(
        self, alpha: float | Hyperparameter = 0.2, num_classes: int | None = None, per_sample: bool = False
    ) -> None:
        super().__init__()
        check_strength("Mixup", "alpha", alpha)
        if alpha == 0:
            raise ValueError(f"Mixup: alpha must be > 0, got {alpha!r}; without mixup, leave the method out")
        self.alpha = alpha
        self.num_classes = num_classes
        self.per_sample = per_sample

    def mixed(self, inputs: Any, targets: Tensor, generator: torch.Generator | None = None) -> tuple[Any, Tensor]:
        """Mixed inputs and targets, for a plain loop; `num_classes` must be known for integer targets."""
        step = Step(nn.Identity(), inputs=inputs, targets=targets, generator=generator)
        self.on_batch(step)
        return step.inputs, step.targets

    def on_batch(self, step: Step) -> None:
        size = batch_size(step)
        device = step.targets.device
        coefficient = draw_coefficients(size, number_of(self.alpha), step.generator, self.per_sample).to(device)
        permutation = torch.randperm(size, generator=step.generator).to(device)
        targets = step.targets
        if not targets.is_floating_point():
            if targets.ndim != 1:
                raise ValueError(f"Mixup: integer targets must have shape (batch,), got {tuple(targets.shape)}")
            targets = F.one_hot(targets, self._classes(step)).float()
        step.inputs = mix(step.inputs, coefficient, permutation)
        step.targets = mix(targets, coefficient, permutation)
        if step.index is not None:
            step.extra["partner"] = step.index[permutation.to(step.index.device)]
        step.extra["mix"] = coefficient

    def _classes(self, step: Step) -> int:
        if self.num_classes is None:
            first = cut(step.inputs, batch_size(step), 0, 1)
            outputs = step.forward(inputs=first, grad=False, training=False)
            self.num_classes = int((outputs if isinstance(outputs, Tensor) else outputs.logits).shape[-1])
        return self.num_classes
