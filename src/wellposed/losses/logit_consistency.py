"""How far a fine-tuned model's predictions moved from its teacher's: Kullback-Leibler divergence, and distance of directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .logit_rows import float_logits


def kl_consistency(
    logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, ...],
    temperature: float = 2.0,
) -> Float[Tensor, "*batch"]:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, unreduced, in at least float32.

    The consistency term of BA-LoRA's final version (arXiv 2408.04556). It does not change when a constant is added to a row
    of the logits; for large T it tends to half the variance, over the classes, of the difference of the logits.

    Args:
        logits: (batch, classes) or (batch, length, classes).
        teacher_logits: of the same shape; no gradient flows into them. A class at minus infinity has no weight.
        temperature: T > 0.

    Returns:
        (batch,) or (batch, length); >= 0 up to rounding, and 0 with gradient 0 where both agree.

    Raises:
        ValueError: for shapes that differ, or T <= 0.

    Example:
        >>> kl_consistency(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])
    """
    _check_shapes("kl_consistency", logits, teacher_logits)
    check_temperature("kl_consistency", temperature)
    student = (float_logits(logits) / temperature).log_softmax(-1)
    teacher = (float_logits(teacher_logits.detach()) / temperature).log_softmax(-1).to(student.dtype)
    p = teacher.exp()
    # p log(p / q) tends to 0 with p, also where log p is minus infinity.
    terms = torch.where(p > 0, p * (teacher - student), 0.0)
    return terms.sum(-1) * temperature**2


def normalized_mse_consistency(
    logits: Float[Tensor, "*batch classes"], teacher_logits: Float[Tensor, ...]
) -> Float[Tensor, "*batch"]:
    """Mean square difference of the rows' directions, `2 (1 - cos) / classes`, unreduced.

    The consistency term of BA-LoRA's first version for understanding tasks (arXiv 2408.04556v5).

    Args:
        logits: (batch, classes) or (batch, length, classes).
        teacher_logits: of the same shape; no gradient flows into them.

    Returns:
        (batch,) or (batch, length).

    Raises:
        ValueError: for shapes that differ.

    Example:
        >>> normalized_mse_consistency(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor([1.])
    """
    _check_shapes("normalized_mse_consistency", logits, teacher_logits)
    student = F.normalize(float_logits(logits), dim=-1)
    teacher = F.normalize(float_logits(teacher_logits.detach()), dim=-1).to(student.dtype)
    return (student - teacher).square().mean(-1)


def teacher_confidence(
    teacher_logits: Float[Tensor, "*batch classes"], temperature: float = 2.0
) -> Float[Tensor, "*batch"]:
    """`1 - H(softmax(teacher / T)) / log(classes)`, in [0, 1], unreduced and without gradient.

    BA-LoRA's adaptive weight follows its mean: `strength * (0.1 + 0.9 * confidence)`.

    Args:
        teacher_logits: (batch, classes) or (batch, length, classes), at least two classes.
        temperature: T > 0.

    Raises:
        ValueError: for a single class, or T <= 0.

    Example:
        >>> teacher_confidence(torch.zeros(1, 4))
        tensor([0.])
    """
    check_temperature("teacher_confidence", temperature)
    classes = teacher_logits.shape[-1]
    if classes < 2:
        raise ValueError(f"teacher_confidence: teacher_logits must have at least 2 classes, got {classes}")
    log_p = (float_logits(teacher_logits.detach()) / temperature).log_softmax(-1)
    entropy = -torch.where(log_p.isinf(), 0.0, log_p.exp() * log_p).sum(-1)
    return 1.0 - (entropy / math.log(classes)).clamp(0.0, 1.0)


def check_temperature(owner: str, temperature: float) -> None:
    """Raise unless the temperature is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{owner}: temperature must be > 0 and finite, got {temperature}")


def _check_shapes(owner: str, logits: Tensor, teacher_logits: Tensor) -> None:
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{owner}: teacher_logits must have the shape of logits {tuple(logits.shape)}, got {tuple(teacher_logits.shape)}"
        )
