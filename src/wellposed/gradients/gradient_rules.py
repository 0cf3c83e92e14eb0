"""Rules that correct a gradient g by the sharpness-aware gradient s of the same batch: the family behind GLAD.

Every rule is a combination `a g + b s` whose two numbers depend on three inner products only, the `Agreement` of g and s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..numerics.tree import global_norm, inner_product

Rule = Literal["project", "mix", "steer", "gsam", "sagm", "sam"]
Scope = Literal["global", "tensor"]


@dataclass(frozen=True)
class Agreement:
    """Inner products of two gradients g and s, over all tensors together, or one a tensor.

    Attributes:
        dot: <g, s>.
        norm, sharp_norm: Euclidean norms of g and of s.
    """

    dot: Float[Tensor, "*tensors"]
    norm: Float[Tensor, "*tensors"]
    sharp_norm: Float[Tensor, "*tensors"]

    @property
    def cosine(self) -> Float[Tensor, "*tensors"]:
        """<g, s> / (|g| |s|), in [-1, 1]; 0 where one of them is zero."""
        return (self.dot / (self.norm * self.sharp_norm).clamp(min=1e-30)).clamp(-1.0, 1.0)

    @property
    def usable(self) -> Bool[Tensor, "*tensors"]:
        """Whether s is finite and not zero; elsewhere a loop keeps g."""
        return torch.isfinite(self.dot) & torch.isfinite(self.sharp_norm) & (self.sharp_norm > 0)


def agreement(gradients: Sequence[Tensor], sharp: Sequence[Tensor], scope: Scope = "global") -> Agreement:
    """The inner products of two gradients, accumulated in at least float32; nothing waits for an accelerator.

    Args:
        gradients, sharp: g and s, tensors of the same shapes.
        scope: "global" (all tensors as one vector) or "tensor" (each by itself).

    Raises:
        ValueError: if there is nothing to compare, or the scope is unknown.

    Example:
        >>> found = agreement([torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])])
        >>> found.norm, found.cosine
        (tensor(5.), tensor(0.9600))
    """
    if not gradients:
        raise ValueError("agreement: gradients is empty")
    if scope == "global":
        return Agreement(inner_product(gradients, sharp), global_norm(gradients), global_norm(sharp))
    if scope != "tensor":
        raise ValueError(f"agreement: scope must be 'global' or 'tensor', got {scope!r}")
    parts = [agreement([g], [s]) for g, s in zip(gradients, sharp, strict=True)]
    device = parts[0].dot.device
    columns = [[getattr(part, name).to(device) for part in parts] for name in ("dot", "norm", "sharp_norm")]
    return Agreement(*(torch.stack(column) for column in columns))


# ── the rules: from the agreement to the factors (a, b) ───────────────────────────────────────────────────────────────
Factors = tuple[Tensor, Tensor]


def project(found: Agreement, lam: float | Tensor) -> Factors:
    """Where g and s conflict (<g, s> < 0), take the part of g along s away: `g - lam <g, s> / |s|^2 s`; else g.

    With lam = 1 it is PCGrad's projection (Yu et al. 2020, arXiv 2001.06782, Algorithm 1) of g against s.
    On a convex loss there is no conflict: s - g = H eps with H >= 0, so that <g, s> >= |g|^2.

    Example:
        >>> regularized_gradient([torch.tensor([1.0, 1.0])], [torch.tensor([-1.0, 0.0])], "project", 1.0)
        [tensor([0., 1.])]
    """
    conflict = found.dot.clamp(max=0.0) / found.sharp_norm.square().clamp(min=1e-30)
    return torch.ones_like(found.dot), -lam * conflict


def steer(found: Agreement, lam: float | Tensor) -> Factors:
    """Turn g towards s and keep its length: `|g| d / |d|`, with `d = (1 - lam) g / |g| + lam s / |s|`.

    Where d is zero (opposite gradients, lam = 1/2) it is g.

    Example:
        >>> regularized_gradient([torch.tensor([2.0, 0.0])], [torch.tensor([0.0, 1.0])], "steer", 0.5)
        [tensor([1.4142, 1.4142])]
    """
    # |d|^2 from the cosine, not from d: no further pass over the tensors.
    length = ((1 - lam) ** 2 + lam**2 + 2 * lam * (1 - lam) * found.cosine).clamp(min=0.0)
    lost = length <= 4 * torch.finfo(found.dot.dtype).eps
    length = torch.where(lost, torch.ones_like(length), length.sqrt())
    own = torch.where(lost, torch.ones_like(length), (1 - lam) / length)
    ratio = found.norm / found.sharp_norm.clamp(min=1e-30)
    return own, torch.where(lost, torch.zeros_like(length), lam * ratio / length)


def gsam(found: Agreement, lam: float | Tensor) -> Factors:
    """`s - lam g_perp`, g_perp the part of g orthogonal to s: surrogate gap guided SAM (Zhuang et al. 2022, arXiv 2203.08065).

    Example:
        >>> regularized_gradient([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])], "gsam", 0.5)
        [tensor([ 2.0000, -0.5000])]
    """
    along = found.dot / found.sharp_norm.square().clamp(min=1e-30)
    return -lam * torch.ones_like(along), 1 + lam * along


_FACTORS: Mapping[str, Callable[[Agreement, float | Tensor], Factors]] = {
    "project": project,
    "steer": steer,
    "gsam": gsam,
}
RULES: tuple[str, ...] = ("project", "mix", "steer", "gsam", "sagm", "sam")
"""Names of the rules. `mix` is `lerp(g, s, lam)`, `sagm` the same with 1/2, `sam` takes s."""

PLAIN_AT_ZERO = frozenset({"project", "mix", "steer"})
"""Rules that return g for lam = 0."""


def regularized_gradient(
    gradients: Sequence[Tensor],
    sharp: Sequence[Tensor],
    rule: Rule = "mix",
    lam: float | Tensor = 0.5,
    scope: Scope = "global",
    found: Agreement | None = None,
) -> list[Tensor]:
    """A gradient corrected by the sharpness-aware gradient of the same batch.

    The update of GLAD (Peng et al. 2025, arXiv 2507.13089) is not public: its figure 1 says that the SAM gradient turns the
    ordinary one. These rules fit that description; none of them is known to be the authors'.

    | rule | result |
    |---|---|
    | `project` | g without its part against s, where they conflict |
    | `mix` | `(1 - lam) g + lam s`: to first order the gradient of `loss + lam rho |grad loss|` |
    | `steer` | `mix` of the directions, with the length of g |
    | `gsam` | `s - lam` times the part of g orthogonal to s |
    | `sagm` | `(g + s) / 2`, s taken at a slightly nearer point (Wang et al. 2023, arXiv 2303.10353) |
    | `sam` | s |

    Args:
        gradients, sharp: g and s, tensors of the same shapes.
        rule: which.
        lam: strength in [0, 1]; without meaning for `sagm` and `sam`.
        scope: "global": one inner product over all tensors; "tensor": the rule acts on each by itself.
        found: their `agreement`, where it is known already.

    Returns:
        New tensors, of the dtypes of g.

    Raises:
        ValueError: for an unknown rule or scope, lam outside of [0, 1], or lists of different lengths.

    Example:
        >>> regularized_gradient([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])], "mix", 0.25)
        [tensor([0.7500, 0.2500])]
    """
    if rule not in RULES:
        raise ValueError(f"regularized_gradient: rule must be one of {list(RULES)}, got {rule!r}")
    if not isinstance(lam, Tensor) and not 0 <= lam <= 1:
        raise ValueError(f"regularized_gradient: lam must lie in [0, 1], got {lam}")
    if len(gradients) != len(sharp):
        raise ValueError(f"regularized_gradient: need as many tensors in both, got {len(gradients)} and {len(sharp)}")
    if rule == "sam":
        return [s.clone() for s in sharp]
    if rule in ("mix", "sagm"):
        # lerp, because 0.75 g + 0.25 g is not g in floating point.
        weight = 0.5 if rule == "sagm" else lam
        return [
            torch.lerp(g, s, weight.to(g) if isinstance(weight, Tensor) else weight)
            for g, s in _pairs(gradients, sharp)
        ]
    a, b = _FACTORS[rule](agreement(gradients, sharp, scope) if found is None else found, lam)
    whole = a.ndim == 0
    result = []
    for i, (g, s) in enumerate(_pairs(gradients, sharp)):
        own, other = (a, b) if whole else (a[i], b[i])
        # g as it is, where its factor is 1: then the result is g bit for bit wherever s has the factor 0.
        scaled = g if rule == "project" else g * own.to(g)
        result.append(scaled + s * other.to(s))
    return result


def _pairs(gradients: Sequence[Tensor], sharp: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(g, s.to(g.dtype)) for g, s in zip(gradients, sharp, strict=True)]
