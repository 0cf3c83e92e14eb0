"""Dropout whose rate may differ from example to example."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor


def dropout_rows(x: Float[Tensor, "batch ..."], rate: Tensor, channels: bool = False) -> Float[Tensor, "batch ..."]:
    """Dropout, x times Bernoulli(1 - p) / (1 - p), with one p for all examples or one for each.

    The rate is detached: a mask has no useful derivative in it, and that of the factor 1 / (1 - p) alone would be wrong.

    Args:
        x: (batch, ...).
        rate: p in [0, 1), a scalar or (batch,).
        channels: drop whole channels of x (batch, channels, ...).

    Raises:
        ValueError: if rate holds neither one value nor one for each example.

    Example:
        >>> dropped = dropout_rows(torch.ones(2, 1000), torch.tensor([0.0, 0.5]))
        >>> dropped[0].unique().tolist(), dropped[1].unique().tolist()
        ([1.0], [0.0, 2.0])
    """
    rate = rate.detach().float()
    if rate.ndim and (rate.ndim > 1 or len(rate) not in (1, len(x))):
        raise ValueError(f"dropout_rows: rate must be a scalar or ({len(x)},), got {tuple(rate.shape)}")
    if rate.ndim:
        rate = rate.reshape(-1, *(1,) * (x.ndim - 1))
    shape = (*x.shape[:2], *(1,) * (x.ndim - 2)) if channels else x.shape
    # In float32 whatever x is: a uniform number in bfloat16 has only 8 bits.
    mask = ((torch.rand(shape, device=x.device) >= rate) / (1.0 - rate)).to(x.dtype)
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None:
        return x * mask
    # By hand: torch's own rule adds the mask's tangent of zeros, at twenty times the price of the product.
    return forward_ad.make_dual(primal * mask, tangent * mask)
