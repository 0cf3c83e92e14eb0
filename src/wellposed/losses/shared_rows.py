"""Where the rows of a batch's matrix are: all in this process, or in several that share the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..step import Step


class Rows:
    """Where the rows of a matrix are: all of them here. `SharedRows` knows of those on other ranks."""

    def count(self, own: Tensor) -> int:
        """Number of rows of the whole matrix."""
        return len(own)

    def widen(self, own: Float[Tensor, "own columns"]) -> Float[Tensor, "own widest"]:
        """The rows that are here with columns of zeros on the right, where those elsewhere are longer."""
        return own

    def join(self, own: Float[Tensor, "own columns"]) -> Float[Tensor, "rows columns"]:
        """The whole matrix of the rows that are here."""
        return own

    def own(self, whole: Float[Tensor, "rows columns"]) -> Float[Tensor, "own columns"]:
        """The rows that are here, of a whole matrix."""
        return whole

    def total(self, own: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The sum of such a tensor over all ranks."""
        return own

    def norm(self, own: Float[Tensor, "own columns"]) -> Float[Tensor, ""]:
        """Frobenius norm of the whole matrix."""
        return own.norm()


class SharedRows(Rows):
    """Rows of a batch that several ranks share: statistics of all of them, by exchanges that gradients pass through.

    Every rank then computes the same number, whose gradient reaches the rows of all ranks; the loop's mean over ranks
    makes it that of one process on the joined batch. Ranks may have different numbers of rows, but not of micro-batches:
    the exchanges of one would wait for the other's.

    Args:
        owner: who asks, for messages.
        own: rows of this rank, (rows, columns).
        micro_batches: into how many this rank cut its share.

    Raises:
        ValueError: on every rank, if they cut their shares into different numbers of micro-batches.
    """

    def __init__(self, owner: str, own: Tensor, micro_batches: int) -> None:
        table = torch.zeros(dist.get_world_size(), 3, dtype=torch.int64, device=own.device)
        table[dist.get_rank()] = torch.tensor([len(own), own.shape[1], micro_batches])
        dist.all_reduce(table)
        sizes, widths, parts = table.T.tolist()
        if len(set(parts)) > 1:
            raise ValueError(
                f"{owner}: its term couples the examples of a batch over all ranks, but these cut their shares into "
                f"{parts} micro-batches; give every rank at least as many examples as accumulation counts"
            )
        self._all, self._width, self._ranks = sum(sizes), max(widths), len(sizes)
        self._start = sum(sizes[: dist.get_rank()])
        self._stop = self._start + len(own)

    def count(self, own: Tensor) -> int:
        return self._all

    def widen(self, own: Tensor) -> Tensor:
        return F.pad(own, (0, self._width - own.shape[1]))

    def join(self, own: Tensor) -> Tensor:
        # A sum with zeros: as exact as a gather, for shares of any size, and its derivative is the same sum.
        return self.total(F.pad(own, (0, 0, self._start, self._all - self._stop)))

    def own(self, whole: Tensor) -> Tensor:
        return whole[self._start : self._stop]

    def total(self, own: Tensor) -> Tensor:
        found: Tensor = _Total.apply(own)
        return found

    def norm(self, own: Tensor) -> Tensor:
        rank = dist.get_rank()
        return self.total(F.pad(own.norm()[None], (rank, self._ranks - 1 - rank))).norm()


class _Total(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the gradients, to any order."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        found = own.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = _Total.apply(gradient)
        return found


def rows_of(owner: str, own: Tensor, step: Step) -> Rows:
    """Whether other ranks hold further rows of the step's batch, and how many.

    Args:
        owner: who asks, for messages.
        own: rows of this rank, (rows, columns).
        step: whose `replicas` tells.

    Raises:
        ValueError: see `SharedRows`.
    """
    return Rows() if step.replicas == 1 else SharedRows(owner, own, step.micro_batches)
