"""What `SelfTuner` asks of its arguments, of the method and of the network before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..bilevel import BilevelProblem
from ..hyperparameter import Hyperparameter
from ..loading import distributed
from ..regularizer import Regularizer, leaves
from .response_input import ResponseState


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise unless the numbers among the arguments are in range.

    Args:
        arguments: by name.

    Raises:
        ValueError: naming argument and value.

    Example:
        >>> check_arguments({"train_steps": 0})
        Traceback (most recent call last):
        ValueError: SelfTuner: train_steps must be an integer >= 1, got 0
    """
    for name, least in (("train_steps", 1), ("valid_steps", 1), ("warmup_steps", 0)):
        value = arguments[name]
        if not isinstance(value, int) or value < least:
            raise ValueError(f"SelfTuner: {name} must be an integer >= {least}, got {value!r}")
    if not 0 <= arguments["tau"] < math.inf:
        raise ValueError(f"SelfTuner: tau must be >= 0 and finite, got {arguments['tau']!r}")
    if arguments["clip_norm"] is not None and not arguments["clip_norm"] > 0:
        raise ValueError(f"SelfTuner: clip_norm must be > 0, got {arguments['clip_norm']!r}")
    if arguments["amp"] not in (None, torch.bfloat16):
        raise ValueError(f"SelfTuner: amp must be None or torch.bfloat16, got {arguments['amp']!r}")


def acts_on_gradients(problem: BilevelProblem) -> bool:
    """Whether the problem's method acts in `on_gradients`.

    Raises:
        ValueError: if it does, and several processes train.
    """
    methods = [] if problem.regularizer is None else leaves([problem.regularizer])
    hooked = [type(m).__name__ for m in methods if type(m).on_gradients is not Regularizer.on_gradients]
    if hooked and distributed():
        raise ValueError(
            f"SelfTuner: data parallelism is not supported for {hooked[0]}, which acts in 'on_gradients': what it "
            "evaluates there is one process's share of the batch; train in one process"
        )
    return bool(hooked)


def has_statistics(model: nn.Module) -> bool:
    """Whether a network has buffers beside those of its response and of its hyperparameters: running statistics.

    Example:
        >>> has_statistics(nn.BatchNorm1d(2)), has_statistics(ResponseState(2))
        (True, False)
    """
    own = {id(b) for m in model.modules() if isinstance(m, (ResponseState, Hyperparameter)) for b in m.buffers()}
    return any(id(b) not in own for b in model.buffers())
