"""Nested dropout: keep a random prefix of the features, so that the first ones learn to say the most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from ..hyperparameter import Hyperparameter, check_strength, value_of
from .prefix_lengths import Distribution, check_distribution, keep_probabilities, prefix_distribution


class NestedDropout(nn.Module):
    """Nested dropout layer (Rippel, Gelbart and Adams 2014), as arXiv 2206.13140 uses it against label noise.

    In training it draws k from a distribution on 1, ..., K and zeroes all features after the k-th; what is kept is not
    rescaled. In evaluation it keeps the first `eval_k` features, or all. Gradients of zeroed features are exactly 0.
    It has no parameters; any floating dtype passes through unchanged, also under autocast and `torch.compile`.

    Args:
        num_features: K, size of the input along `dim`.
        sigma: width of the Gaussian distribution, > 0, a number or a `Hyperparameter`; `default_sigma(K)` if None.
            Features beyond 2 sigma are practically never trained.
        dist: "gaussian", "geometric", "uniform" (see `prefix_distribution`), or a (K,) tensor of probabilities.
        mu: peak of the Gaussian.
        rate: of the geometric distribution, in (0, 1).
        per: "batch" draws one k for a forward pass (the paper), "sample" one for each example.
        dim: the feature dimension: 1 for (batch, K) and for feature maps (batch, K, height, width), whose channels are
            masked; -1 for (batch, length, K).
        rescale: divide each kept feature by its probability of being kept, so that the mean output is the input. The
            paper does not.
        sync: under `torch.distributed`, use the draw of rank 0 on all ranks (per="batch"); by default each rank draws
            its own k, as each micro-batch does.
        generator: source of the draws; torch's global state if None, which `fit` seeds and which a second evaluation of
            the same batch repeats. A generator of your own is not repeated there, and is not in the state dict.

    Attributes:
        eval_k: features kept in evaluation, 1 to K, or None for all; in the state dict as `eval_prefix` (0 for None).
        active: set to False to let everything pass in training (one layer of several trains at a time).

    Raises:
        ValueError: for an argument out of range, or an input whose size along `dim` is not `num_features`.

    Example:
        >>> layer = NestedDropout(4, dist=torch.tensor([0.0, 1.0, 0.0, 0.0]))
        >>> layer(torch.ones(1, 4))
        tensor([[1., 1., 0., 0.]])
        >>> layer.eval_k = 3
        >>> layer.eval()(torch.ones(1, 4))
        tensor([[1., 1., 1., 0.]])
    """

    probabilities: Tensor
    eval_prefix: Tensor

    def __init__(
        self,
        num_features: int,
        sigma: float | Hyperparameter | None = None,
        *,
        dist: Distribution | Tensor = "gaussian",
        mu: float = 0.0,
        rate: float | None = None,
        per: Literal["batch", "sample"] = "batch",
        dim: int = 1,
        rescale: bool = False,
        sync: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"NestedDropout: num_features must be >= 1, got {num_features}")
        if sigma is not None:
            check_strength("NestedDropout", "sigma", sigma)
            if sigma == 0:
                raise ValueError("NestedDropout: sigma must be > 0, got 0")
        if per not in ("batch", "sample"):
            raise ValueError(f"NestedDropout: per must be 'batch' or 'sample', got {per!r}")
        if dim == 0:
            raise ValueError("NestedDropout: dim must not be 0, the batch")
        if sync and per == "sample":
            raise ValueError("NestedDropout: sync needs per='batch'; ranks hold different examples")
        self.num_features, self.per, self.dim = num_features, per, dim
        self.rescale, self.sync, self.generator = rescale, sync, generator
        self.active = True
        self.mu = mu
        self.sigma = sigma
        if isinstance(dist, Tensor):
            if sigma is not None or mu != 0.0 or rate is not None:
                raise ValueError("NestedDropout: sigma, mu and rate belong to a named dist, not to a tensor")
            check_distribution("NestedDropout", dist, num_features)
            probabilities = dist.detach().clone().float()
        else:
            start = value_of(sigma)
            probabilities = prefix_distribution(num_features, dist, sigma=start, mu=mu, rate=rate, dtype=torch.float32)
        self.register_buffer("probabilities", probabilities)
        self.register_buffer("eval_prefix", torch.zeros((), dtype=torch.int64))
        # A tuple, so that the leader is no submodule.
        self._leader: tuple[NestedDropout, ...] = ()
        self._leads = False
        self._last_draw: Tensor | None = None

    def forward(self, features: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Zero all features after the drawn prefix (in evaluation: after the chosen one); same shape and dtype."""
        size = features.shape[self.dim] if -features.ndim <= self.dim < features.ndim else None
        if size != self.num_features:
            raise ValueError(
                f"NestedDropout: input must have {self.num_features} features along dim {self.dim}, got shape "
                f"{tuple(features.shape)}"
            )
        if self.training and not self.active:
            return features
        if not self.training:
            positions = torch.arange(self.num_features, device=features.device)
            return features.masked_fill(self._along(positions >= self._eval_length(), features), 0)
        kept = self.keep_probabilities().to(features.device)
        # k >= j exactly where a uniform number falls below S_j: one comparison draws the whole prefix, and no k
        # has to leave the device.
        dropped = self._draw(features) >= self._along(kept, features)
        masked = features.masked_fill(dropped, 0)
        if not self.rescale:
            return masked
        # Zeroed before the cast: 1/S of a feature that is hardly ever kept overflows in half precision.
        return masked * self._along(kept, features).reciprocal().masked_fill(dropped, 0).to(features.dtype)

    def keep_probabilities(self) -> Float[Tensor, " features"]:
        """`S_j`: how likely each feature is kept in training."""
        if self._leader:
            return self._leader[0].keep_probabilities()
        if not isinstance(self.sigma, Hyperparameter):
            return keep_probabilities(self.probabilities)
        k = torch.arange(1, self.num_features + 1, device=self.sigma.raw.device)
        return keep_probabilities((-(((k - self.mu) / self.sigma().float()) ** 2)).softmax(0))

    def follow(self, leader: NestedDropout | None) -> None:
        """Use the draw that `leader` made last instead of drawing: two networks then keep the same prefix.

        The leader's network must run first, as in a `Pair`. None ends it.

        Raises:
            ValueError: if the two differ in size, or draw for each example.
        """
        if leader is None:
            self._leader = ()
            return
        if leader is self or leader._leader:
            raise ValueError("NestedDropout: a leader must be another layer, which does not follow itself")
        if leader.num_features != self.num_features or "sample" in (leader.per, self.per):
            raise ValueError(
                f"NestedDropout: a leader must have {self.num_features} features and draw per batch, got "
                f"{leader.num_features} features, per={leader.per!r} and here per={self.per!r}"
            )
        self._leader = (leader,)
        leader._leads = True

    @property
    def eval_k(self) -> int | None:
        """Features kept in evaluation, or None for all."""
        return int(self.eval_prefix) or None

    @eval_k.setter
    def eval_k(self, k: int | None) -> None:
        if k is not None and not 1 <= k <= self.num_features:
            raise ValueError(f"NestedDropout: eval_k must lie in [1, {self.num_features}] or be None, got {k}")
        self.eval_prefix.fill_(k or 0)

    def extra_repr(self) -> str:
        return f"{self.num_features}, per={self.per!r}, dim={self.dim}, eval_k={self.eval_k}"

    def _eval_length(self) -> Tensor:
        return torch.where(self.eval_prefix > 0, self.eval_prefix, self.num_features)

    def _draw(self, features: Tensor) -> Tensor:
        """A uniform number for the batch, or one for each example, that broadcasts with the features."""
        if self._leader and (last := self._leader[0]._last_draw) is not None:
            return last.reshape([1] * features.ndim)
        device = features.device if self.generator is None else self.generator.device
        count = len(features) if self.per == "sample" else 1
        draw = torch.rand(count, *[1] * (features.ndim - 1), device=device, generator=self.generator)
        draw = draw.to(features.device)
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.broadcast(draw, 0)
        if self._leads:
            self._last_draw = draw
        return draw

    def _along(self, values: Tensor, features: Tensor) -> Tensor:
        shape = [1] * features.ndim
        shape[self.dim] = self.num_features
        return values.to(features.device).reshape(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedDropout:
        # `.half()` must not round the probabilities: the tail of the distribution would vanish.
        before = self.probabilities
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before.device.type != "meta":
            self.probabilities = before.to(self.probabilities.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_draw": None}
