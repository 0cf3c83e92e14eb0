"""A bilevel problem in closed form whose upper level is not smooth: its curvature grows with its gradient.

    g(x, y) = |y - B x|^2 / 2 + noise . y       f(y) = sum_i (cosh(y_i - c_i) - 1) + noise . y

so that y*(x) = B x and Phi(x) = sum_i (cosh((B x - c)_i) - 1), with minimum 0: gradients and curvature grow
exponentially with the distance. Noise is N(0, 0.01) in every coordinate, fresh in every call of a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bilevel import BilevelProblem
from ...hyperparameter import Hyperparameter

DIMENSION = 10
NOISE = 0.1
_BLOCK = 512


class CoshProblem(BilevelProblem):
    """Several independent draws side by side: all tensors are float64 of shape (problems, 10). A batch is the noise.

    Args:
        seeds: of B and c, one problem each.
        radius: r, of the start x0 = r (1, ..., 1); y0 = 0.
        repeat: copies of each problem, for a grid of settings.

    Example:
        >>> problem = CoshProblem([0, 1], radius=1.0)
        >>> problem.value().shape, bool((problem.value() > 0).all())
        (torch.Size([2]), True)
    """

    def __init__(self, seeds: Sequence[int], radius: float, repeat: int = 1) -> None:
        draws = [_draw(seed) for seed in seeds for _ in range(repeat)]
        self.mixing = torch.stack([mixing for mixing, _ in draws])
        self.centre = torch.stack([centre for _, centre in draws])
        shape = self.centre.shape
        x = Hyperparameter(radius, -math.inf, math.inf, "identity", shape=tuple(shape), name="x").double()
        y = {"y": torch.zeros(shape, dtype=torch.float64, requires_grad=True)}
        super().__init__(None, self._inner, self._outer, y, {"x": x}, strong_convexity=1.0)
        self._x, self._y = x.raw, y["y"]

    def _inner(self, params: dict[str, Tensor], hypers: dict[str, Tensor], noise: Tensor) -> Tensor:
        y = params["y"]
        return 0.5 * (y - self._image(hypers["x"])).square().sum() + (noise * y).sum()

    def _outer(self, params: dict[str, Tensor], hypers: dict[str, Tensor], noise: Tensor) -> Tensor:
        y = params["y"]
        return (torch.cosh(y - self.centre) - 1.0).sum() + (noise * y).sum()

    def _image(self, x: Tensor) -> Tensor:
        return torch.matmul(self.mixing, x[..., None])[..., 0]

    @torch.no_grad()
    def inner_value_and_grad(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.counts.inner_grad += 1
        distance = self._y - self._image(self._x)
        return 0.5 * distance.square().sum() + (batch * self._y).sum(), {"y": distance + batch}

    @torch.no_grad()
    def hvp(self, vector: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        self.counts.hvp += 1
        return {"y": vector["y"].clone()}

    @torch.no_grad()
    def mixed_vjp(self, vector: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        self.counts.mixed_vjp += 1
        return {"x": -torch.matmul(vector["y"][..., None, :], self.mixing)[..., 0, :]}

    def second_derivatives(self, vector: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.hvp(vector, batch), self.mixed_vjp(vector, batch)

    @torch.no_grad()
    def outer_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        self.counts.outer_grads += 1
        distance = self._y - self.centre
        value = (torch.cosh(distance) - 1.0).sum() + (batch * self._y).sum()
        return value, {"y": torch.sinh(distance) + batch}, {"x": torch.zeros_like(self._x)}

    @torch.no_grad()
    def value(self) -> Float[Tensor, " problems"]:
        """Phi at the present x, without noise."""
        return (torch.cosh(self._image(self._x) - self.centre) - 1.0).sum(-1)

    @property
    def calls(self) -> int:
        """Oracle calls so far: gradients of f, Hessian and mixed products and gradients of g count one each."""
        counts = self.counts
        return counts.outer_grads + counts.hvp + counts.mixed_vjp + counts.inner_grad


def noise_stream(seeds: Sequence[int], stream: int, repeat: int = 1) -> Iterator[Tensor]:
    """Noise without end, (problems, 10); each seed has a stream of its own, whatever runs beside it.

    Args:
        seeds: one problem each.
        stream: number that tells streams of one seed apart.
        repeat: copies of each problem; they get the same noise.

    Example:
        >>> both, second = next(noise_stream([0, 1], 0)), next(noise_stream([1], 0))
        >>> bool((both[1] == second[0]).all())
        True
    """
    generators = [torch.Generator().manual_seed(_mixed(seed, 1 + stream)) for seed in seeds]
    while True:
        blocks = [torch.randn(_BLOCK, DIMENSION, generator=g, dtype=torch.float64) for g in generators]
        block = NOISE * torch.stack(blocks, 1).repeat_interleave(repeat, 1)
        yield from block.unbind(0)


def _draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_mixed(seed, 0))
    gaussian = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    mixing = torch.eye(DIMENSION, dtype=torch.float64) + gaussian / math.sqrt(DIMENSION)
    return mixing, torch.randn(DIMENSION, generator=generator, dtype=torch.float64)


def _mixed(seed: int, stream: int) -> int:
    return 1000 * seed + stream
