"""What PS-KD does to gradients: the weight of each example, and how much of the gradient goes to hard ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gradient_rescaling(
    logits: Float[Tensor, "batch classes"],
    past: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    alpha: float,
) -> Float[Tensor, " batch"]:
    """`1 - alpha * gamma_past / gamma`, gamma = 1 - (probability of the true class): the weight of each example.

    By this factor the push on the true class differs from plain cross-entropy's at the same outputs (eq. 8-11).
    Negative where the true class is pushed DOWN. Where `p_c >= alpha q_c` for all other classes it is also the ratio
    of the gradients' L1 norms. Examples that improve fast weigh little, those that do not improve weigh `1 - alpha`.

    Args:
        logits: of the present.
        past: probabilities of the past.
        targets: integer classes.
        alpha: share of the past prediction in the targets.

    Returns:
        (batch,); -inf where the present is certain and the past was not.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]])
        >>> gradient_rescaling(half.log(), half, torch.tensor([0]), alpha=0.5)
        tensor([0.5000])
    """
    return 1.0 - alpha * doubt(past.log(), targets) / doubt(logits, targets)


def doubt(logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """`1 - p(target)`: how far each example is from its label, with all digits also where that is tiny.

    Example:
        >>> doubt(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))
        tensor([9.3576e-14])
    """
    # The probabilities of the other classes are summed: 1 - p would cancel, and so would the log of p.
    others = logits.log_softmax(-1).scatter(-1, targets[:, None], -torch.inf)
    return others.exp().sum(-1)


def hard_example_shift(
    gamma: Float[Tensor, " batch"],
    past_gamma: Float[Tensor, " batch"],
    alpha: float,
    hardness: Float[Tensor, " batch"],
    fraction: float = 0.1,
) -> Float[Tensor, ""]:
    """By how much the hardest examples' share of the gradient exceeds their share under plain cross-entropy.

    The push of PS-KD on the true class is `gamma - alpha * past_gamma` (signed), that of cross-entropy `gamma`;
    both shares are taken at the same outputs. Positive: gradient moves towards hard examples.

    Rank `hardness` on EARLIER predictions than the two compared: ranking by `gamma` itself picks examples that just
    got worse, and finds a shift by regression to the mean.

    Args:
        gamma, past_gamma: `doubt` now and one visit ago.
        alpha: share of the past prediction in the targets.
        hardness: larger is harder.
        fraction: of the examples that count as hard, in (0, 1).

    Returns:
        A difference of shares; NaN if the pushes sum to nothing.

    Raises:
        ValueError: if `fraction` lies outside of (0, 1).

    Example:
        >>> now, before = torch.tensor([0.1, 0.4]), torch.tensor([0.2, 0.4])
        >>> hard_example_shift(now, before, alpha=0.25, hardness=before, fraction=0.5)
        tensor(0.0571)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"hard_example_shift: fraction must lie in (0, 1), got {fraction}")
    hardest = hardness.argsort(descending=True, stable=True)[: max(1, round(fraction * len(hardness)))]
    push = gamma - alpha * past_gamma
    return push[hardest].sum() / push.sum() - gamma[hardest].sum() / gamma.sum()
