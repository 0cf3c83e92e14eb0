"""Constants that error bounds rest on: known, or only estimated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
Rule = Number | Callable[..., Number]
"""A number (one a sample: shape (samples,)), or a function that computes it."""


@dataclass(frozen=True)
class Known:
    """A bound that holds: what is computed from it is a certificate.

    Attributes:
        value: a number, one number a sample, or a function of the constrained hyperparameters by name (for bounds on
            the Jacobian: of the point and the hyperparameters).

    Example:
        >>> Known(lambda hypers: 2 * hypers["weight"]).upper({"weight": 3.0})
        6.0
    """

    value: Rule
    certified = True

    def upper(self, *arguments: Any) -> Number:
        """The bound from above."""
        return _evaluated(self.value, arguments)

    def lower(self, *arguments: Any) -> Number:
        """The bound from below."""
        return _evaluated(self.value, arguments)


@dataclass(frozen=True)
class Estimated:
    """A guess of a bound, widened by a safety factor: what is computed from it is an estimate, and reported as one.

    Attributes:
        value: as in `Known`.
        safety: factor >= 1; bounds from above are multiplied by it, bounds from below divided.

    Raises:
        ValueError: for a factor below 1.

    Example:
        >>> guess = Estimated(4.0, safety=2.0)
        >>> guess.lower(), guess.upper(), guess.certified
        (2.0, 8.0, False)
    """

    value: Rule
    safety: float = 1.1
    certified = False

    def __post_init__(self) -> None:
        if not 1.0 <= self.safety < math.inf:
            raise ValueError(f"Estimated: safety must be >= 1 and finite, got {self.safety}")

    def upper(self, *arguments: Any) -> Number:
        """The bound from above."""
        return _evaluated(self.value, arguments) * self.safety

    def lower(self, *arguments: Any) -> Number:
        """The bound from below."""
        return _evaluated(self.value, arguments) / self.safety


Constant = Known | Estimated


def as_constant(value: Constant | Rule, owner: str, name: str) -> Constant:
    """A plain number or function is taken at its word, as `Known`.

    Raises:
        TypeError: if it is neither a constant, a number, a tensor nor a function.
        ValueError: for a number that is negative or not finite.

    Example:
        >>> as_constant(2.0, "LowerLevel", "mu")
        Known(value=2.0)
    """
    constant = value if isinstance(value, (Known, Estimated)) else Known(value)
    inside = constant.value
    if isinstance(inside, bool) or not (callable(inside) or isinstance(inside, (int, float, Tensor))):
        raise TypeError(
            f"{owner}: {name} must be a number, a function, Known or Estimated, got {type(inside).__name__}"
        )
    if not callable(inside):
        least = float(torch.as_tensor(inside).min())
        if not 0 <= least < math.inf:
            raise ValueError(f"{owner}: {name} must be >= 0 and finite, got {inside}")
    return constant


def _evaluated(value: Rule, arguments: tuple[Any, ...]) -> Number:
    found = value(*arguments) if callable(value) else value
    # One number for all samples is a float: arithmetic with it costs no tensor operation.
    return float(found) if isinstance(found, Tensor) and found.ndim == 0 else found
