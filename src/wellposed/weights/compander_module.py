"""A weight compander as a parametrization, and finding it in a model."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batching import unwrap
from ..hyperparameter import Hyperparameter, check_strength, value_of
from .compander_functions import (
    COMPANDER_FUNCTIONS,
    CompanderFunction,
    Scale,
    compand,
    compander_bound,
    compander_slope,
    number,
    uncompand,
)

MARGIN = 0.99
"""Weights are inverted up to this share of the bound; beyond, v grows without limit and its gradient vanishes."""


class Compander(nn.Module):
    """The parametrization `w = a f(v / b)` for `torch.nn.utils.parametrize.register_parametrization`.

    Args:
        a, b: height and width, > 0. A `Hyperparameter` can be shared by many layers and learned by a tuner.
        fn: "arctan" (the paper), "arsinh", "erf", "tanh", or the control "linear"; see `compand`.
        learnable: let the training optimizer learn a and b (arXiv 2306.16993, section III-B).
        log_space: learn `log a` and `log b`, which keeps both positive; the paper learns them as they are.
        unit: both scales are in units of this number, e.g. the standard deviation of the layer's weights.

    Raises:
        ValueError: if a scale is not > 0, fn is unknown, or a Hyperparameter is to be learnable.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = layer.weight.detach().clone()
        >>> layer = parametrize.register_parametrization(layer, "weight", Compander(a=0.7, b=0.7))
        >>> torch.allclose(layer.weight, before)
        True
    """

    def __init__(
        self,
        a: float | Hyperparameter = 0.7,
        b: float | Hyperparameter = 0.7,
        fn: CompanderFunction = "arctan",
        *,
        learnable: bool = False,
        log_space: bool = False,
        unit: float = 1.0,
    ) -> None:
        super().__init__()
        check_scales("Compander", a, b, fn, learnable)
        if not 0 < unit < math.inf:
            raise ValueError(f"Compander: unit must be > 0 and finite, got {unit}")
        self.fn: CompanderFunction = fn
        self.learnable, self.log_space, self.unit = learnable, log_space, unit
        self.a: Any = a
        self.b: Any = b
        if learnable:
            start = [torch.tensor(float(scale) * unit) for scale in (a, b)]  # type: ignore[arg-type]
            if log_space:
                self.log_a, self.log_b = (nn.Parameter(scale.log()) for scale in start)
            else:
                self.a, self.b = (nn.Parameter(scale) for scale in start)

    def scales(self) -> tuple[Scale, Scale]:
        """Height and width in use: numbers, or tensors of shape () where they are learned or tuned."""
        if self.learnable:
            return (self.log_a.exp(), self.log_b.exp()) if self.log_space else (self.a, self.b)
        return value_of(self.a) * self.unit, value_of(self.b) * self.unit

    @property
    def bound(self) -> float:
        """Supremum of |w|."""
        return compander_bound(self.scales()[0], self.fn)

    @property
    def decays_weight(self) -> bool:
        """Whether weight decay acts on w (fixed scales) or on v (scales that the training optimizer learns)."""
        return not self.learnable

    def forward(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight of v."""
        return compand(v, *self.scales(), self.fn)

    def slope(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`dw/dv`."""
        return compander_slope(v, *self.scales(), self.fn)

    def right_inverse(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The v of a weight.

        Raises:
            ValueError: if a weight is larger than 0.99 of the bound, or so large that its v overflows.
        """
        problem = self.refusal(w)
        if problem:
            raise ValueError(f"Compander: {problem}")
        return uncompand(w, *self.scales(), self.fn)

    @torch.no_grad()
    def refusal(self, w: Tensor) -> str:
        """Why weights cannot be inverted, or an empty text."""
        largest = float(w.abs().max()) if w.numel() else 0.0
        # Written so that NaN is refused, too. arsinh has no bound, but sinh overflows.
        if not largest <= MARGIN * self.bound:
            return f"max |w| = {largest:g} exceeds {MARGIN * self.bound:g} = {MARGIN} x {self._described_bound()}"
        if math.isinf(self.bound) and not torch.isfinite(uncompand(w, *self.scales(), self.fn)).all():
            return f"max |w| = {largest:g} is too large for {self.fn}: v would overflow; raise a"
        return ""

    def _described_bound(self) -> str:
        return f"{self.bound:g}, the bound of {self.fn} with a = {number(self.scales()[0]):g}"

    def extra_repr(self) -> str:
        a, b = (number(scale) for scale in self.scales())
        kind = ("learned in log space" if self.log_space else "learned") if self.learnable else "fixed"
        return f"a={a:g}, b={b:g}, fn={self.fn!r}, {kind}"

    def get_extra_state(self) -> Tensor:
        """Fixed scales and the function, so that a state dict alone reproduces the weights."""
        fixed = [float(s) if isinstance(s, (int, float)) else math.nan for s in (self.a, self.b)]
        return torch.tensor([*fixed, self.unit, COMPANDER_FUNCTIONS.index(self.fn)], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from `get_extra_state`.

        Raises:
            ValueError: if the state belongs to another function.
        """
        *fixed, self.unit, number = state.tolist()
        if COMPANDER_FUNCTIONS[int(number)] != self.fn:
            raise ValueError(f"Compander: the state is of fn={COMPANDER_FUNCTIONS[int(number)]!r}, not {self.fn!r}")
        for name, value in zip(("a", "b"), fixed, strict=True):
            if not math.isnan(value):
                setattr(self, name, value)


def check_choice(owner: str, name: str, value: Any, allowed: Collection[Any]) -> None:
    """Check one of a few words.

    Raises:
        ValueError: naming owner, argument, value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {list(allowed)}, got {value!r}")


def check_scales(owner: str, a: Any, b: Any, fn: str, learnable: bool) -> None:
    """Check both scales and the function.

    Raises:
        ValueError: naming owner, argument, value and what is allowed.
    """
    check_choice(owner, "fn", fn, COMPANDER_FUNCTIONS)
    for name, scale in (("a", a), ("b", b)):
        check_strength(owner, name, scale)
        if isinstance(scale, Hyperparameter):
            if learnable:
                raise ValueError(
                    f"{owner}: {name} is a Hyperparameter, which a tuner learns; the training optimizer cannot learn "
                    "it as well: pass a number, or learnable='no'"
                )
        elif not 0 < scale < math.inf:
            raise ValueError(f"{owner}: {name} must be > 0 and finite, got {scale}")


@dataclass(frozen=True)
class Companded:
    """One tensor of a model that is companded.

    Attributes:
        name: of the weight in the plain model, e.g. "0.weight".
        module: its layer.
        compander: what makes it.
        parametrizations: all parametrizations of the tensor.
    """

    name: str
    module: nn.Module
    compander: Compander
    parametrizations: parametrize.ParametrizationList

    @property
    def tensor(self) -> str:
        """Name of the weight within its layer."""
        return self.name.rpartition(".")[2]

    @property
    def prefix(self) -> str:
        """Where its state stands in the model's state dict."""
        return self.name[: -len(self.tensor)] + f"parametrizations.{self.tensor}."

    @property
    def v_name(self) -> str:
        """Name of v in the model."""
        return f"{self.prefix}original"

    @property
    def direct(self) -> bool:
        """Whether v is a parameter, and not what other parametrizations make of one."""
        return self.parametrizations[0] is self.compander

    @property
    def v(self) -> Tensor:
        """The trained numbers."""
        return self.parametrizations.original

    @property
    def w(self) -> Tensor:
        """The weight, as a function of v."""
        return getattr(self.module, self.tensor)


def companded(model: nn.Module, *, ties: bool = False) -> list[Companded]:
    """The companded tensors of a model, each once; with `ties` a shared one once for each layer that uses it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = parametrize.register_parametrization(model[0], "weight", Compander())
        >>> [(one.name, one.v_name) for one in companded(model)]
        [('0.weight', '0.parametrizations.weight.original')]
    """
    found: list[Companded] = []
    seen: set[int] = set()
    for path, module in unwrap(model).named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor, parts in module.parametrizations.items():  # type: ignore[union-attr, operator]
            compander = next((part for part in parts if isinstance(part, Compander)), None)
            if compander is None or (parts.is_tensor and id(parts.original) in seen and not ties):
                continue
            seen.add(id(parts.original) if parts.is_tensor else id(parts))
            found.append(Companded(f"{path}.{tensor}" if path else tensor, module, compander, parts))
    return found
