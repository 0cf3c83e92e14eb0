"""Fold a weight compander away, and carry checkpoints of the plain network in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..batching import unwrap
from .compander_module import companded


def fold_compander(model: nn.Module) -> nn.Module:
    """Store every companded weight as a plain parameter again, in place; inference then costs nothing.

    The parameters keep their identity, shared ones stay shared, and the model's `state_dict` is a plain one.

    Example:
        >>> from wellposed.weights import apply_compander
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> names = apply_compander(model)
        >>> list(fold_compander(model).state_dict())
        ['0.weight', '0.bias']
    """
    done: set[int] = set()
    for one in companded(model, ties=True):
        shared = one.parametrizations.original if one.parametrizations.is_tensor else None
        # The first layer writes the weight into the shared parameter; the others then find it there.
        remove_parametrization(one.module, one.tensor, keep_value=id(shared) not in done)
        if shared is not None:
            done.add(id(shared))
            shared.grad = None  # it was the gradient of v
    return model


def remove_parametrization(module: nn.Module, tensor: str, keep_value: bool = True) -> None:
    """`torch.nn.utils.parametrize.remove_parametrizations` for modules that may be copies, with the order restored.

    Args:
        module: has a parametrized tensor.
        tensor: its name.
        keep_value: keep what the parametrization makes, else what it is made from.
    """
    # A deep copy shares its class with the original, and the removal deletes the tensor's property from the class:
    # the original would lose its weight.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=keep_value)
    # Back to its place before the bias: state dicts and optimizers go by this order.
    own = module._parameters
    own.update({name: own.pop(name) for name in list(own) if name != tensor})


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `fold_compander` would leave, without folding: for checkpoints that others read.

    Example:
        >>> from wellposed.weights import apply_compander
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> names = apply_compander(model)
        >>> sorted(plain_state_dict(model))
        ['0.bias', '0.weight']
    """
    state = dict(unwrap(model).state_dict())
    for one in companded(model, ties=True):
        state = {key: value for key, value in state.items() if not key.startswith(one.prefix)}
        state[one.name] = one.w.detach()
    return state


def load_plain_state_dict(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a checkpoint of the plain network into a companded one: its weights pass through the inverse.

    Args:
        model: companded; its scales stay.
        state: as the plain network's `state_dict` made it.
        strict: as in `load_state_dict`.

    Returns:
        What `load_state_dict` returns.

    Raises:
        ValueError: if a weight lies outside of the range, naming the layer; nothing is loaded then.

    Example:
        >>> from wellposed.weights import apply_compander
        >>> plain, model = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> names = apply_compander(model)
        >>> load_plain_state_dict(model, plain.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(model[0].weight, plain[0].weight)
        True
    """
    network = unwrap(model)
    converted, own = dict(state), network.state_dict()
    for one in companded(network, ties=True):
        if one.name not in converted:
            continue
        if not one.direct or len(one.parametrizations) > 1:
            raise ValueError(f"load_plain_state_dict: {one.name!r} has other parametrizations beside its compander")
        w = converted.pop(one.name)
        if problem := one.compander.refusal(w):
            raise ValueError(f"load_plain_state_dict: {one.name!r}: {problem}")
        converted |= {key: value for key, value in own.items() if key.startswith(one.prefix)}
        converted[one.v_name] = one.compander.right_inverse(w.to(one.v))
    return network.load_state_dict(converted, strict=strict)
