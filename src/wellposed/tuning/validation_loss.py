"""The validation loss of a problem's present parameters, over several batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..batching import as_batch, batch_size
from ..bilevel import BilevelProblem


@torch.no_grad()
def validation_loss(problem: BilevelProblem, batches: Iterator[Any], count: int | None = None) -> float:
    """Mean outer loss at the present parameters and hyperparameters, each batch weighed by its examples.

    Args:
        problem: whose outer loss it is.
        batches: of validation data.
        count: how many to take; by default one pass over the iterator's `loader`, or 1 where it has none.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, batch: (w["w"] * batch).sum()
        >>> weight = torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(None, loss, loss, {"w": weight}, {"h": Hyperparameter(1.0)})
        >>> validation_loss(problem, iter([1.0, 3.0]), count=2)
        2.0
    """
    raw = {name: h.raw for name, h in problem.hypers.items()}
    total = weight = 0.0
    for _ in range(count or pass_length(batches) or 1):
        batch = next(batches)
        size = _size(batch)
        total += size * float(problem.evaluate(problem.outer_loss, problem.params, raw, batch))
        weight += size
    return total / weight


def pass_length(batches: Any) -> int | None:
    """Batches in one pass over the loader behind an iterator, where it tells.

    Example:
        >>> from wellposed.loading import EndlessBatches
        >>> pass_length(EndlessBatches([1, 2, 3], "train")), pass_length(iter([1, 2, 3]))
        (3, None)
    """
    loader: Any = getattr(batches, "loader", None)
    return len(loader) if hasattr(loader, "__len__") else None


def _size(batch: Any) -> int:
    """Examples in a batch; 1 for what is no batch of examples, as in problems of plain tensors."""
    try:
        return batch_size(as_batch(batch))
    except (TypeError, ValueError):
        return 1
