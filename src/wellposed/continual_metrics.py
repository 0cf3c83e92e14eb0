"""Metrics of learning one task after another: overall performance and backward transfer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def overall_performance(scores: Float[Tensor, "stages tasks"]) -> float:
    """Mean score on all tasks learned so far, after the last stage: OP of TRACE (Wang et al. 2023, arXiv 2310.06762).

    Args:
        scores: `scores[k, i]`, score on task i after stage k; task i is learned in stage i. Only the last row counts.

    Raises:
        ValueError: if scores is no square table, or its last row holds NaN.

    Example:
        >>> import torch
        >>> round(overall_performance(torch.tensor([[0.9, 0.1], [0.5, 0.7]])), 4)
        0.6
    """
    last = _checked("overall_performance", scores)[-1]
    if bool(last.isnan().any()):
        raise ValueError(f"overall_performance: the last row of scores holds NaN: {last.tolist()}")
    return float(last.mean())


def backward_transfer(scores: Float[Tensor, "stages tasks"], over: str = "earlier") -> float:
    """Mean of `scores[K, i] - scores[i, i]`: how a task's score changed since it was learned; negative is forgetting.

    Args:
        scores: `scores[k, i]`, score on task i after stage k; entries above the diagonal are not used and may be NaN.
        over: "earlier" divides by the K - 1 tasks before the last one (Lopez-Paz and Ranzato 2017, arXiv 1706.08840),
            "all" by all K, with 0 for the last (TRACE).

    Raises:
        ValueError: if scores is no square table, holds one task only, or NaN where it is used.

    Example:
        >>> import torch
        >>> round(backward_transfer(torch.tensor([[0.9, float("nan")], [0.5, 0.7]])), 4)
        -0.4
    """
    table = _checked("backward_transfer", scores)
    if over not in ("earlier", "all"):
        raise ValueError(f"backward_transfer: over must be 'earlier' or 'all', got {over!r}")
    if len(table) < 2:
        raise ValueError("backward_transfer: scores must hold at least two tasks: one task has nothing to forget")
    change = (table[-1] - table.diagonal())[:-1]
    if bool(change.isnan().any()):
        raise ValueError("backward_transfer: scores holds NaN in its last row or on its diagonal")
    return float(change.sum()) / (len(change) if over == "earlier" else len(table))


def _checked(owner: str, scores: Tensor) -> Tensor:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or scores.numel() == 0:
        raise ValueError(f"{owner}: scores must be a square table (stages, tasks), got shape {tuple(scores.shape)}")
    return scores.detach().double()
