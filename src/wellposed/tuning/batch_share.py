"""One process's share of a batch: its examples' places in the whole batch, and gradients averaged over all shares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..batching import as_batch, batch_size
from ..loading import distributed, rank
from .bilevel_updates import averaged_over_ranks


def count_examples(batch: Any, owner: str) -> int:
    """Examples of a batch.

    Args:
        batch: as a loader yields it.
        owner: named in the error.

    Raises:
        ValueError: for a batch that does not tell.

    Example:
        >>> count_examples((torch.zeros(3, 2), torch.zeros(3)), "SelfTuner")
        3
    """
    try:
        return batch_size(as_batch(batch))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: hyperparameters with per_example=True need batches of (inputs, targets), a dict or a Batch, "
            f"got {type(batch).__name__}"
        ) from error


def places_in_whole_batch(rows: int, device: torch.device) -> tuple[int, int, int]:
    """How many examples other processes hold before this one's, how many it holds, and how many come after.

    Args:
        rows: examples that this process holds.
        device: on which the processes exchange their numbers.

    Example:
        >>> places_in_whole_batch(4, torch.device("cpu"))  # one process
        (0, 4, 0)
    """
    if not distributed():
        return 0, rows, 0
    mine = torch.tensor([rows], device=device)
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    sizes = [int(size) for size in found]
    return sum(sizes[: rank()]), rows, sum(sizes[rank() + 1 :])


def average_gradients(parameters: Iterable[Tensor], loss: Tensor) -> Tensor:
    """Average the gradients of all parameters, and the loss, over the processes that share the batch.

    Args:
        parameters: those without a gradient are passed over.
        loss: of this process.

    Returns:
        The mean loss.

    Example:
        >>> average_gradients([torch.ones(2)], torch.tensor(0.5))  # one process
        tensor(0.5000)
    """
    if not distributed():
        return loss
    held = [p for p in parameters if p.grad is not None]
    *gradients, loss = averaged_over_ranks([*(p.grad for p in held if p.grad is not None), loss])
    for parameter, gradient in zip(held, gradients, strict=True):
        parameter.grad = gradient
    return loss
