"""Choosing from candidates of several sources: medoids, or as many of each source at random."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .greedy_medoids import Metric, cluster_sizes, facility_location, pairwise_similarity
from .source_shares import source_budgets


class Selection(NamedTuple):
    """What is trained on.

    Attributes:
        indices: (batch,) positions in the pool, ascending.
        weights: (batch,) of each example in the loss; None where all are 1.
    """

    indices: Tensor
    weights: Tensor | None


class Picks(NamedTuple):
    """What was chosen from the candidates.

    Attributes:
        places: (picks,) positions among the candidates.
        stands_for: (picks,) how many candidates each pick stands for.
    """

    places: Tensor
    stands_for: Tensor


class CandidateTable:
    """Candidates sorted into one row a source, as far as the largest source is long.

    Args:
        group: (candidates,) number of each candidate's source, from 0.
        sizes: (sources,) candidates of each.
        device: of the tables.

    Attributes:
        valid: (sources, longest) which entries exist.
        members: (sources, longest) positions among the candidates.

    Example:
        >>> table = CandidateTable(torch.tensor([1, 0, 1]), torch.tensor([1, 2]), torch.device("cpu"))
        >>> table.fill(torch.tensor([[7.0], [8.0], [9.0]]))[..., 0]
        tensor([[8., 0.],
                [7., 9.]])
    """

    def __init__(self, group: Int[Tensor, " n"], sizes: Int[Tensor, " sources"], device: torch.device) -> None:
        order = group.argsort(stable=True)
        first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
        column = torch.arange(len(group)) - first[group[order]]
        shape = (len(sizes), int(sizes.max()))
        self.order, self.place = order.to(device), (group[order].to(device), column.to(device))
        self.members = torch.zeros(shape, dtype=torch.int64, device=device)
        self.members[self.place] = self.order
        self.valid = torch.zeros(shape, dtype=torch.bool, device=device)
        self.valid[self.place] = True

    def fill(self, rows: Float[Tensor, "n h"]) -> Float[Tensor, "sources longest h"]:
        """The candidates' rows in their places, 0 elsewhere."""
        table = rows.new_zeros((*self.valid.shape, rows.shape[1]))
        table[self.place] = rows[self.order]
        return table


def medoids(
    features: Float[Tensor, "n h"],
    group: Int[Tensor, " n"],
    sizes: Int[Tensor, " sources"],
    shares: Int[Tensor, " sources"],
    metric: Metric,
    clusters: bool = False,
) -> Picks:
    """Medoids of each source by facility location, all sources in one loop.

    Args:
        features: of the candidates; only those of one source are compared.
        group: number of each candidate's source.
        sizes, shares: candidates of each source, and how many are picked.
        metric: see `pairwise_similarity`.
        clusters: let a pick stand for the candidates that are nearest to it; else for its source's average.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [5.0], [1.0]])
        >>> picks = medoids(features, torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1]), torch.tensor([2, 1]), "l1", True)
        >>> picks.places.tolist(), picks.stands_for.tolist()
        ([1, 2, 3], [2.0, 1.0, 1.0])
    """
    table = CandidateTable(group, sizes, features.device)
    similarity = pairwise_similarity(table.fill(features), metric, table.valid)
    found, _ = facility_location(similarity, shares.to(features.device), table.valid)
    there = found >= 0
    places = table.members.gather(1, found.clamp(min=0))[there].cpu()
    if clusters:
        return Picks(places, cluster_sizes(similarity, found, table.valid)[there].float().cpu())
    return Picks(places, (sizes / shares.clamp(min=1)).float()[group[places]])


def random_picks(
    group: Int[Tensor, " n"],
    sizes: Int[Tensor, " sources"],
    shares: Int[Tensor, " sources"],
    generator: torch.Generator,
) -> Picks:
    """The control: as many of each source, uniformly at random.

    Example:
        >>> group, sizes = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([4, 1])
        >>> picks = random_picks(group, sizes, torch.tensor([2, 1]), torch.Generator().manual_seed(0))
        >>> group[picks.places].tolist(), picks.stands_for.tolist()
        ([0, 0, 1], [2.0, 2.0, 1.0])
    """
    places = [any_of((group == q).nonzero()[:, 0], int(share), generator) for q, share in enumerate(shares)]
    return Picks(torch.cat(places), torch.repeat_interleave((sizes / shares.clamp(min=1)).float(), shares))


def any_of(positions: Int[Tensor, " n"], count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """A uniform random subset, in the order of the positions.

    Example:
        >>> len(any_of(torch.arange(9), 4, torch.Generator()))
        4
    """
    return positions[torch.randperm(len(positions), generator=generator)[:count].sort().values]


def grouped(sources: Int[Tensor, " n"], total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates' sources: the number of each candidate's source from 0, sizes, and shares of `total` picks.

    Example:
        >>> grouped(torch.tensor([7, 2, 7, 7]), 2)
        (tensor([1, 0, 1, 1]), tensor([1, 3]), tensor([1, 1]))
    """
    _, group, sizes = sources.unique(return_inverse=True, return_counts=True)
    return group, sizes, source_budgets(sizes, total)
