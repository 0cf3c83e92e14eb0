"""Euclidean projection onto the simplex."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def project_to_simplex(v: Float[Tensor, "*batch"], radius: float = 1.0, dim: int = -1) -> Float[Tensor, "*batch"]:
    r"""Project along ``dim`` onto :math:`\{x : x \ge 0, \sum_i x_i = \text{radius}\}`; batched and exact.

    .. math:: x_i = \max(v_i - \tau, 0), \qquad
        \tau = \frac{1}{k} \Big(\sum_{i \le k} v_{(i)} - \text{radius}\Big)

    with :math:`v_{(1)} \ge v_{(2)} \ge \dots` and k the largest number for which :math:`v_{(k)} > \tau` (Held, Wolfe
    and Crowder 1974; Duchi et al. 2008, fig. 1). O(n log n); differentiable wherever the support does not change.
    Half precision is computed in float32 and cast back.

    Raises:
        ValueError: if ``radius`` is not positive and finite, or ``v`` has no entry along ``dim``.

    Example:
        >>> project_to_simplex(torch.tensor([0.5, 1.0, -2.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"project_to_simplex: radius must be > 0 and finite, got {radius}")
    if v.ndim == 0 or v.shape[dim] == 0:
        raise ValueError(f"project_to_simplex: v must have entries along dim {dim}, got shape {tuple(v.shape)}")
    wide = v.movedim(dim, -1).to(torch.promote_types(v.dtype, torch.float32))
    # Adding a constant does not change the projection. Without the shift the sums of large numbers would swallow
    # the radius: at v = 1e8 float32 has no digits left after the point.
    shifted = wide - wide.detach().amax(dim=-1, keepdim=True)
    ordered = shifted.sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[dim] + 1, device=v.device, dtype=wide.dtype)
    thresholds = (ordered.cumsum(dim=-1) - radius) / count
    support = (ordered > thresholds).sum(dim=-1, keepdim=True).clamp(min=1)
    tau = thresholds.gather(-1, support - 1)
    return (shifted - tau).clamp(min=0).to(v.dtype).movedim(-1, dim)
