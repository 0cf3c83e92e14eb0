"""Layers on the input of a module that leave all names as they are, and folding a prefix into the weights behind it."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

CHILD = "compression"
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class InputLayer:
    """A forward pre-hook that applies a module's own child to its input.

    A class, so that a model which carries it can be copied and pickled; and it looks the child up in the module that it
    runs for, so that a copy applies its own.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (module.get_submodule(CHILD)(args[0]), *args[1:])


def insert(module: nn.Module, layer: nn.Module) -> nn.Module | None:
    """Apply `layer` to the first input of `module` from now on; returns the layer that it replaces, or None.

    The layer becomes a child of the module, and is saved with it: `fc.weight` keeps its name, `fc.compression` is new.

    Example:
        >>> head = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(head.weight)
        >>> _ = insert(head, nn.ReLU())
        >>> head(torch.tensor([[-3.0, 1.0]])).item(), [name for name, _ in head.named_parameters()]
        (1.0, ['weight'])
    """
    earlier = remove(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    module.add_module(CHILD, layer.to(device))
    module.register_forward_pre_hook(InputLayer())
    return earlier


def inserted(module: nn.Module) -> nn.Module | None:
    """The layer on the module's input, or None."""
    return module._modules.get(CHILD) if _hooks(module) else None


def remove(module: nn.Module) -> nn.Module | None:
    """Undo `insert`; returns the layer, or None if there was none."""
    hooks = _hooks(module)
    for key in hooks:
        del module._forward_pre_hooks[key]
    return module._modules.pop(CHILD, None) if hooks else None


def last_linear(model: nn.Module) -> str:
    """Name of the last `nn.Linear` of a model, in the order of its modules.

    Raises:
        ValueError: if it has none.

    Example:
        >>> last_linear(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        '2'
    """
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError("the model has no linear layer to compress the input of; name a module with before=")
    return found[-1]


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a model by its name.

    Raises:
        ValueError: with the nearest name.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"before must name a module of the model, got {name!r}{hint}")
    return modules[name]


def can_fold(module: nn.Module, model: nn.Module) -> bool:
    """Whether `fold` leaves everything else as it was: a weight that is a plain parameter and belongs to this module alone.

    Tied weights (an embedding) serve others too, a parametrised weight is no parameter, and the columns of a grouped
    convolution are not its channels.
    """
    weight = module._parameters.get("weight")
    plain = isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTION) and module.groups == 1)
    owners = sum(weight is p for part in model.modules() for p in part._parameters.values())
    return plain and weight is not None and owners == 1


@torch.no_grad()
def fold(module: nn.Module, k: int) -> None:
    """Zero the weights behind the first k inputs: the module then computes, from all, what it did from those k."""
    weight: Tensor = module.get_parameter("weight")
    weight[:, k:] = 0


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, InputLayer)]
