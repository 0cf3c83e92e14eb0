"""Weight decay on weights alone, fixed in the optimizer or learnable as a penalty."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batching import unwrap
from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step
from .compander_module import companded


def decayed_names(model: nn.Module, on: Literal["weights", "all"] = "weights") -> list[str]:
    """Names of the parameters to decay: matrices and convolutions (two dimensions or more), or all.

    Example:
        >>> decayed_names(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        ['0.weight']
    """
    return [name for name, p in unwrap(model).named_parameters() if on == "all" or p.ndim >= 2]


class WeightDecay(Regularizer):
    """Weight decay: L2 under SGD, decoupled under AdamW; biases and norms are spared by default.

    A float becomes the optimizer's own `weight_decay` of the parameters concerned. A `Hyperparameter` becomes the
    penalty `strength / 2 * ||w||^2`, whose gradient is that of L2 under SGD, so that a tuner can learn it.

    Args:
        strength: coefficient, >= 0.
        on: "weights" (two dimensions or more) or "all".

    Raises:
        ValueError: if strength is negative or `on` is unknown.

    Example:
        >>> WeightDecay(0.01).parameter_groups(nn.Linear(2, 2))
        [{'names': ['weight'], 'weight_decay': 0.01}, {'names': ['bias'], 'weight_decay': 0.0}]
    """

    def __init__(self, strength: float | Hyperparameter = 1e-4, on: Literal["weights", "all"] = "weights") -> None:
        super().__init__()
        check_strength("WeightDecay", "strength", strength)
        if on not in ("weights", "all"):
            raise ValueError(f"WeightDecay: on must be 'weights' or 'all', got {on!r}")
        self.strength = strength
        self.on = on

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = decayed_names(model, self.on)  # type: ignore[arg-type]
        spared = [name for name, _ in unwrap(model).named_parameters() if name not in set(decayed)]
        # As a penalty it must not be counted a second time by the optimizer's own default.
        in_optimizer = 0.0 if isinstance(self.strength, Hyperparameter) else self.strength
        groups = [(decayed, in_optimizer), (spared, 0.0)]
        return [{"names": names, "weight_decay": value} for names, value in groups if names]

    def penalty(self, step: Step) -> Tensor | None:
        if not isinstance(self.strength, Hyperparameter):
            return None
        named: dict[str, Tensor] = dict(unwrap(step.model).named_parameters())
        # What a compander trains is not the weight: with fixed scales decay is that of w (see `WeightCompander`).
        named |= {one.v_name: one.w for one in companded(step.model) if one.compander.decays_weight}
        squares = torch.stack([named[n].square().sum() for n in decayed_names(step.model, self.on)])  # type: ignore[arg-type]
        return squares.sum() * (0.5 * value_of(self.strength))
