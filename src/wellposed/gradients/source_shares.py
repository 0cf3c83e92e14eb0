"""How many examples of each source a mini-batch coreset takes, and which sources are small."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def source_budgets(counts: Int[Tensor, " sources"], total: int) -> Int[Tensor, " sources"]:
    """Shares of `total` in proportion to the number of candidates of each source (CoLM, algorithm 1).

    `floor(total * n_q / n)` each; what is missing goes, one each, to the smallest shares, and among equal ones to the
    first. In integers: the floor of a rounded product gives other shares in some cases. Fewer units are missing than
    there are sources, and none exceeds its own size.

    Args:
        counts: candidates of each source, >= 0.
        total: how many are taken in all, in [0, sum of counts].

    Raises:
        ValueError: if a count is negative or total is out of range.

    Example:
        >>> source_budgets(torch.tensor([40, 30, 20, 3]), 29)
        tensor([12,  9,  7,  1])
    """
    if counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"source_budgets: counts must be >= 0, got {counts.tolist()}")
    everything = int(counts.sum())
    if not 0 <= total <= everything:
        raise ValueError(f"source_budgets: total must lie in [0, {everything}], the number of candidates, got {total}")
    if total == everything:
        return counts.to(torch.int64).clone()
    budgets = total * counts.to(torch.int64) // everything
    missing = total - int(budgets.sum())
    # A source without candidates can take nothing: it goes last.
    order = torch.where(counts > 0, budgets, total + 1).argsort(stable=True)
    budgets[order[:missing]] += 1
    return budgets


def small_sources(source_ids: Int[Tensor, " examples"]) -> frozenset[int]:
    """Sources with fewer examples than the average source: `|V_q| < |D| / c` (CoLM, section 4.1).

    Args:
        source_ids: the source of every example of a data set.

    Raises:
        ValueError: if there are none.

    Example:
        >>> sorted(small_sources(torch.tensor([7, 7, 7, 7, 2, 2, 5])))
        [2, 5]
    """
    if source_ids.numel() == 0:
        raise ValueError("small_sources: source_ids is empty")
    names, sizes = source_ids.unique(return_counts=True)
    return small_by_size(dict(zip(names.tolist(), sizes.tolist(), strict=True)))


def small_by_size(sizes: dict[int, int]) -> frozenset[int]:
    """The same from the number of examples of each source.

    Example:
        >>> sorted(small_by_size({0: 30, 1: 10, 2: 20}))
        [1]
    """
    total, count = sum(sizes.values()), len(sizes)
    return frozenset(source for source, size in sizes.items() if size * count < total)
