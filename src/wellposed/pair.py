"""`Pair`: two networks that train as one model, and a second network with fresh parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .batching import Paired, call_model


class Pair(nn.Module):
    """Two networks as one model: co-teaching and ELR+ return it from `attach`.

    In training mode it returns both outputs as `Paired`; in evaluation mode their average. Inputs wrapped in
    `Paired` give each network its own. One optimizer holds both; gradients are clipped per network.

    Args:
        a, b: networks with the same signature.

    Example:
        >>> pair = Pair(nn.Linear(3, 2), nn.Linear(3, 2))
        >>> x = torch.ones(4, 3)
        >>> first, second = pair(x)
        >>> torch.allclose(pair.eval()(x), (first + second) / 2)
        True
    """

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a = a
        self.b = b

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Paired):
            first, second = call_model(self.a, args[0].a), call_model(self.b, args[0].b)
        else:
            first, second = self.a(*args, **kwargs), self.b(*args, **kwargs)
        return Paired(first, second) if self.training else _average(first, second)


def _average(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return (first + second) / 2
    if hasattr(first, "logits"):
        return (first.logits + second.logits) / 2
    if isinstance(first, (tuple, list)):
        return type(first)(_average(x, y) for x, y in zip(first, second, strict=True))
    raise TypeError(f"Pair: cannot average outputs of type {type(first).__name__}; return a tensor or logits")


def reinitialized(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """A copy of `model` with the same structure and fresh parameters, drawn by each module's `reset_parameters`.

    Where a weight is parametrised (`torch.nn.utils.parametrize`), the weight itself is drawn anew, and what lies under it
    follows by the parametrisation's inverse; parameters of the parametrisation itself are copied.

    Args:
        model: the network to copy.
        generator: seeds the draw; None draws from torch's global random state.

    Raises:
        ValueError: naming a parameter whose module has no `reset_parameters` (build the second network yourself).

    Example:
        >>> first = nn.Linear(2, 2)
        >>> second = reinitialized(first, torch.Generator().manual_seed(1))
        >>> bool((first.weight != second.weight).all())
        True
    """
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        inside = ".parametrizations." in f".{name}."  # drawn with the module that is parametrised
        if own and not inside and not callable(getattr(module, "reset_parameters", None)):
            where = f"{name}.{own[0]}" if name else own[0]
            raise ValueError(
                f"reinitialized: parameter {where!r} belongs to {type(module).__name__}, which has no "
                "reset_parameters(); pass a second network instead"
            )
    seed = None if generator is None else int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng([], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for module in twin.modules():
            if parametrize.is_parametrized(module):
                _reset_parametrized(module)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return twin


@torch.no_grad()
def _reset_parametrized(module: nn.Module) -> None:
    """Draw on a plain copy: in place on a parametrised weight the draw would be lost."""
    plain = copy.deepcopy(module)
    names = list(module.parametrizations)  # type: ignore[arg-type]
    # Not remove_parametrizations: it takes the weight's property from the class, which the copy shares.
    plain.__class__ = type(module).__bases__[0]
    del plain._modules["parametrizations"]
    for name in names:
        plain.register_parameter(name, nn.Parameter(getattr(module, name).detach().clone()))
    plain.reset_parameters()  # type: ignore[operator]
    for name, value in plain.named_parameters(recurse=False):
        if name in names:
            setattr(module, name, value.detach())  # by way of the inverse
        else:
            module.get_parameter(name).copy_(value)
