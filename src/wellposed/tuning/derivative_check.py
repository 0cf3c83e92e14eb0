"""Second derivatives held against differences of the gradient, once for each problem."""

from __future__ import annotations

import torch
from torch import Tensor

from .lower_level import LowerLevel, SecondDerivatives

TOLERANCE = 0.05
"""Relative difference that is taken for an error; rounding and curvature of a smooth function stay far below."""


def check_second_derivatives(lower: LowerLevel, x: Tensor, u: Tensor, curvature: SecondDerivatives) -> None:
    """Raise where Hessian or mixed products contradict the gradient.

    A function marked `once_differentiable` inside the objective has, for autograd, the second derivative zero; a closed
    form may hold a slip. Either would give wrong hypergradients in silence. Costs four gradients, once.

    Raises:
        ValueError: naming the product and by how much it is off.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    w = torch.randn(u.shape, generator=generator, dtype=u.dtype, device=u.device)
    step = torch.finfo(x.dtype).eps ** (1 / 3)
    along = step * (1 + float(x.norm())) / float(v.norm())
    hessian = (lower.gradient(x + along * v, u) - lower.gradient(x - along * v, u)) / (2 * along)
    _compare("Hessian product", curvature.hvp(v), hessian, x)
    aside = step * (1 + float(u.norm())) / float(w.norm())
    mixed = (lower.gradient(x, u + aside * w) - lower.gradient(x, u - aside * w)) / (2 * aside)
    # One number: the mixed derivative in the directions v and w.
    _compare("product with the mixed derivative", curvature.mixed_vjp(v) @ w, (mixed * v).sum(), x)


def _compare(what: str, product: Tensor, difference: Tensor, x: Tensor) -> None:
    size = max(float(product.norm()), float(difference.norm()))
    gap = float((product - difference).norm())
    # Differences of rounding errors say nothing.
    if gap > TOLERANCE * size and size > 1e3 * torch.finfo(x.dtype).eps ** (2 / 3):
        raise ValueError(
            f"LowerLevel: the {what} differs from differences of the gradient by {100 * gap / size:.0f} %: a closed form "
            "(gradient=, curvature=) with an error, a function marked once_differentiable, or an objective that is not "
            "twice differentiable at this point"
        )
