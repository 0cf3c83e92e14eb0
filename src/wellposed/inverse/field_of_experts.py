r"""Field of experts: a prior on images from learned filters, as a smooth convex function.

.. math:: R(x) = w_0 \sum_k w_k \sum_i \left( \sqrt{(f_k * x)_i^2 + \eta_k^2} - \eta_k \right)

The convolutions are "valid" correlations. R is convex for any filters, as the potential is; its gradient has Lipschitz
constant at most `w_0 sum_k w_k / eta_k max_frequency |F f_k|^2` (Roth and Black 2005 introduced the model; smoothed l1
potentials as in arXiv 2308.10098, section 4).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def field_of_experts_prior(
    x: Float[Tensor, "images height width"],
    filters: Float[Tensor, "experts rows columns"],
    weights: Float[Tensor, " experts"],
    smoothings: Float[Tensor, " experts"],
    strength: Float[Tensor, ""] | float = 1.0,
) -> Float[Tensor, " images"]:
    """One number an image; differentiable in every argument, any number of times.

    Args:
        x: images, at least as large as the filters.
        filters: f, one an expert.
        weights: w > 0.
        smoothings: eta > 0; responses below it count quadratically.
        strength: w_0 > 0.

    Raises:
        ValueError: if the numbers of filters, weights and smoothings differ, or an image is smaller than a filter.

    Example:
        >>> x = torch.tensor([[[0.0, 3.0], [0.0, 3.0]]])
        >>> difference = torch.tensor([[[-1.0, 1.0]]])
        >>> field_of_experts_prior(x, difference, torch.tensor([1.0]), torch.tensor([4.0]))   # twice 5 - 4
        tensor([2.])
    """
    _check(x, filters, weights, smoothings)
    responses = F.conv2d(x[:, None], filters[:, None])
    eta = smoothings[:, None, None]
    potential = (responses.square() + eta.square()).sqrt() - eta
    return strength * (potential.sum((2, 3)) * weights).sum(1)


@torch.no_grad()
def field_of_experts_smoothness(
    filters: Float[Tensor, "experts rows columns"],
    weights: Float[Tensor, " experts"],
    smoothings: Float[Tensor, " experts"],
    strength: Float[Tensor, ""] | float = 1.0,
    grid: int = 64,
) -> float:
    """An upper bound of the Lipschitz constant of the gradient in x: the modulus L that a certificate needs.

    The norm of a convolution is its largest frequency response M. It is computed on a grid and raised by what the grid
    may miss: |F f|^2 is non-negative of exponential type, so that at distance t from its maximum it is at least
    `M cos^2(degree t / 2)` (Duffin and Schaeffer 1938).

    Args:
        filters, weights, smoothings, strength: as of `field_of_experts_prior`.
        grid: frequencies along each axis; at least eight times the filter's size gives a tight bound.

    Raises:
        ValueError: for a grid that is too coarse for the filters.

    Example:
        >>> difference = torch.tensor([[[-1.0, 1.0]]])
        >>> bound = field_of_experts_smoothness(difference, torch.tensor([1.0]), torch.tensor([2.0]))
        >>> bool(2.0 <= bound <= 2.01)           # |F f|^2 is at most 4
        True
    """
    rows, columns = filters.shape[-2:]
    # |F f|^2 has degree (size - 1) along each axis; the nearest grid point is at most pi / grid away along each.
    degree = (rows - 1) + (columns - 1)
    if not grid > 2 * degree:
        raise ValueError(f"field_of_experts_smoothness: grid must exceed {2 * degree}, got {grid}")
    missed = math.cos(0.5 * math.pi * degree / grid) ** 2
    response = torch.fft.fft2(filters, (grid, grid)).abs().square().amax((-2, -1)) / missed
    return float(strength) * float((weights / smoothings * response).sum())


def _check(x: Tensor, filters: Tensor, weights: Tensor, smoothings: Tensor) -> None:
    if not len(filters) == len(weights) == len(smoothings):
        raise ValueError(
            "field_of_experts_prior: filters, weights and smoothings must be as many, got "
            f"{len(filters)}, {len(weights)} and {len(smoothings)}"
        )
    if x.shape[-2] < filters.shape[-2] or x.shape[-1] < filters.shape[-1]:
        raise ValueError(
            f"field_of_experts_prior: an image of {tuple(x.shape[-2:])} is smaller than a filter of {tuple(filters.shape[-2:])}"
        )
