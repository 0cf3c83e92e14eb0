r"""Smoothed total variation of images: value, gradient, and second derivatives in closed form.

.. math:: TV_\eta(x) = \sum_i \sqrt{(D_1 x)_i^2 + (D_2 x)_i^2 + \eta^2}

D are forward differences with a zero behind the last row and column. TV is convex; its gradient has Lipschitz constant
at most ``8 / eta``, as the squared norm of D is below 8 (Chambolle 2004).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "*batch height width"]


def finite_differences(x: Image) -> tuple[Image, Image]:
    """Forward differences across columns and across rows, of x's shape.

    Example:
        >>> across, down = finite_differences(torch.tensor([[1.0, 3.0], [4.0, 4.0]]))
        >>> across.tolist(), down.tolist()
        ([[2.0, 0.0], [0.0, 0.0]], [[3.0, 1.0], [0.0, 0.0]])
    """
    across = torch.nn.functional.pad(x[..., 1:] - x[..., :-1], (0, 1))
    down = torch.nn.functional.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    return across, down


def negative_divergence(across: Image, down: Image) -> Image:
    """The adjoint of `finite_differences`; ignores the last column of `across` and the last row of `down`.

    Example:
        >>> x, p = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
        >>> left = sum((d * p).sum() for d in finite_differences(x))
        >>> bool(left == (x * negative_divergence(p, p)).sum())
        True
    """
    p, q = across[..., :-1], down[..., :-1, :]
    found = torch.zeros_like(across)
    found[..., 1:] += p
    found[..., :-1] -= p
    found[..., 1:, :] += q
    found[..., :-1, :] -= q
    return found


def smoothed_total_variation(x: Image, smoothing: Float[Tensor, ""] | float) -> Float[Tensor, "*batch"]:
    """One number an image; differentiable in both arguments, any number of times.

    Args:
        x: images.
        smoothing: eta > 0; differences below it count quadratically.

    Example:
        >>> round(float(smoothed_total_variation(torch.tensor([[0.0, 3.0], [0.0, 3.0]]), 4.0)), 3)
        18.0
    """
    across, down = finite_differences(x)
    return (across.square() + down.square() + smoothing**2).sqrt().sum((-2, -1))


def smoothed_total_variation_gradient(x: Image, smoothing: Float[Tensor, ""] | float) -> Image:
    """Gradient in x, without a graph.

    Example:
        >>> smoothed_total_variation_gradient(torch.tensor([[0.0, 3.0]]), 4.0)
        tensor([[-0.6000,  0.6000]])
    """
    return TotalVariationCurvature(x, smoothing).gradient


class TotalVariationCurvature:
    """First and second derivatives of the smoothed total variation at one image; what x fixes is computed once.

    Attributes:
        gradient: in x.

    Example:
        >>> tv = TotalVariationCurvature(torch.tensor([[0.0, 3.0]]), 4.0)
        >>> tv.hvp(torch.tensor([[0.0, 1.0]]))                 # 1/5 - 3^2/5^3
        tensor([[-0.1280,  0.1280]])
    """

    @torch.no_grad()
    def __init__(self, x: Image, smoothing: Float[Tensor, ""] | float) -> None:
        self.smoothing = float(smoothing)
        across, down = torch.zeros_like(x), torch.zeros_like(x)
        torch.sub(x[..., 1:], x[..., :-1], out=across[..., :-1])
        torch.sub(x[..., 1:, :], x[..., :-1, :], out=down[..., :-1, :])
        self.inverse = torch.addcmul(across.square(), down, down).add_(self.smoothing**2).rsqrt_()
        self.across, self.down = across.mul_(self.inverse), down.mul_(self.inverse)
        self.gradient = _closed_divergence(self.across, self.down)

    @torch.no_grad()
    def hvp(self, vector: Image) -> Image:
        """Hessian in x times `vector`."""
        across, down = finite_differences(vector)
        along = torch.addcmul(self.across * across, self.down, down)
        across.addcmul_(self.across, along, value=-1.0).mul_(self.inverse)
        down.addcmul_(self.down, along, value=-1.0).mul_(self.inverse)
        return _closed_divergence(across, down)

    @torch.no_grad()
    def smoothing_vjp(self, vector: Image) -> Float[Tensor, "*batch"]:
        """`vector` times the derivative of the gradient in the smoothing: one number an image."""
        across, down = finite_differences(vector)
        along = torch.addcmul(self.across * across, self.down, down)
        return -self.smoothing * (along * self.inverse.square()).sum((-2, -1))


def _closed_divergence(across: Image, down: Image) -> Image:
    """`negative_divergence` of fields that are zero in the last column and row, in half as many passes."""
    found = (across + down).neg_()
    found[..., 1:] += across[..., :-1]
    found[..., 1:, :] += down[..., :-1, :]
    return found
