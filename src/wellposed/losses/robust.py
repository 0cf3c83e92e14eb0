"""Losses that tolerate wrong labels: generalized and symmetric cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step


def _log_likelihood(logits: Tensor, targets: Tensor, owner: str) -> Tensor:
    if targets.is_floating_point() or targets.ndim != 1:
        raise ValueError(
            f"{owner}: targets must be integer classes of shape (batch,), got {targets.dtype} of shape "
            f"{tuple(targets.shape)}; the loss is defined for hard labels only"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return -F.cross_entropy(logits, targets, reduction="none")


def generalized_cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Shaped[Tensor, ...], q: float | Tensor = 0.7
) -> Float[Tensor, batch]:
    """`(1 - p_y^q) / q`, unreduced: cross-entropy as q -> 0, `1 - p_y` at q = 1.

    Its gradient in the logits is `p_y^q (p - y)`: cross-entropy's, faded on examples that the model disbelieves.
    Source: Zhang and Sabuncu 2018 (arXiv 1805.07836), eq. 6.

    Args:
        logits: (batch, classes).
        targets: (batch,) integer classes.
        q: in (0, 1].

    Raises:
        ValueError: for soft targets.

    Example:
        >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), q=1.0)
        tensor([0.5000])
    """
    # expm1 keeps the digits that 1 - p^q loses where p is close to 1 or q close to 0.
    return -torch.expm1(q * _log_likelihood(logits, targets, "GeneralizedCrossEntropy")) / q


def symmetric_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    targets: Shaped[Tensor, ...],
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 1.0,
    log_zero: float = -4.0,
) -> Float[Tensor, batch]:
    """`alpha * CE + beta * RCE`, unreduced, with the reverse cross-entropy `RCE = -log_zero (1 - p_y)`.

    Reverse cross-entropy swaps label and prediction; log 0 is replaced by `log_zero`. The gradient in the logits is
    `(alpha - beta * log_zero * p_y)(p - y)`. Source: Wang et al. 2019 (arXiv 1908.06112), eq. 7.

    Args:
        logits: (batch, classes).
        targets: (batch,) integer classes.
        alpha, beta: weights, >= 0.
        log_zero: < 0; -4 in the paper.

    Raises:
        ValueError: for soft targets.

    Example:
        >>> symmetric_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), alpha=0.0, beta=1.0)
        tensor([2.])
    """
    log_p = _log_likelihood(logits, targets, "SymmetricCrossEntropy")
    return -alpha * log_p + beta * log_zero * torch.expm1(log_p)


class GeneralizedCrossEntropy(Regularizer):
    """Generalized cross-entropy (GCE): replaces the task loss; see `generalized_cross_entropy`.

    Args:
        q: in (0, 1], a float or a `Hyperparameter`.

    Raises:
        ValueError: if q lies outside of (0, 1].

    Example:
        >>> float(GeneralizedCrossEntropy(q=1.0)(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        0.5
    """

    def __init__(self, q: float | Hyperparameter = 0.7) -> None:
        super().__init__()
        check_strength("GeneralizedCrossEntropy", "q", q, low=0.0, high=1.0)
        if q == 0:
            raise ValueError("GeneralizedCrossEntropy: q must lie in (0, 1], got 0; q -> 0 is cross-entropy")
        self.q = q

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, for a plain loop."""
        return generalized_cross_entropy(logits, targets, value_of(self.q)).mean()

    def loss(self, step: Step) -> Tensor:
        return generalized_cross_entropy(step.logits, step.targets, value_of(self.q))


class SymmetricCrossEntropy(Regularizer):
    """Symmetric cross-entropy (SCE, SL): replaces the task loss; see `symmetric_cross_entropy`.

    Args:
        alpha, beta: weights of cross-entropy and its reverse, floats or `Hyperparameter`s.
        log_zero: value of log 0, < 0.

    Raises:
        ValueError: if a weight is negative or log_zero is not.

    Example:
        >>> float(SymmetricCrossEntropy(alpha=0.0)(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        2.0
    """

    def __init__(
        self, alpha: float | Hyperparameter = 0.1, beta: float | Hyperparameter = 1.0, log_zero: float = -4.0
    ) -> None:
        super().__init__()
        check_strength("SymmetricCrossEntropy", "alpha", alpha)
        check_strength("SymmetricCrossEntropy", "beta", beta)
        if not log_zero < 0:
            raise ValueError(f"SymmetricCrossEntropy: log_zero must be < 0, got {log_zero}")
        self.alpha, self.beta, self.log_zero = alpha, beta, log_zero

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, for a plain loop."""
        return self._unreduced(logits, targets).mean()

    def loss(self, step: Step) -> Tensor:
        return self._unreduced(step.logits, step.targets)

    def _unreduced(self, logits: Tensor, targets: Tensor) -> Tensor:
        return symmetric_cross_entropy(logits, targets, value_of(self.alpha), value_of(self.beta), self.log_zero)
