"""The training objective of one micro-batch: task loss and penalties, weighted, masked and normalised in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batching import IGNORE_INDEX
from .regularizer import Regularizer
from .step import Step

Criterion = Callable[[Any, Any], Tensor]
"""`criterion(outputs, targets)` -> unreduced task loss, (batch,) or (batch, length)."""


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Unreduced cross-entropy of classification or language modelling, computed in at least float32.

    Args:
        outputs: logits (batch, classes) or (batch, length, classes), or an object with such `.logits`.
        targets: integer classes (batch,) or (batch, length), or probabilities of the logits' shape.

    Returns:
        (batch,) or (batch, length); 0 where an integer target is -100.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if targets.is_floating_point():
        loss: Tensor = -(targets.to(logits.dtype) * logits.log_softmax(-1)).sum(-1)
        return loss
    if logits.ndim == 3:
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORE_INDEX)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)


def squared_error(outputs: Any, targets: Tensor) -> Tensor:
    """Unreduced squared error of regression, averaged over the output dimensions of each example.

    Args:
        outputs: predictions (batch,) or (batch, outputs).
        targets: (batch,) or (batch, outputs).

    Returns:
        (batch,).

    Raises:
        ValueError: if predictions and targets hold different numbers of values, which would broadcast silently.

    Example:
        >>> squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 0.0]))
        tensor([0., 4.])
    """
    if outputs.numel() != targets.numel():
        raise ValueError(
            f"squared_error: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must hold equally "
            "many values"
        )
    batch = len(targets)
    difference: Tensor = outputs.reshape(batch, -1) - targets.reshape(batch, -1).to(outputs.dtype)
    return difference.square().mean(-1)


def objective(step: Step, regularizer: Regularizer, criterion: Criterion) -> Tensor:
    """This micro-batch's contribution to the objective of the whole accumulated batch; a scalar to call backward on.

    With w the example weights, N the number of examples (of valid tokens for per-token terms) of the whole batch
    over all ranks, and m micro-batches:

        sum_i w_i loss_i / N  +  sum over penalties of  (sum_i w_i penalty_i / N  or  penalty / m)

    so that gradients do not depend on how a batch was cut. Under data parallelism gradients are averaged over the
    ranks afterwards, hence the factor `replicas` on sums.
    """
    loss = regularizer.loss(step)
    total = _reduce(criterion(step.outputs, step.targets) if loss is None else loss, step)
    penalty = regularizer.penalty(step)
    if penalty is not None:
        for term in penalty if isinstance(penalty, list) else [penalty]:
            total = total + _reduce(term, step)
    return total


def _reduce(term: Tensor, step: Step) -> Tensor:
    if term.ndim == 0:
        return term / step.micro_batches
    if term.ndim > 2:
        raise ValueError(f"a loss or penalty must have shape (), (batch,) or (batch, length), got {tuple(term.shape)}")
    if step.weights is not None:
        weights = step.weights.to(term.dtype)
        if weights.ndim > term.ndim:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} (one per token) cannot weigh a loss or penalty of shape "
                f"{tuple(term.shape)} (one per example)"
            )
        term = term * weights.reshape(weights.shape + (1,) * (term.ndim - weights.ndim))
    if term.ndim == 1:
        return term.sum() * (step.replicas / step.num_examples)
    valid = step.valid
    if valid is not None:
        term = torch.where(valid, term, 0.0)
    return term.sum() * (step.replicas / step.normalizer)
