"""Several surrogates of one function as one model: they train side by side, and predict by their mean or minimum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batching import Paired, call_model, unwrap
from ..pair import Pair
from .output_gradient import mean_output


class SurrogateEnsemble(nn.Module):
    """Surrogates that share data and optimizer, but no parameter.

    While training it returns all predictions, (batch, members), for `ensemble_squared_error`; in evaluation mode their
    mean, or the smallest, (batch,). `SurrogateSharpness` gives each member a multiplier of its own.

    Args:
        members: networks that return (batch,), (batch, 1), or a tuple that begins with it.
        reduce: "mean", or "min" (the pessimistic one).

    Raises:
        ValueError: for no members, or another `reduce`.

    Example:
        >>> ensemble = SurrogateEnsemble([nn.Linear(3, 1) for _ in range(4)])
        >>> ensemble(torch.zeros(5, 3)).shape, ensemble.eval()(torch.zeros(5, 3)).shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    def __init__(self, members: Iterable[nn.Module], reduce: Literal["mean", "min"] = "mean") -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("SurrogateEnsemble: members is empty; give at least one network")
        if reduce not in ("mean", "min"):
            raise ValueError(f"SurrogateEnsemble: reduce must be 'mean' or 'min', got {reduce!r}")
        self.reduce = reduce

    def forward(self, inputs: Any) -> Tensor:
        predictions = torch.stack([mean_output(call_model(member, inputs)) for member in self.members], 1)
        if self.training:
            return predictions
        return predictions.mean(1) if self.reduce == "mean" else predictions.amin(1)


def ensemble_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of every member, summed over them: each member's gradient is that of training it alone.

    Args:
        outputs: (batch, members).
        targets: (batch,) or (batch, 1).

    Returns:
        (batch,).

    Example:
        >>> ensemble_squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0]))
        tensor([2.])
    """
    return (outputs - targets.reshape(-1, 1).to(outputs.dtype)).square().sum(1)


def networks_of(model: nn.Module, inputs: Any) -> list[tuple[nn.Module, Any]]:
    """The independent networks inside a model, each with its inputs: those of a `Pair` or an ensemble, or the model.

    Example:
        >>> [type(network).__name__ for network, _ in networks_of(Pair(nn.Linear(1, 1), nn.Linear(1, 1)), None)]
        ['Linear', 'Linear']
    """
    module = unwrap(model)
    if isinstance(module, Pair):
        first, second = inputs if isinstance(inputs, Paired) else (inputs, inputs)
        return [(module.a, first), (module.b, second)]
    if isinstance(module, SurrogateEnsemble):
        return [(member, inputs) for member in module.members]
    return [(module, inputs)]
