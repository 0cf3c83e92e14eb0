"""Bounds of the exact upper loss from an inexact inner solution, and the decrease that they certify."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .constants import Number


def upper_value(
    loss: Float[Tensor, " samples"], slope_norm: Float[Tensor, " samples"], eps: Float[Tensor, " samples"], L_g: Number
) -> Float[Tensor, " samples"]:
    r"""`U+ = g + |grad g| eps + L_g eps^2 / 2`: at least g at any point within eps (descent lemma; lemma 3.5's bound).

    Args:
        loss: g at the inexact points.
        slope_norm: norms of its gradient there.
        eps: distances to the inner minimisers.
        L_g: Lipschitz constant of the gradient.

    Example:
        >>> import torch
        >>> upper_value(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.1]), 1.0)
        tensor([1.2050])
    """
    return loss + slope_norm * eps + 0.5 * L_g * eps * eps


def lower_value(
    loss: Float[Tensor, " samples"],
    slope_norm: Float[Tensor, " samples"],
    eps: Float[Tensor, " samples"],
    L_g: Number,
    convex: bool,
) -> Float[Tensor, " samples"]:
    r"""`U- = g - |grad g| eps - L_g eps^2 / 2`: at most g at any point within eps; without the last term if g is convex.

    Example:
        >>> import torch
        >>> lower_value(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.1]), 1.0, convex=True)
        tensor([0.8000])
    """
    bound = loss - slope_norm * eps
    return bound if convex else bound - 0.5 * L_g * eps * eps


def certified_change(new_upper: float, old_lower: float, alpha: float, z_norm: float, armijo: float) -> float:
    r"""`psi = U+(new) - U-(old) + armijo alpha |z|^2`.

    If it is <= 0, the step has lowered the EXACT upper loss by at least `armijo alpha |z|^2` (arXiv 2308.10098, lemma
    3.5), whatever the accuracies were.

    Example:
        >>> certified_change(new_upper=0.8, old_lower=1.0, alpha=0.1, z_norm=1.0, armijo=0.1) <= 0
        True
    """
    return new_upper - old_lower + armijo * alpha * z_norm**2
