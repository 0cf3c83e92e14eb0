"""Label smoothing: mix every target with the uniform distribution over the classes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from ..batching import IGNORE_INDEX
from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..objective import cross_entropy
from ..regularizer import Regularizer
from ..step import Step


def smoothed_cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    targets: Shaped[Tensor, ...],
    smoothing: Any = 0.1,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy against `(1 - smoothing) * target + smoothing / classes`, unreduced.

    With p the softmax of the logits: (1 - s) H(target, p) + s H(uniform, p).

    Args:
        logits: (batch, classes) or (batch, length, classes).
        targets: integer classes, or probabilities of the logits' shape; -100 marks a position without target.
        smoothing: s in [0, 1], a float or a tensor; (batch,) for one an example.

    Returns:
        (batch,) or (batch, length).

    Example:
        >>> import torch
        >>> smoothed_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), 0.1)
        tensor([1.3863])
    """
    hard = cross_entropy(logits, targets)
    uniform = -logits.log_softmax(-1).mean(-1).to(hard.dtype)
    if not targets.is_floating_point():
        uniform = uniform.where(targets != IGNORE_INDEX, uniform.new_zeros(()))
    if isinstance(smoothing, Tensor) and 0 < smoothing.ndim < hard.ndim:  # one for each sequence of a batch
        smoothing = smoothing.reshape(smoothing.shape + (1,) * (hard.ndim - smoothing.ndim))
    return hard * (1.0 - smoothing) + uniform * smoothing


class LabelSmoothing(Regularizer):
    """Label smoothing (Szegedy et al. 2016, section 7): replaces the task loss by `smoothed_cross_entropy`.

    Args:
        smoothing: weight of the uniform distribution, in [0, 1]; a float or a `Hyperparameter`.

    Raises:
        ValueError: if smoothing lies outside of [0, 1].

    Example:
        >>> import torch
        >>> criterion = LabelSmoothing(smoothing=0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    def __init__(self, smoothing: float | Hyperparameter = 0.1) -> None:
        super().__init__()
        check_strength("LabelSmoothing", "smoothing", smoothing, low=0.0, high=1.0)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, for a plain loop."""
        return smoothed_cross_entropy(logits, targets, value_of(self.smoothing)).mean()

    def loss(self, step: Step) -> Tensor:
        return smoothed_cross_entropy(step.logits, step.targets, value_of(self.smoothing))
