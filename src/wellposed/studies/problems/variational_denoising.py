"""Denoising of four small photographs by smoothed total variation, with two hyperparameters to learn."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...hyperparameter import Hyperparameter
from ...inverse import TotalVariationCurvature, smoothed_total_variation, smoothed_total_variation_gradient
from ...tuning import CertifiedProblem, LowerLevel, UpperLoss
from ...tuning.lower_level import Values
from ...tuning.strongly_convex import accelerated_gradient

SIZE, NOISE = 48, 0.1
LOG_WEIGHT = LOG_SMOOTHING = -5.0
"""Where the two hyperparameters start."""


class VariationalDenoising:
    """`h = |x - y|^2 / 2 + weight TV(x, smoothing) / 2` for each image, upper loss `|x - clean|^2 / 2`, their mean.

    Args:
        clean, noisy: images (images, height, width), float64, values from 0 to 1.
        fresh_clean, fresh_noisy: other images, to test on.

    Example:
        >>> problem = photographs(seed=0)
        >>> problem.noisy.shape
        torch.Size([4, 48, 48])
    """

    def __init__(self, clean: Tensor, noisy: Tensor, fresh_clean: Tensor, fresh_noisy: Tensor) -> None:
        self.clean, self.noisy, self.fresh_clean, self.fresh_noisy = clean, noisy, fresh_clean, fresh_noisy

    def levels(self) -> CertifiedProblem:
        """The problem for tuners, at log-weight and log-smoothing -5 and x = y."""
        hypers = {name: Hyperparameter(1.0, chart="exp").double() for name in ("weight", "smoothing")}
        hypers["weight"].raw.fill_(LOG_WEIGHT)
        hypers["smoothing"].raw.fill_(LOG_SMOOTHING)
        lower = LowerLevel(
            self._objective, self.noisy, hypers, mu=1.0, L=lambda v: 1.0 + 4.0 * v["weight"] / v["smoothing"],
            per_sample=True, gradient=self._gradient, curvature=lambda x, v: _Curvature(x, v["weight"], v["smoothing"]),
        )  # fmt: skip
        upper = UpperLoss(
            lambda x: 0.5 * (x - self.clean).square().sum((1, 2)), 1.0, convex=True, gradient=self._upper_gradient
        )
        return CertifiedProblem(lower, upper)

    def _objective(self, x: Tensor, values: Values) -> Tensor:
        fit = 0.5 * (x - self.noisy).square().sum((1, 2))
        return fit + 0.5 * values["weight"] * smoothed_total_variation(x, values["smoothing"])

    def _gradient(self, x: Tensor, values: Values) -> Tensor:
        penalty = smoothed_total_variation_gradient(x, values["smoothing"])
        return torch.sub(x, self.noisy).add_(penalty, alpha=0.5 * float(values["weight"]))

    def _upper_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = x - self.clean
        return 0.5 * slope.square().sum((1, 2)), slope

    def denoised(self, raw: Tensor, eps: float, fresh: bool = False, start: Tensor | None = None) -> tuple[Tensor, int]:
        """The images denoised at given unconstrained values, to a certified distance, and the gradients it took."""
        y = self.fresh_noisy if fresh else self.noisy
        weight, smoothing = (float(v) for v in raw.exp())

        def gradient(x: Tensor) -> Tensor:
            return torch.sub(x, y).add_(smoothed_total_variation_gradient(x, smoothing), alpha=0.5 * weight)

        L = 1.0 + 4.0 * weight / smoothing
        found = accelerated_gradient(gradient, y if start is None else start, 1.0, L, eps, max_iterations=20_000)
        return found.x, found.iterations

    def f(self, raw: Tensor, eps: float = 1e-3, start: Tensor | None = None) -> float:
        """The upper loss at given unconstrained values, (2,): log-weight, log-smoothing."""
        return 0.5 * float((self.denoised(raw, eps, start=start)[0] - self.clean).square().sum()) / len(self.clean)

    def fresh_psnr(self, raw: Tensor, eps: float = 1e-3) -> float:
        """Mean peak signal-to-noise ratio in dB on the fresh images."""
        error = (self.denoised(raw, eps, fresh=True)[0] - self.fresh_clean).square().mean((1, 2))
        return float(-10 * error.log10().mean())


class _Curvature:
    def __init__(self, x: Tensor, weight: Tensor, smoothing: Tensor) -> None:
        self.tv, self.half = TotalVariationCurvature(x, smoothing), 0.5 * float(weight)

    def hvp(self, vector: Tensor, /) -> Tensor:
        return torch.add(vector, self.tv.hvp(vector), alpha=self.half)

    def mixed_vjp(self, vector: Tensor, /) -> Values:
        return {
            "weight": 0.5 * (vector * self.tv.gradient).sum(),
            "smoothing": self.half * self.tv.smoothing_vjp(vector).sum(),
        }


def photographs(seed: int, size: int = SIZE, noise: float = NOISE) -> VariationalDenoising:
    """A random region of each of four photographs that ship with scikit-image, halved in size, with Gaussian noise.

    Args:
        seed: re-draws the regions and the noise, of the images to learn from and of those to test on.
        size: height and width after averaging blocks of two by two.
        noise: standard deviation.
    """
    generator = np.random.default_rng(seed)
    parts: list[Tensor] = []
    for _ in range(2):
        clean = np.stack([_region(image, size, generator) for image in _photographs()])
        noisy = clean + noise * generator.standard_normal(clean.shape)
        parts += [torch.from_numpy(clean), torch.from_numpy(noisy)]
    return VariationalDenoising(*parts)


def _region(image: np.ndarray, size: int, generator: np.random.Generator) -> Float[np.ndarray, "size size"]:
    top, left = (int(generator.integers(0, length - 2 * size + 1)) for length in image.shape)
    part = image[top : top + 2 * size, left : left + 2 * size]
    return part.reshape(size, 2, size, 2).mean((1, 3))


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    from skimage import data

    return tuple(np.asarray(getattr(data, name)(), float) / 255 for name in ("camera", "coins", "moon", "brick"))
