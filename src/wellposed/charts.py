"""Charts: smooth one-to-one maps from the real line onto the range of a hyperparameter."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Chart = Literal["exp", "softplus", "sigmoid", "identity"]

SIGMOID_LIMIT = 15.0
"""Largest |raw| of the sigmoid chart: beyond 17 a float32 sigmoid is exactly 1, and 1 / (1 - rate) infinite."""


def choose_chart(low: float, high: float) -> Chart:
    """The chart that fits a range: sigmoid for a bounded one, softplus for a half line, identity for all reals.

    Example:
        >>> choose_chart(0.0, 1.0), choose_chart(0.0, math.inf), choose_chart(-math.inf, math.inf)
        ('sigmoid', 'softplus', 'identity')
    """
    if math.isfinite(low) and math.isfinite(high):
        return "sigmoid"
    return "identity" if math.isinf(low) and math.isinf(high) else "softplus"


def to_range(raw: Tensor, chart: Chart, low: float, high: float) -> Tensor:
    """Constrained value of an unconstrained one, elementwise.

    | chart    | range        | value                         |
    |----------|--------------|-------------------------------|
    | sigmoid  | (low, high)  | low + (high - low) sigmoid(u) |
    | softplus | (low, inf)   | low + softplus(u)             |
    | softplus | (-inf, high) | high - softplus(u)            |
    | exp      | (low, inf)   | low + exp(u)                  |
    | identity | reals        | u                             |
    """
    if chart == "sigmoid":
        return low + (high - low) * torch.sigmoid(raw.clamp(-SIGMOID_LIMIT, SIGMOID_LIMIT))
    if chart == "exp":
        return low + raw.exp()
    if chart == "softplus":
        return low + F.softplus(raw) if math.isfinite(low) else high - F.softplus(raw)
    return raw.clone()


def from_range(value: Tensor, chart: Chart, low: float, high: float) -> Tensor:
    """The unconstrained value whose `to_range` is `value`; inverse of `to_range` inside the range."""
    if chart == "sigmoid":
        return (torch.log(value - low) - torch.log(high - value)).clamp(-SIGMOID_LIMIT, SIGMOID_LIMIT)
    if chart == "exp":
        return torch.log(value - low)
    if chart == "softplus":
        distance = value - low if math.isfinite(low) else high - value
        # log(exp(t) - 1) written so that it neither overflows for large t nor loses all digits for small.
        return distance + torch.log(-torch.expm1(-distance))
    return value.clone()
