"""Random hyperparameters around the present ones: the flat vector u, its perturbations, their scales and entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..charts import SIGMOID_LIMIT
from ..hyperparameter import Hyperparameter, pack, unpack_

LOG_ROOT_TWO_PI_E = 0.5 * math.log(2 * math.pi * math.e)


def perturbation_entropy(scale: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Entropy of N(0, diag(scale^2)): the sum of log(s sqrt(2 pi e)), in at least float32 (arXiv 1903.03088, eq. 9).

    Args:
        scale: standard deviations, > 0.

    Example:
        >>> perturbation_entropy(torch.ones(2))
        tensor(2.8379)
    """
    wide = scale.float() if scale.dtype in (torch.float16, torch.bfloat16) else scale
    return wide.log().sum() + scale.numel() * LOG_ROOT_TWO_PI_E


def inverse_softplus(value: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The number whose softplus is `value`, > 0.

    Example:
        >>> torch.nn.functional.softplus(inverse_softplus(torch.tensor(0.5)))
        tensor(0.5000)
    """
    return value + torch.log(-torch.expm1(-value))


class Perturbations:
    """Where each hyperparameter stands in the flat vector u, and how u + noise is handed to all of them.

    A hyperparameter with `per_example=True` gets a value of its own for every example; the others one draw a batch,
    copied to all rows.

    Args:
        hypers: by name.

    Example:
        >>> parts = Perturbations({"a": Hyperparameter(1.0, per_example=True), "b": Hyperparameter(1.0)})
        >>> noise = parts.draw(3, torch.Generator().manual_seed(0))
        >>> noise.shape, len(noise[:, 0].unique()), len(noise[:, 1].unique())
        (torch.Size([3, 2]), 3, 1)
    """

    def __init__(self, hypers: Mapping[str, Hyperparameter]) -> None:
        self.hypers = dict(hypers)
        _, self.slices = pack(self.hypers)
        self.size = sum(h.raw.numel() for h in self.hypers.values())
        self.per_example = [name for name, h in self.hypers.items() if h.per_example]
        self.drawn_once = self._places([n for n in self.hypers if n not in self.per_example])
        self.bounded = self._places([n for n, h in self.hypers.items() if h.chart == "sigmoid"])

    def _places(self, names: list[str]) -> Tensor:
        """Columns of some hyperparameters in the flat vector."""
        found = [place for n in names for place in range(self.slices[n].start, self.slices[n].stop)]
        return torch.tensor(found, dtype=torch.int64)

    def vector(self) -> Float[Tensor, " n"]:
        """The present unconstrained values."""
        return pack(self.hypers)[0]

    def write(self, u: Float[Tensor, " n"]) -> None:
        """Make `u` the present unconstrained values."""
        unpack_(u, self.hypers)

    @torch.no_grad()
    def clamp_(self, u: Float[Tensor, " n"]) -> None:
        """Keep bounded hyperparameters where float32 tells their values from the ends of the range."""
        if len(self.bounded):
            u[self.bounded] = u[self.bounded].clamp(-SIGMOID_LIMIT, SIGMOID_LIMIT)

    def draw(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n"]:
        """Standard normal numbers for a batch of `rows` examples; a single row where none are drawn for each example."""
        if not self.per_example:
            return torch.randn(1, self.size, generator=generator)
        noise = torch.randn(rows, self.size, generator=generator)
        if len(self.drawn_once):
            noise[:, self.drawn_once] = noise[0, self.drawn_once]
        return noise

    def split(self, raw: Float[Tensor, "rows n"]) -> dict[str, Tensor]:
        """What each hyperparameter reads: (rows, *shape) where each example has its own, (*shape) else."""
        found: dict[str, Tensor] = {}
        for name, h in self.hypers.items():
            part = raw[:, self.slices[name]] if h.per_example else raw[0, self.slices[name]]
            found[name] = part.reshape(len(raw), *h.raw.shape) if h.per_example else part.reshape(h.raw.shape)
        return found

    def scales(self, scale: float | Mapping[str, float], owner: str) -> Float[Tensor, " n"]:
        """Standard deviations as a vector.

        Args:
            scale: one number for all hyperparameters, or one by name.
            owner: named in errors.

        Raises:
            ValueError: unless every hyperparameter has one that is > 0 and finite.
        """
        named = dict.fromkeys(self.hypers, scale) if not isinstance(scale, Mapping) else dict(scale)
        if set(named) != set(self.hypers):
            raise ValueError(f"{owner}: scale must name all of {sorted(self.hypers)}, got {sorted(named)}")
        found = torch.empty(self.size)
        for name, value in named.items():
            if not 0 < value < math.inf:  # type: ignore[operator]
                raise ValueError(f"{owner}: scale must be > 0 and finite, got {value} for {name!r}")
            found[self.slices[name]] = float(value)  # type: ignore[arg-type]
        return found
