"""How long a prefix nested dropout keeps: distributions over 1, ..., K, and what they mean for each feature."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Distribution = Literal["gaussian", "geometric", "uniform"]
DISTRIBUTIONS = ("gaussian", "geometric", "uniform")


def default_sigma(num_features: int) -> float:
    """A fifth of the features, but at least 10 and at most 100 (the paper uses 10 on CIFAR-10 and 100 elsewhere).

    Example:
        >>> default_sigma(512), default_sigma(256), default_sigma(20)
        (100.0, 51.2, 10.0)
    """
    return min(100.0, max(10.0, num_features / 5))


def prefix_distribution(
    num_features: int,
    dist: Distribution = "gaussian",
    *,
    sigma: Any = None,
    mu: float = 0.0,
    rate: float | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " features"]:
    """Probabilities `p_k` that exactly the first k features are kept, k = 1, ..., K = num_features.

    - "gaussian": `p_k` proportional to `exp(-((k - mu) / sigma)^2)`, as the authors' code of arXiv 2206.13140 has it.
      There is no factor 2: the standard deviation of that Gaussian is `sigma / sqrt(2)`. With mu = 0 the mean of k is
      about `sigma / sqrt(pi) + 1 / pi`, 95 % of the draws lie below `1.39 sigma`.
    - "geometric": `p_k` proportional to `(1 - rate)^(k - 1)` (Rippel, Gelbart and Adams 2014).
    - "uniform": `p_k = 1 / K`.

    Args:
        num_features: K, >= 1.
        dist: one of the three.
        sigma: width of the Gaussian, > 0, a number or a 0-d tensor; `default_sigma(K)` if None.
        mu: k at which the Gaussian peaks.
        rate: of the geometric distribution, in (0, 1); its untruncated mean is 1 / rate.
        dtype: of the result; torch's default dtype if None. Computed in float64.

    Raises:
        ValueError: for an argument out of range, or one that does not belong to `dist`.

    Example:
        >>> prefix_distribution(4, "uniform")
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        >>> prefix_distribution(3, "geometric", rate=0.5)
        tensor([0.5714, 0.2857, 0.1429])
    """
    _check(num_features, dist, sigma, mu, rate)
    k = torch.arange(1, num_features + 1, dtype=torch.float64)
    if dist == "gaussian":
        width = float(default_sigma(num_features) if sigma is None else sigma)
        logits = -(((k - mu) / width) ** 2)
    elif dist == "geometric":
        assert rate is not None
        logits = (k - 1) * math.log1p(-rate)
    else:
        logits = torch.zeros_like(k)
    return logits.softmax(0).to(torch.get_default_dtype() if dtype is None else dtype)


def keep_probabilities(probabilities: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
    """`S_j = sum over k >= j of p_k`: how likely each feature is kept; 1 for the first, then decreasing.

    Example:
        >>> keep_probabilities(torch.tensor([0.5, 0.25, 0.25]))
        tensor([1.0000, 0.5000, 0.2500])
    """
    # From the back, where the terms are small: a sum from the front would lose the tail to rounding.
    kept = probabilities.flip(0).cumsum(0).flip(0)
    return kept / kept[0]


def check_distribution(owner: str, probabilities: Tensor, num_features: int) -> None:
    """Check a distribution of the user's own.

    Raises:
        ValueError: naming owner and fault, if it is no (num_features,) vector of numbers >= 0 that sum to 1.
    """
    if probabilities.shape != (num_features,):
        raise ValueError(f"{owner}: dist must have shape ({num_features},), got {tuple(probabilities.shape)}")
    if not bool((probabilities >= 0).all()):
        raise ValueError(f"{owner}: dist must hold probabilities >= 0, got {float(probabilities.min())}")
    total = float(probabilities.double().sum())
    if abs(total - 1.0) > 1e-4:
        raise ValueError(f"{owner}: dist must sum to 1, got {total}")


def _check(num_features: int, dist: str, sigma: Any, mu: float, rate: float | None) -> None:
    owner = "prefix_distribution"
    if num_features < 1:
        raise ValueError(f"{owner}: num_features must be >= 1, got {num_features}")
    if dist not in DISTRIBUTIONS:
        raise ValueError(f"{owner}: dist must be one of {list(DISTRIBUTIONS)} or a tensor, got {dist!r}")
    if dist != "gaussian" and (sigma is not None or mu != 0.0):
        raise ValueError(f"{owner}: sigma and mu belong to dist='gaussian', got dist={dist!r}")
    if (dist == "geometric") != (rate is not None):
        raise ValueError(f"{owner}: rate must be given for dist='geometric' and only for it, got {rate} for {dist!r}")
    if sigma is not None and not (math.isfinite(float(sigma)) and float(sigma) > 0):
        raise ValueError(f"{owner}: sigma must be > 0, got {float(sigma)}")
    if not math.isfinite(mu):
        raise ValueError(f"{owner}: mu must be finite, got {mu}")
    if rate is not None and not 0 < rate < 1:
        raise ValueError(f"{owner}: rate must lie in (0, 1), got {rate}")
