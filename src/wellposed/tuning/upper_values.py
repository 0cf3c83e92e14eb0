"""Parameters of a module as upper-level variables: a representation that is learned so that a head on it does well."""

from __future__ import annotations

import math

from torch import nn

from ..hyperparameter import Hyperparameter


def upper_parameters(module: nn.Module) -> dict[str, Hyperparameter]:
    """Every trainable parameter of `module` as a `Hyperparameter` with the identity chart, by its name.

    Their values share memory with the module's parameters: what a tuner learns is in the module at once. Evaluate the
    module with the values that the losses are handed (`torch.func.functional_call`), and leave its parameters out of
    the problem's `params`.

    Raises:
        ValueError: if the module has no trainable parameter.

    Example:
        >>> import torch
        >>> from torch.func import functional_call
        >>> encoder = nn.Linear(2, 3)
        >>> hypers = upper_parameters(encoder)
        >>> list(hypers), hypers["weight"].raw.data_ptr() == encoder.weight.data_ptr()
        (['weight', 'bias'], True)
        >>> functional_call(encoder, {name: h() for name, h in hypers.items()}, torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """
    found: dict[str, Hyperparameter] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            h = Hyperparameter(0.0, -math.inf, math.inf, "identity", name=name)
            h.raw = parameter.detach()
            found[name] = h
    if not found:
        raise ValueError("upper_parameters: the module has no parameter that trains")
    return found
