"""The box of a hyperparameter: between which values a search proposes, and on which scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hyperparameter import Hyperparameter


@dataclass(frozen=True)
class Box:
    """Bounds of one hyperparameter's values.

    Attributes:
        low, high: bounds; of a discrete hyperparameter, the least and the greatest integer.
        log: draw uniformly on a logarithmic scale.
        discrete: propose integers.
    """

    low: float
    high: float
    log: bool = False
    discrete: bool = False

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniform draws, float64; integers for a discrete hyperparameter.

        Example:
            >>> draws = Box(1e-4, 1.0, log=True).sample((1000,), torch.Generator().manual_seed(0))
            >>> bool((draws < 1e-2).double().mean().round(decimals=1) == 0.5)
            True
        """
        unit = torch.rand(shape, generator=generator, dtype=torch.float64)
        high = self.high + 1 if self.discrete else self.high
        if self.log:
            value = torch.exp(math.log(self.low) + (math.log(high) - math.log(self.low)) * unit)
        else:
            value = self.low + (high - self.low) * unit
        return value.floor().clamp(self.low, self.high) if self.discrete else value.clamp(self.low, self.high)


def choose_boxes(
    hypers: Mapping[str, Hyperparameter], boxes: Mapping[str, tuple[Any, ...]] | None, owner: str
) -> dict[str, Box]:
    """The box of every hyperparameter: the one given, or its own range.

    Args:
        hypers: by name.
        boxes: name -> (low, high) or (low, high, log); of a discrete hyperparameter, its integers, both ends included.
            `log` is False by default, but True with the chart "exp", which is that of values over many decades.
        owner: named in errors.

    Raises:
        ValueError: for a name that is unknown, a range that is infinite and has no box, or a box that is empty, leaves
            the range, or does not hold the initial value: that is the first trial.

    Example:
        >>> from wellposed import Hyperparameter
        >>> choose_boxes({"rate": Hyperparameter(0.1, 0.0, 0.8)}, None, "RandomSearch")["rate"]
        Box(low=0.0, high=0.8, log=False, discrete=False)
        >>> choose_boxes({"decay": Hyperparameter(1e-4, chart="exp")}, {"decay": (1e-6, 1e-2)}, "RandomSearch")["decay"]
        Box(low=1e-06, high=0.01, log=True, discrete=False)
    """
    given = dict(boxes or {})
    unknown = sorted(set(given) - set(hypers))
    if unknown:
        raise ValueError(f"{owner}: boxes names {unknown[0]!r}; the hyperparameters are {sorted(hypers)}")
    return {name: _checked(name, h, _box(name, h, given.get(name), owner), owner) for name, h in hypers.items()}


def _box(name: str, h: Hyperparameter, given: tuple[Any, ...] | None, owner: str) -> Box:
    if given is None:
        if math.isinf(h.low) or math.isinf(h.high):
            raise ValueError(
                f"{owner}: the hyperparameter {name!r} has the infinite range ({h.low}, {h.high}), in which there is no "
                f"uniform draw; pass boxes={{{name!r}: (low, high, log)}}, e.g. (1e-6, 1e-2, True)"
            )
        if h.discrete:
            return Box(math.floor(h.low), math.ceil(h.high) - 1, discrete=True)
        return Box(h.low, h.high)
    if len(given) not in (2, 3):
        raise ValueError(f"{owner}: boxes[{name!r}] must be (low, high) or (low, high, log), got {given!r}")
    low, high = float(given[0]), float(given[1])
    return Box(low, high, bool(given[2]) if len(given) == 3 else h.chart == "exp", h.discrete)


def _checked(name: str, h: Hyperparameter, box: Box, owner: str) -> Box:
    where = f"{owner}: boxes[{name!r}]"
    if not (math.isfinite(box.low) and math.isfinite(box.high) and box.low < box.high):
        raise ValueError(f"{where} must have finite bounds with low < high, got ({box.low}, {box.high})")
    if box.log and box.low <= 0:
        raise ValueError(f"{where} must have low > 0 on a logarithmic scale, got {box.low}")
    if box.discrete:
        if box.low != int(box.low) or box.high != int(box.high):
            raise ValueError(f"{where} must have integer bounds, because {name!r} is discrete, got {box}")
        inside = math.floor(h.low) <= box.low and box.high <= math.ceil(h.high) - 1
    else:
        inside = h.low <= box.low and box.high <= h.high
    if not inside:
        raise ValueError(f"{where} must lie inside the range ({h.low}, {h.high}), got ({box.low}, {box.high})")
    start = h().detach().double()
    slack = 1e-6 * (abs(box.low) + abs(box.high))  # the initial value went through its chart and back
    if not bool(((start >= box.low - slack) & (start <= box.high + slack)).all()):
        raise ValueError(
            f"{where} must hold the initial value {_shown(start)}, which is the first trial, got ({box.low}, {box.high})"
        )
    return box


def _shown(value: Tensor) -> Any:
    return value.item() if value.numel() == 1 else value.tolist()


def proposed_value(h: Hyperparameter, value: Tensor) -> Tensor:
    """A value of a box as one that the hyperparameter can hold: strictly inside its open range.

    An integer becomes the middle of all continuous values that are floored to it, so that no rounding loses it.

    Example:
        >>> from wellposed import Hyperparameter
        >>> proposed_value(Hyperparameter(1.5, 0.0, 4.0, discrete=True), torch.tensor(3.0))
        tensor(3.5000)
    """
    value = value.double()
    if h.discrete:
        value = (value.clamp(min=h.low) + (value.floor() + 1).clamp(max=h.high)) / 2
    value = value.to(h.raw.dtype)
    low, high = (torch.tensor(end, dtype=h.raw.dtype) for end in (h.low, h.high))
    return value.clamp(torch.nextafter(low, high), torch.nextafter(high, low)).to(h.raw.device)
