"""The sharpest direction in WEIGHT space that low-rank factors can reach, for sharpness-aware tuning of adapters.

A radius in the coordinates of A and B has no fixed meaning for `W + s B A`: the same update, written with another A and B,
gets another perturbation. Measured in weight space it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..batching import unwrap


@dataclass(frozen=True)
class LowRankFactors:
    """One adapter: the update `scaling * b @ a` of a weight.

    Attributes:
        a: (rank, inputs).
        b: (outputs, rank).
        scaling: factor of the product.
    """

    a: Float[Tensor, "rank inputs"]
    b: Float[Tensor, "outputs rank"]
    scaling: float


def low_rank_factors(model: nn.Module) -> list[LowRankFactors]:
    """All trained low-rank factors of a model: of `wellposed.weights.low_rank`, or of PEFT's LoRA layers.

    Adapters of convolutions, and those that are frozen, are left out.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> _ = add_low_rank(model, rank=2)
        >>> [tuple(part.b.shape) for part in low_rank_factors(model)]
        [(4, 2), (2, 2)]
    """
    found: dict[int, LowRankFactors] = {}
    for module in unwrap(model).modules():
        a, b, scaling = (getattr(module, name, None) for name in ("lora_A", "lora_B", "scaling"))
        if a is None or b is None or scaling is None:
            continue
        for one, other, factor in _adapters(a, b, scaling):
            if one.ndim == 2 and other.ndim == 2 and one.requires_grad and other.requires_grad:
                found[id(one)] = LowRankFactors(one, other, float(factor))
    return list(found.values())


def _adapters(a: Any, b: Any, scaling: Any) -> list[tuple[Tensor, Tensor, float]]:
    """Plain parameters, or PEFT's dictionaries of adapters by name."""
    if isinstance(a, Tensor):
        return [(a, b, scaling)]
    names = [name for name in a if name in b]
    return [(a[name].weight, b[name].weight, scaling[name]) for name in names]


def weight_space_direction(
    grad_a: Float[Tensor, "rank inputs"],
    grad_b: Float[Tensor, "outputs rank"],
    factors: LowRankFactors,
    damping: float = 0.01,
) -> tuple[Float[Tensor, "rank inputs"], Float[Tensor, "outputs rank"], Float[Tensor, ""]]:
    r"""Moves of A and B whose change of the weight is the weight's gradient, as far as factors of this rank can follow it.

    With G = dL/dW, `grad_b = s G A^T` and `grad_a = s B^T G`. The part of G in the tangent space of rank r,

        T = G P_A + P_B G (I - P_A),   P_A = A^T (A A^T)^-1 A,   P_B = B (B^T B)^-1 B^T,

    needs only these two, and `eps_B = grad_b (A A^T)^-1 / s^2`, `eps_A = (B^T B)^-1 grad_a (I - P_A) / s^2` change W by T
    to first order. T does not depend on how the product B A is written. (Our own derivation; the idea of perturbing in
    the weight's space is that of Flat-LoRA and EFlat-LoRA, arXiv 2508.00522.)

    Args:
        grad_a, grad_b: gradients of the factors.
        factors: the factors.
        damping: share of the factors' mean squared size that is added to both inverses, >= 0. It keeps A's move small
            while B is near zero, where a long one would change nothing to first order and much to second.

    Returns:
        eps_A, eps_B, and the norm of the change of W that they make to first order.

    Example:
        >>> a, b = torch.eye(2), torch.zeros(2, 2)                             # B = 0: only B moves
        >>> eps_a, eps_b, norm = weight_space_direction(b, torch.ones(2, 2), LowRankFactors(a, b, 1.0), damping=0.0)
        >>> bool((eps_a == 0).all()), eps_b.tolist(), norm
        (True, [[1.0, 1.0], [1.0, 1.0]], tensor(2.))
    """
    a, b, s = (factors.a.detach(), factors.b.detach(), factors.scaling)
    # Inverses of rank x rank: at least float32, and float64 where the weights have it.
    a, b, grad_a, grad_b = (t if t.dtype == torch.float64 else t.float() for t in (a, b, grad_a, grad_b))
    gram_a, gram_b = a @ a.T, b.T @ b
    rank = len(gram_a)
    if damping > 0:
        size = damping * (gram_a.trace() + gram_b.trace()) / (2 * rank)
        added = size * torch.eye(rank, dtype=gram_a.dtype, device=gram_a.device)
        # inv_ex, because inv waits for an accelerator to report singular matrices, which these cannot be.
        inverse_a, inverse_b = (torch.linalg.inv_ex(gram + added).inverse for gram in (gram_a, gram_b))
    else:
        inverse_a, inverse_b = (torch.linalg.pinv(gram, hermitian=True) for gram in (gram_a, gram_b))
    eps_b = grad_b @ inverse_a / s**2
    reduced = inverse_b @ grad_a / s**2
    eps_a = reduced - (reduced @ a.T) @ inverse_a @ a
    # |eps_B A + B eps_A|^2 by matrices of rank x rank only; the outputs x inputs change is never built.
    square = (
        ((eps_b.T @ eps_b) * gram_a).sum()
        + ((eps_a @ eps_a.T) * gram_b).sum()
        + 2 * ((b.T @ eps_b) * (eps_a @ a.T)).sum()
    )
    return eps_a, eps_b, s * square.clamp(min=0.0).sqrt()


def weight_space_moves(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factors: Sequence[LowRankFactors],
    damping: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    """The direction of steepest ascent in weight space, for factors and ordinary parameters together.

    Args:
        parameters, gradients: what trains, with its gradients.
        factors: which of the parameters are factors of one another; all others move along their own gradient.
        damping: see `weight_space_direction`.

    Returns:
        One move a parameter, and the joint norm of the changes of weights that they make to first order.

    Raises:
        ValueError: if only one of two factors has a gradient.

    Example:
        >>> moves, norm = weight_space_moves([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [])
        >>> moves, norm
        ([tensor([3., 4.])], tensor(5.))
    """
    place = {id(p): i for i, p in enumerate(parameters)}
    moves = list(gradients)
    parts: list[Tensor] = []
    done: set[int] = set()
    for one in factors:
        i, j = place.get(id(one.a)), place.get(id(one.b))
        if i is None and j is None:
            continue
        if i is None or j is None:
            raise ValueError("weight_space_moves: only one factor of an adapter has a gradient; train both or none")
        eps_a, eps_b, norm = weight_space_direction(gradients[i], gradients[j], one, damping)
        moves[i], moves[j] = eps_a.to(gradients[i].dtype), eps_b.to(gradients[j].dtype)
        parts.append(norm)
        done |= {i, j}
    parts += [torch.linalg.vector_norm(g, dtype=_wide(g)) for i, g in enumerate(gradients) if i not in done]
    return moves, torch.linalg.vector_norm(torch.stack([part.to(parts[0]) for part in parts]))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
