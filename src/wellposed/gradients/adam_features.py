"""Features for a coreset: gradients as Adam would see them, at the coordinates that matter to their source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1 << 16
"""Coordinates that are normalised at once: n x d is never held twice, and for products never at all."""


@dataclass(frozen=True)
class GradientRows:
    """Gradients of n examples in d coordinates: a matrix, or a product `left @ right` that is never written out.

    Attributes:
        left: (n, d), or (n, rank) of a product.
        right: (rank, d), or None.

    Example:
        >>> rows = GradientRows(torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0, -1.0, 0.5]]))
        >>> rows.columns(slice(1, 3))
        tensor([[-2.0000,  1.0000],
                [-3.0000,  1.5000]])
    """

    left: Tensor
    right: Tensor | None = None

    def __len__(self) -> int:
        return len(self.left)

    @property
    def width(self) -> int:
        """D."""
        return self.left.shape[1] if self.right is None else self.right.shape[1]

    def columns(self, part: slice) -> Tensor:
        """(n, coordinates of the part)."""
        return self.left[:, part] if self.right is None else self.left @ self.right[:, part]

    def at(self, places: Int[Tensor, "n h"]) -> Float[Tensor, "n h"]:
        """Row i at its own coordinates `places[i]`."""
        if self.right is None:
            return self.left.gather(1, places)
        found = self.left.new_zeros(places.shape)
        for coefficient, direction in zip(self.left.T, self.right, strict=True):
            found.addcmul_(coefficient[:, None], direction[places])
        return found

    def rows(self, which: Tensor) -> GradientRows:
        """Some of the examples."""
        return GradientRows(self.left[which], self.right)

    def finite(self) -> Tensor:
        """(n,) whether all numbers of a row are finite."""
        return torch.isfinite(self.left).all(1)

    def parts(self) -> list[slice]:
        """The coordinates in chunks."""
        return [slice(start, min(start + CHUNK, self.width)) for start in range(0, self.width, CHUNK)]

    def moment_sums(self) -> tuple[Tensor, Tensor]:
        """(d,) sums over the examples of the gradients, and of their squares."""
        blocks = [self.columns(part) for part in self.parts()]
        return torch.cat([b.sum(0) for b in blocks]), torch.cat([b.square().sum(0) for b in blocks])


@dataclass(frozen=True)
class AdamMoments:
    """Where Adam's moments of one tensor stand, and after how many updates.

    Attributes:
        first, second: (d,) running means of gradients and of their squares, before bias correction.
        updates: how many they hold.
        betas, eps: of Adam.
    """

    first: Tensor
    second: Tensor
    updates: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @classmethod
    def start(cls, like: Tensor, betas: tuple[float, float], eps: float) -> AdamMoments:
        """Before the first update."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), 0, betas, eps)

    def direction(self, gradients: Tensor, places: slice | Tensor = slice(None)) -> Tensor:
        """What Adam would step along, were each gradient the next one; see `adam_direction`."""
        return adam_direction(gradients, self.first[places], self.second[places], self.updates, self.betas, self.eps)

    def after(self, sums: tuple[Tensor, Tensor], count: int) -> AdamMoments:
        """One update by the mean of `count` examples' moments (not by the moments of their mean)."""
        b1, b2 = self.betas
        first = b1 * self.first + (1 - b1) * sums[0] / count
        second = b2 * self.second + (1 - b2) * sums[1] / count
        return AdamMoments(first, second, self.updates + 1, self.betas, self.eps)


def adam_direction(
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    updates: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    r"""Adam's step for each example by itself, without the learning rate (CoLM, section 4.2).

        m_i = b1 m + (1 - b1) g_i,   v_i = b2 v + (1 - b2) g_i^2,
        f_i = (m_i / (1 - b1^(t+1))) / (sqrt(v_i / (1 - b2^(t+1))) + eps)

    At the first step, with m = v = 0, that is the sign of the gradient.

    Args:
        gradients: (n, d), one an example.
        first, second: m and v, (d,), or of the gradients' shape.
        updates: t, how many updates m and v hold.
        betas, eps: of Adam.

    Example:
        >>> zero = torch.zeros(2)
        >>> adam_direction(torch.tensor([[3.0, -0.5]]), zero, zero, updates=0)
        tensor([[ 1., -1.]])
    """
    b1, b2 = betas
    m = (b1 * first + (1 - b1) * gradients) / (1 - b1 ** (updates + 1))
    v = (b2 * second + (1 - b2) * gradients.square()) / (1 - b2 ** (updates + 1))
    return m / (v.sqrt() + eps)


def sparse_features(
    rows: GradientRows,
    source: Int[Tensor, " n"],
    sources: int,
    topk: int,
    moments: AdamMoments | None,
    combine: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Float[Tensor, "n h"]:
    """Normalised gradients at the `h = min(topk, d)` coordinates with the largest `|mean over the source|`.

    Args:
        rows: gradients of the candidates.
        source: number of each candidate's source, in [0, sources).
        sources: how many there are.
        topk: coordinates kept for each source.
        moments: Adam's; None leaves the gradients as they are.
        combine: adds the sums of other processes, (sources, coordinates).
    """
    normalise = (lambda g, places: g) if moments is None else moments.direction
    blocks = [normalise(rows.columns(part), part) for part in rows.parts()[:1]]
    if topk >= rows.width and len(rows.parts()) == 1:
        return blocks[0]
    importance = []
    for number, part in enumerate(rows.parts()):
        block = blocks[0] if number == 0 else normalise(rows.columns(part), part)
        # The sum orders the coordinates of a source as the mean does.
        sums = block.new_zeros((sources, block.shape[1])).index_add_(0, source, block)
        importance.append(combine(sums).abs())
    places = torch.cat(importance, 1).topk(min(topk, rows.width), dim=1, sorted=False).indices[source]
    if len(rows.parts()) == 1:
        return blocks[0].gather(1, places)
    return normalise(rows.at(places), places)
