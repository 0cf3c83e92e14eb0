"""L2-SP: a penalty on the distance from the weights at the start of fine-tuning."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import unwrap
from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step


def squared_distance(tensors: list[Tensor], starts: list[Tensor]) -> Tensor:
    """`sum ||theta - theta_start||^2` over lists of tensors; differentiable, also twice and at the start itself.

    Example:
        >>> squared_distance([torch.tensor([3.0]), torch.tensor([1.0, 1.0])], [torch.tensor([1.0]), torch.zeros(2)])
        tensor(6.)
    """
    # One long vector: many small sums would take longer than the training step of a small model.
    difference = torch.cat([d.reshape(-1) for d in torch._foreach_sub(tensors, starts)])
    return difference.dot(difference)


class L2StartingPoint(Regularizer):
    """L2-SP (Li, Grandvalet and Davoine 2018, arXiv 1802.01483): `strength / 2 * ||theta - theta_start||^2`.

    Weight decay towards the weights with which fine-tuning began. The start is what `attach` finds, so every `fit` has its
    own. Half fine-tuning is its limit: infinite strength on one half, none on the other. The optimizer's own weight decay
    pulls to zero beside it.

    Args:
        strength: coefficient, >= 0; a `Hyperparameter` can be learned by a tuner.
        names: parts of the names of the parameters concerned; None means all that train.

    Raises:
        ValueError: for a negative strength; from `attach`, if a name matches nothing.

    Example:
        >>> method, model = L2StartingPoint(2.0), nn.Linear(1, 1, bias=False)
        >>> model = method.attach(model)
        >>> _ = model.weight.data.add_(3.0)
        >>> round(method.penalty(Step(model)).item(), 4)
        9.0
    """

    def __init__(self, strength: float | Hyperparameter = 0.01, names: Collection[str] | None = None) -> None:
        super().__init__()
        check_strength("L2StartingPoint", "strength", strength)
        if isinstance(names, str):
            raise ValueError(f"L2StartingPoint: names must be a list of texts, got the text {names!r}")
        self.strength = strength
        self.names = None if names is None else tuple(names)
        self._start: dict[str, Tensor] = {}
        self._found: tuple[nn.Module, list[Tensor], list[Tensor]] | None = None

    def attach(self, model: nn.Module) -> nn.Module:
        named = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
        for part in self.names or ():
            if not any(part in name for name in named):
                raise ValueError(f"L2StartingPoint: names holds {part!r}, which is in no trainable parameter's name")
        wanted = {n: p for n, p in named.items() if self.names is None or any(part in n for part in self.names)}
        self._start = {name: p.detach().clone() for name, p in wanted.items()}
        self._found = None
        return model

    def penalty(self, step: Step) -> Tensor:
        tensors, starts = self._pairs(step.model)
        strength: Any = value_of(self.strength)
        return 0.5 * strength * squared_distance(tensors, starts)

    def finish(self, model: nn.Module) -> nn.Module:
        self._start, self._found = {}, None
        return model

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        module = unwrap(model)
        # Names are slow to look up in every step, but a tuner may evaluate at tensors of its own.
        if self._found is None or self._found[0] is not module or not _same(module, self._found[1]):
            if not self._start:
                raise ValueError("L2StartingPoint: no start is known; call attach(model) before training")
            named = dict(module.named_parameters())
            if missing := [name for name in self._start if name not in named]:
                raise ValueError(f"L2StartingPoint: the model has lost {missing[0]!r}; attach it after other methods")
            tensors: list[Tensor] = [named[name] for name in self._start]
            starts = [start.to(named[name]) for name, start in self._start.items()]
            self._found = (module, tensors, starts)
        return self._found[1], self._found[2]

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs: the weights at the start."""
        return {"start": self._start}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self._start, self._found = state["start"], None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}


def _same(module: nn.Module, tensors: list[Tensor]) -> bool:
    ids = {id(t) for t in tensors}
    return ids <= {id(p) for p in module.parameters()}
