"""Facility location: greedy choice of medoids from a similarity matrix, or from one for each of several groups."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .lazy_greedy import lazy_greedy

Metric = Literal["l1", "l2", "cosine"]
METRICS = ("l1", "l2", "cosine")


def facility_location(
    similarity: Float[Tensor, "*groups n n"],
    budget: int | Int[Tensor, " groups"],
    valid: Bool[Tensor, "*groups n"] | None = None,
) -> tuple[Int[Tensor, "*groups budget"], Float[Tensor, "*groups budget"]]:
    """Greedy maximisation of `F(A) = sum_i max_{j in A} S_ij`: the medoids of a mini-batch.

    For `S >= 0` greedy reaches at least `1 - 1/e` of the best value (Nemhauser, Wolsey and Fisher 1978). A constant
    added to S changes no pick. Among equal gains the lowest position is taken: with features on a line ties are the
    rule, and a pick must not depend on the machine.

    Args:
        similarity: (n, n), or (groups, n, n) for several groups at once; `S[i, j]` is how well j stands for i.
        budget: number of picks; with groups one an entry, (groups,), or the same for all.
        valid: which rows and columns exist, where groups of different sizes are padded to one.

    Returns:
        The picks in their order, (budget,) or (groups, largest budget), -1 beyond a group's own budget; and what each
        pick added to F.

    Raises:
        ValueError: if a matrix is not square or not finite, or a budget is negative or larger than its group.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [5.0], [5.1], [5.2]])
        >>> picks, gains = facility_location(pairwise_similarity(points), 2)
        >>> picks.tolist()
        [2, 0]
    """
    if similarity.ndim not in (2, 3) or similarity.shape[-1] != similarity.shape[-2]:
        raise ValueError(
            f"facility_location: similarity must be (n, n) or (groups, n, n), got {tuple(similarity.shape)}"
        )
    matrices = _arrays(similarity)
    groups, n = matrices.shape[:2]
    members = (
        [np.arange(n)] * groups
        if valid is None
        else [row.nonzero()[0] for row in valid.cpu().reshape(groups, n).numpy()]
    )
    sizes = [len(own) for own in members]
    budgets = [budget] * groups if isinstance(budget, int) else budget.expand(groups).tolist()
    if any(not 0 <= wanted <= size for wanted, size in zip(budgets, sizes, strict=True)):
        raise ValueError(f"facility_location: budget must lie in [0, n] of its group, got {budgets} of {sizes}")
    picks = np.full((groups, max(budgets, default=0)), -1)
    gains = np.zeros(picks.shape, matrices.dtype)
    for number, (S, own, size) in enumerate(zip(matrices, members, sizes, strict=True)):
        # Padding at the end, the usual case, is left out without a copy.
        leading = size == 0 or own[-1] == size - 1
        found, added = lazy_greedy(S[:size, :size] if leading else S[:, own][own], budgets[number])
        picks[number, : len(found)] = found if leading else own[found]
        gains[number, : len(added)] = added
    chosen, values = torch.from_numpy(picks).to(similarity.device), torch.from_numpy(gains).to(similarity)
    return (chosen, values) if similarity.ndim == 3 else (chosen[0], values[0])


def _arrays(similarity: Tensor) -> np.ndarray:
    """(groups, n, n) on the host, in at least single precision."""
    S = similarity.detach().reshape(-1, *similarity.shape[-2:]).cpu()
    return (S.float() if S.dtype in (torch.float16, torch.bfloat16) else S).numpy()


def pairwise_similarity(
    features: Float[Tensor, "*groups n d"], metric: Metric = "l1", valid: Bool[Tensor, "*groups n"] | None = None
) -> Float[Tensor, "*groups n n"]:
    """`S_ij = (largest distance of the group) - |f_i - f_j|`, at least 0.

    Args:
        features: one row an example, (n, d) or (groups, n, d).
        metric: "l1" (the paper), "l2", or "cosine" (`1 - cos`).
        valid: which rows exist.

    Raises:
        ValueError: for an unknown metric.

    Example:
        >>> pairwise_similarity(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
        tensor([[3., 0.],
                [0., 3.]])
    """
    if metric not in METRICS:
        raise ValueError(f"pairwise_similarity: metric must be one of {list(METRICS)}, got {metric!r}")
    if metric == "cosine":
        unit = F.normalize(features, dim=-1)
        distance = 1.0 - unit @ unit.transpose(-1, -2)
    elif metric == "l2":
        # Distances by products of matrices would round close neighbours to one point.
        distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        distance = torch.cdist(features, features, p=1.0)
    if valid is not None:
        distance = distance.masked_fill(~(valid[..., :, None] & valid[..., None, :]), 0.0)
    return distance.amax((-1, -2), keepdim=True) - distance


def facility_location_value(similarity: Float[Tensor, "n n"], picks: Int[Tensor, " budget"]) -> Float[Tensor, ""]:
    """`F(A) = sum_i max_{j in A} S_ij` of a set of picks.

    Example:
        >>> float(facility_location_value(torch.eye(3), torch.tensor([0, 2])))
        2.0
    """
    return similarity[:, picks].amax(1).sum()


def cluster_sizes(
    similarity: Float[Tensor, "groups n n"],
    picks: Int[Tensor, "groups budget"],
    valid: Bool[Tensor, "groups n"],
) -> Int[Tensor, "groups budget"]:
    """How many examples each pick stands for: those to which it is the most similar pick of its group.

    An example between two picks counts for the earlier one; a pick that is not there (-1) stands for none.

    Example:
        >>> S = pairwise_similarity(torch.tensor([[[0.0], [0.1], [5.0]]]))
        >>> cluster_sizes(S, torch.tensor([[2, 0]]), torch.ones(1, 3, dtype=torch.bool))
        tensor([[1, 2]])
    """
    there = picks >= 0
    chosen = similarity.gather(2, picks.clamp(min=0)[:, None, :].expand(-1, similarity.shape[1], -1))
    nearest = chosen.masked_fill(~there[:, None, :], -torch.inf).argmax(2)
    counts = torch.zeros_like(picks)
    return counts.scatter_add_(1, nearest, valid.to(picks.dtype))
