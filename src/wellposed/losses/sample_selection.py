"""The small-loss rule: examples on which a network's loss is small probably have a right label."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def forget_rate_at(epoch: int, forget_rate: float, num_gradual: int = 10) -> float:
    """Share of each batch that is left out in an epoch: from 0 up to `forget_rate` in `num_gradual` epochs, then constant.

    Early networks have not memorised anything yet, so that all examples may teach them. 0 at epoch 0, `forget_rate` from
    epoch `num_gradual - 1` on, linear between; constant from the start with `num_gradual = 0`, which is right for
    networks that are trained already. Source: Han et al. 2018 (arXiv 1804.06872).

    Args:
        epoch: from 0.
        forget_rate: R, in [0, 1).
        num_gradual: >= 0.

    Example:
        >>> [forget_rate_at(epoch, 0.4, 3) for epoch in range(5)]
        [0.0, 0.2, 0.4, 0.4, 0.4]
    """
    if epoch >= num_gradual:
        return forget_rate
    return forget_rate * epoch / max(1, num_gradual - 1)


def num_kept(size: int, forget_rate: float) -> int:
    """How many of `size` examples are kept, `floor((1 - forget_rate) size)`, but at least 1.

    Example:
        >>> num_kept(10, 0.9), num_kept(10, 0.25), num_kept(10, 0.999)
        (1, 7, 1)
    """
    # 1 - 0.9 is a little less than 0.1 in floating point, and a tenth of ten examples is one, not none.
    return max(1, int((1.0 - forget_rate) * size + 1e-9))


def small_loss(losses: Float[Tensor, " batch"], forget_rate: float) -> Int[Tensor, " kept"]:
    """Positions of the `num_kept` smallest losses, smallest first; of equal losses the earlier. No gradient flows.

    Losses that are not finite come last.

    Example:
        >>> small_loss(torch.tensor([0.3, 0.1, 0.3, 0.2]), forget_rate=0.25)
        tensor([1, 3, 0])
    """
    ordered = losses.detach().nan_to_num(nan=torch.inf, posinf=torch.inf).argsort(stable=True)
    return ordered[: num_kept(len(losses), forget_rate)]
