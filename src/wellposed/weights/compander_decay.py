"""Weight decay of companded weights in a plain loop: the paper's penalty, and optimizer groups that leave it alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..batching import unwrap
from ..parameters import parameter_groups
from .compander_module import Companded, companded


def compander_penalty(model: nn.Module, weight_decay: float | Tensor, optimizer: Optimizer | None = None) -> Tensor:
    """`weight_decay / 2 * ||w||^2` over the companded weights, a scalar to add to the loss once per optimizer step.

    Where the scales are learned the paper decays v instead (arXiv 2306.16993, section III-B); so does this. The
    factor 1/2 makes it the decay that torch's SGD knows. `CompanderStep` does the same without a graph, for the
    weight decay that the optimizer holds: use one of the two.

    Args:
        model: companded.
        weight_decay: coefficient.
        optimizer: if given, it is made sure that it does not decay these weights a second time.

    Raises:
        ValueError: if nothing is companded, or if the optimizer decays a companded tensor.

    Example:
        >>> from wellposed.weights import apply_compander
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> names = apply_compander(model)
        >>> bool(compander_penalty(model, 2.0) == model[0].weight.square().sum())
        True
    """
    found = require_companded(model, "compander_penalty")
    if optimizer is not None:
        own = {id(one.v): one.name for one in found}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if group.get("weight_decay") and id(parameter) in own:
                    raise ValueError(decays_twice(own[id(parameter)], group["weight_decay"]))
    squares = [(one.w if one.compander.decays_weight else one.v).square().sum() for one in found]
    return torch.stack([square.to(squares[0]) for square in squares]).sum() * (0.5 * weight_decay)


def compander_parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, *, penalty: bool = False
) -> list[dict[str, Any]]:
    """Optimizer groups of a companded model: decay for weights, none for biases, norms and the scales a and b.

    Args:
        model: companded.
        weight_decay: of matrices and convolutions, companded or not.
        penalty: the companded weights decay by `compander_penalty` in the loss, so not here (v of learned scales
            does). Without it `CompanderStep` carries the decay of v over to w.

    Example:
        >>> from wellposed.weights import apply_compander
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> names = apply_compander(model)
        >>> [(group["names"], group["weight_decay"]) for group in compander_parameter_groups(model, 5e-4)]
        [(['0.bias'], 0.0), (['0.parametrizations.weight.original'], 0.0005)]
    """
    found = {one.v_name: one for one in require_companded(model, "compander_parameter_groups")}
    wishes = []
    for name, parameter in unwrap(model).named_parameters():
        decays = parameter.ndim >= 2 and not (penalty and name in found and found[name].compander.decays_weight)
        wishes.append({"names": [name], "weight_decay": weight_decay if decays else 0.0})
    return parameter_groups(model, wishes)


def require_companded(model: nn.Module, owner: str) -> list[Companded]:
    """The companded tensors.

    Raises:
        ValueError: without any, naming the owner.
    """
    found = companded(model)
    if not found:
        raise ValueError(f"{owner}: the model has no companded weight; call apply_compander first")
    return found


def decays_twice(name: str, decay: Any) -> str:
    """What to say of a tensor that a penalty and the optimizer both decay."""
    return (
        f"compander_penalty: {name!r} decays twice, by the penalty on w and by weight_decay = {decay} of the optimizer; "
        "give its group weight_decay=0 (compander_parameter_groups(model, weight_decay, penalty=True)), or leave the "
        "penalty out"
    )
