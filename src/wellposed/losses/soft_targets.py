"""Targets that move from the label towards the network's own past prediction."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..batching import IGNORE_INDEX


def progressive_targets(
    targets: Shaped[Tensor, ...],
    past: Float[Tensor, "*batch classes"],
    alpha: float | Shaped[Tensor, ...],
) -> Float[Tensor, "*batch classes"]:
    """`(1 - alpha) * target + alpha * past`: the soft targets of PS-KD (eq. 6).

    Cross-entropy against them is the whole method. For a hard label of class g and predictions p (now) and q (past)
    its gradient in the logits is `p_c - alpha q_c`, and `-[(1 - p_g) - alpha (1 - q_g)]` for the label's own.

    Args:
        targets: integer classes (*batch,), or probabilities (*batch, classes); -100 marks a position without target,
            whose row is all zeros: cross-entropy against it is 0.
        past: (*batch, classes) probabilities, constant.
        alpha: share of the past prediction, in [0, 1]: a number, or one for each of (*batch,).

    Returns:
        (*batch, classes), in the dtype of `past`; rows sum to 1 where `targets` and `past` do.

    Raises:
        ValueError: for targets whose shape does not fit, or classes out of range.

    Example:
        >>> progressive_targets(torch.tensor([1]), torch.tensor([[0.5, 0.2, 0.3]]), alpha=0.5)
        tensor([[0.2500, 0.6000, 0.1500]])
    """
    past = past.detach()
    share = torch.as_tensor(alpha, dtype=past.dtype, device=past.device)
    if targets.is_floating_point():
        if targets.shape != past.shape:
            raise ValueError(_shapes(targets, past))
        return torch.lerp(targets.to(past.dtype), past, share[..., None] if share.ndim else share)
    if targets.shape != past.shape[:-1]:
        raise ValueError(_shapes(targets, past))
    _check_classes(targets, past.shape[-1])
    valid = targets != IGNORE_INDEX
    # Everything that tells one row from another is done on (*batch,), so that there is one pass over the rows.
    soft = past * (share * valid)[..., None]
    own = ((1.0 - share) * valid).to(soft.dtype)
    return soft.scatter_add_(-1, targets.long().clamp(min=0)[..., None], own[..., None])


def _check_classes(targets: Tensor, num_classes: int) -> None:
    # On an accelerator the scatter asserts the range itself; reading the result back would stall the queue.
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = (int(v) for v in targets.aminmax())
    if high >= num_classes or (low < 0 and bool(((targets < 0) & (targets != IGNORE_INDEX)).any())):
        worst = high if high >= num_classes else int(targets[(targets < 0) & (targets != IGNORE_INDEX)].min())
        raise ValueError(
            f"progressive_targets: targets must lie in [0, {num_classes}) or be {IGNORE_INDEX}, got {worst}"
        )


def _shapes(targets: Tensor, past: Tensor) -> str:
    return (
        f"progressive_targets: targets must be integer classes of shape {tuple(past.shape[:-1])} or probabilities of "
        f"shape {tuple(past.shape)}, got {targets.dtype} of shape {tuple(targets.shape)}"
    )
