"""Logits as the penalties on them want them: in at least float32, and as one matrix of the rows that count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batching import IGNORE_INDEX


def float_logits(logits: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The logits in at least float32: entropies and singular values of half precision are mostly rounding.

    Example:
        >>> float_logits(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def valid_rows(
    logits: Float[Tensor, "*batch classes"], valid: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "rows classes"]:
    """The matrix whose rows are the logits of all examples, or of all valid tokens of a batch of sequences.

    Args:
        logits: (batch, classes) or (batch, length, classes).
        valid: which tokens count; None for all.

    Example:
        >>> valid_rows(torch.zeros(1, 3, 5), torch.tensor([[True, False, True]])).shape
        torch.Size([2, 5])
    """
    if logits.ndim == 3 and valid is not None:
        return logits[valid]
    return logits.reshape(-1, logits.shape[-1])


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of a causal model aligned: those at position t predict the label at t + 1.

    Args:
        logits: (batch, length, classes) as the model returns them.
        labels: (batch, length) at the positions of the inputs, -100 where there is none.

    Returns:
        (batch, length - 1, classes) and (batch, length - 1).

    Raises:
        ValueError: for other shapes.

    Example:
        >>> logits, targets = shifted(torch.zeros(1, 3, 5), torch.tensor([[-100, 4, 2]]))
        >>> logits.shape, targets.tolist()
        (torch.Size([1, 2, 5]), [[4, 2]])
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            "shift: logits must have shape (batch, length, classes) and labels (batch, length), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return logits[:, :-1], labels[:, 1:]


def valid_labels(labels: Tensor | None) -> Tensor | None:
    """Where labels (batch, length) are not -100; None for labels that are not sequences."""
    return None if labels is None or labels.ndim != 2 or labels.is_floating_point() else labels != IGNORE_INDEX
