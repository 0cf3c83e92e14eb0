"""`Hyperparameter`: a named, bounded strength: fixed, searched or learned, and safe from the training optimizer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .charts import Chart, choose_chart, from_range, to_range

_local = threading.local()


class Hyperparameter(nn.Module):
    """One unconstrained tensor and the chart that maps it into (low, high).

    Reading it, `h()` or `h.value`, gives a detached tensor, and `raw` is a buffer: the training optimizer can never
    drive a strength to zero. Only inside `substituted` (a tuner's context) does a gradient reach it.

    Args:
        init: initial value or tensor of values, strictly inside the range.
        low, high: open range; infinite ends allowed.
        chart: "auto" (see `charts.choose_chart`), "exp" for positive values over many decades, or a chart by name.
        shape: shape of the values; a scalar `init` is expanded to it.
        discrete: the training side reads `floor(value)`; a tuner's response sees the continuous one.
        per_example: a tuner may give each example of a batch its own value.
        tune: whether tuners learn it.
        name: shown in messages and histories; the attribute path by default.

    Raises:
        ValueError: if the range is empty, or init lies on or outside of its boundary.

    Example:
        >>> strength = Hyperparameter(3.0, low=0.0)
        >>> strength.value
        tensor(3.)
        >>> list(strength.parameters())
        []
    """

    raw: Tensor

    def __init__(
        self,
        init: float | Tensor,
        low: float = 0.0,
        high: float = math.inf,
        chart: Literal["auto", "exp", "softplus", "sigmoid", "identity"] = "auto",
        shape: tuple[int, ...] = (),
        discrete: bool = False,
        per_example: bool = False,
        tune: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.low, self.high = float(low), float(high)
        self.discrete, self.per_example, self.tune = discrete, per_example, tune
        if not self.low < self.high:
            raise ValueError(f"{self}: low must be < high, got ({low}, {high})")
        self.chart: Chart = choose_chart(self.low, self.high) if chart == "auto" else chart
        self._check_chart()
        value = torch.as_tensor(init, dtype=torch.get_default_dtype())
        value = value.expand(shape).clone() if shape else value.clone()
        if not bool(((value > self.low) & (value < self.high)).all()):
            raise ValueError(f"{self}: init must lie strictly inside ({self.low}, {self.high}), got {init}")
        # In float64, so that a value close to its boundary comes back as it was given.
        raw = from_range(value.double(), self.chart, self.low, self.high)
        self.register_buffer("raw", raw.to(value.dtype))

    def __str__(self) -> str:
        return f"Hyperparameter {self.name!r}" if self.name else "Hyperparameter"

    def _check_chart(self) -> None:
        fits = {
            "exp": math.isfinite(self.low) and math.isinf(self.high),
            "softplus": math.isfinite(self.low) != math.isfinite(self.high),
            "sigmoid": math.isfinite(self.low) and math.isfinite(self.high),
            "identity": math.isinf(self.low) and math.isinf(self.high),
        }
        if self.chart not in fits:
            raise ValueError(f"{self}: chart must be 'auto' or one of {sorted(fits)}, got {self.chart!r}")
        if not fits[self.chart]:
            raise ValueError(f"{self}: chart {self.chart!r} does not fit the range ({self.low}, {self.high})")

    def from_raw(self, raw: Tensor) -> Tensor:
        """Constrained, continuous value of an unconstrained tensor."""
        return to_range(raw, self.chart, self.low, self.high)

    def forward(self) -> Tensor:
        """The constrained value: detached, or differentiable in what a tuner substituted; floored if discrete."""
        raw = _substitutions().get(id(self))
        value = self.from_raw(self.raw.detach() if raw is None else raw)
        return value.floor() if self.discrete else value

    @property
    def value(self) -> Tensor:
        """The same as calling it."""
        return cast(Tensor, self())

    @torch.no_grad()
    def set_(self, value: float | Tensor) -> None:
        """Set the constrained value in place.

        Raises:
            ValueError: if it does not lie strictly inside the range.
        """
        tensor = torch.as_tensor(value, dtype=self.raw.dtype, device=self.raw.device).expand(self.raw.shape)
        if not bool(((tensor > self.low) & (tensor < self.high)).all()):
            raise ValueError(f"{self}: value must lie strictly inside ({self.low}, {self.high}), got {value}")
        self.raw.copy_(from_range(tensor.double(), self.chart, self.low, self.high))

    def extra_repr(self) -> str:
        return f"name={self.name!r}, range=({self.low}, {self.high}), chart={self.chart!r}"


def _substitutions() -> dict[int, Tensor]:
    stack: list[dict[int, Tensor]] = getattr(_local, "stack", [])
    return stack[-1] if stack else {}


@contextmanager
def substituted(values: Mapping[Hyperparameter, Tensor]) -> Iterator[None]:
    """Inside the block, each hyperparameter reads its unconstrained value from the tensor given (with gradients).

    Blocks nest; the inner one wins and the outer one holds for the rest.

    Example:
        >>> h = Hyperparameter(1.0)
        >>> u = h.raw.clone().requires_grad_()
        >>> with substituted({h: u}):
        ...     (2 * h()).backward()
        >>> bool(u.grad > 0), h().requires_grad
        (True, False)
    """
    if not hasattr(_local, "stack"):
        _local.stack = []
    _local.stack.append({**_substitutions(), **{id(h): u for h, u in values.items()}})
    try:
        yield
    finally:
        _local.stack.pop()


@contextmanager
def differentiable(hyperparameters: Iterable[Hyperparameter]) -> Iterator[list[Tensor]]:
    """Inside the block, reading the hyperparameters is differentiable in the leaf tensors that it yields."""
    hyperparameters = list(hyperparameters)
    leaves = [h.raw.detach().clone().requires_grad_() for h in hyperparameters]
    with substituted(dict(zip(hyperparameters, leaves, strict=True))):
        yield leaves


def value_of(strength: Any) -> Any:
    """What a method multiplies with: the float itself, or a hyperparameter's current value (a tensor).

    Example:
        >>> value_of(0.5), value_of(Hyperparameter(0.5, 0.0, 1.0))
        (0.5, tensor(0.5000))
    """
    return strength() if isinstance(strength, Hyperparameter) else strength


def number_of(strength: Any) -> float:
    """The same as a plain number, for what has no derivative in it, such as the rate of a random mask.

    Example:
        >>> number_of(0.5), number_of(Hyperparameter(0.25, 0.0, 1.0))
        (0.5, 0.25)
    """
    value = value_of(strength)
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def check_strength(owner: str, name: str, strength: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Check a strength, float or `Hyperparameter`, against the closed range [low, high].

    Raises:
        TypeError: if it is neither a number nor a Hyperparameter.
        ValueError: naming owner, argument, value and what is allowed.

    Example:
        >>> check_strength("EarlyLearning", "strength", -1.0)
        Traceback (most recent call last):
        ValueError: EarlyLearning: strength must be >= 0, got -1.0
    """
    allowed = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
    if isinstance(strength, Hyperparameter):
        if strength.low < low or strength.high > high:
            raise ValueError(
                f"{owner}: {name} must be {allowed}, got a Hyperparameter with range ({strength.low}, {strength.high})"
            )
        if strength.name is None:
            strength.name = f"{owner}.{name}"
        return
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number or a Hyperparameter, got {type(strength).__name__}")
    if not low <= strength <= high:
        raise ValueError(f"{owner}: {name} must be {allowed}, got {strength}")


def refuse_hyperparameter(owner: str, name: str, value: Any, reason: str) -> None:
    """Raise where an argument cannot be learned, with the reason.

    Raises:
        TypeError: if value is a `Hyperparameter`.

    Example:
        >>> refuse_hyperparameter("WeightAveraging", "decay", Hyperparameter(0.9, 0.0, 1.0), "no loss depends on it")
        Traceback (most recent call last):
        TypeError: WeightAveraging: decay cannot be a Hyperparameter: no loss depends on it
    """
    if isinstance(value, Hyperparameter):
        raise TypeError(f"{owner}: {name} cannot be a Hyperparameter: {reason}")


def named_hyperparameters(module: nn.Module, tuned_only: bool = True) -> dict[str, Hyperparameter]:
    """All hyperparameters inside a module by their attribute path (those with `tune=True`, unless told otherwise).

    Example:
        >>> list(named_hyperparameters(nn.ModuleDict({"strength": Hyperparameter(1.0)})))
        ['strength']
    """
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, Hyperparameter) and (part.tune or not tuned_only)
    }


def pack(hyperparameters: Mapping[str, Hyperparameter]) -> tuple[Tensor, dict[str, slice]]:
    """One flat vector of all unconstrained values, and where each stands in it.

    Example:
        >>> u, slices = pack({"a": Hyperparameter(1.0), "b": Hyperparameter(1.0, shape=(2,))})
        >>> u.shape, slices["b"]
        (torch.Size([3]), slice(1, 3, None))
    """
    slices: dict[str, slice] = {}
    start = 0
    for name, h in hyperparameters.items():
        slices[name] = slice(start, start + h.raw.numel())
        start += h.raw.numel()
    values = [h.raw.detach().reshape(-1) for h in hyperparameters.values()]
    return (torch.cat(values) if values else torch.empty(0)), slices


def split(vector: Tensor, hyperparameters: Mapping[str, Hyperparameter]) -> dict[Hyperparameter, Tensor]:
    """A flat vector cut into each hyperparameter's shape, differentiably; what `substituted` takes."""
    parts: dict[Hyperparameter, Tensor] = {}
    start = 0
    size = sum(h.raw.numel() for h in hyperparameters.values())
    if size != vector.numel():
        raise ValueError(f"split: vector must hold {size} values, got {vector.numel()}")
    for h in hyperparameters.values():
        parts[h] = vector[start : start + h.raw.numel()].reshape(h.raw.shape)
        start += h.raw.numel()
    return parts


@torch.no_grad()
def unpack_(vector: Tensor, hyperparameters: Mapping[str, Hyperparameter]) -> None:
    """Write a flat vector back into the hyperparameters, in place."""
    for h, value in split(vector, hyperparameters).items():
        h.raw.copy_(value)
