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

    A Hyperparameter of shape (tensors,) gives each decayed tensor its own strength, in the order of `decayed_names` for
    the plain model. With `per_example=True` each example has its own: a layer whose weight differs between examples (a
    self-tuning network's) offers `squared_norm(name)`, and is decayed by the norm of each example's weight.

    Args:
        strength: coefficient, >= 0.
        on: "weights" (two dimensions or more) or "all".

    Raises:
        ValueError: if strength is negative or `on` is unknown; in training, if the strength's shape is neither () nor
            (tensors,).

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
        norms = squared_norms(step.model, self.on)  # type: ignore[arg-type]
        strength: Tensor = value_of(self.strength)
        shape = self.strength.raw.shape
        if shape not in ((), (len(norms),)):
            raise ValueError(
                f"WeightDecay: strength must have shape () or ({len(norms)},), one value for each decayed tensor, got "
                f"{tuple(shape)}"
            )
        # One number for each example where a layer's weights differ between them.
        squares = torch.stack(torch.broadcast_tensors(*norms), -1)
        if shape:
            return 0.5 * (squares * strength).sum(-1)
        return squares.sum(-1) * (0.5 * strength)


def squared_norms(model: nn.Module, on: Literal["weights", "all"] = "weights") -> list[Tensor]:
    """Squared norm of every decayed tensor of a model: scalars, or (batch,) where weights differ between examples.

    A module that offers `squared_norm(name)` answers for its own tensors `tensors`, and what is below it is its own
    business. What a compander trains is not the weight: with fixed scales decay is that of w (see `WeightCompander`).

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> [bool(n == layer.weight.square().sum()) for n in squared_norms(nn.Sequential(layer))]
        [True]
    """
    root = unwrap(model)
    weights: dict[int, Tensor] | None = None
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting: list[nn.Module] = [root]
    # By hand, and not by `named_parameters`: this runs in every step, and names take longer than norms.
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        if "parametrizations" in children and weights is None:
            weights = {id(one.v): one.w for one in companded(root) if one.compander.decays_weight}
        if hasattr(type(module), "squared_norm"):
            for name in module.tensors:  # type: ignore[union-attr]
                tensor = getattr(module, name)
                if tensor is not None and (on == "all" or tensor.ndim >= 2):
                    seen.add(id(tensor))
                    found.append(module.squared_norm(name))  # type: ignore[operator]
            continue
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or not (on == "all" or parameter.ndim >= 2):
                continue
            seen.add(id(parameter))
            found.append((weights or {}).get(id(parameter), parameter).square().sum())
        waiting.extend(child for child in reversed(children.values()) if child is not None)
    return found
