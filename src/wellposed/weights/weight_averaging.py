"""Exponential moving average (EMA) of the weights along training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..batching import unwrap
from ..regularizer import Regularizer
from ..step import Step


def warmed_decay(decay: float, updates: int) -> float:
    """`min(decay, 1 - 1/(updates + 1))`: a plain mean of the first weights, then the moving average.

    Example:
        >>> warmed_decay(0.99, 1), warmed_decay(0.99, 10**6)
        (0.5, 0.99)
    """
    return min(decay, 1.0 - 1.0 / (updates + 1))


class WeightAveraging(Regularizer):
    """Exponential moving average of the weights, EMA; `finish` returns the model with the averaged weights.

    Built on `torch.optim.swa_utils.AveragedModel`. Buffers (the statistics of BatchNorm) are averaged like the
    weights, so that they fit them.

    Args:
        decay: share of the old average kept in a step, in [0, 1); 0 is plain training.
        warmup: begin with a plain mean (see `warmed_decay`), so that a short run does not average with its start.

    Raises:
        ValueError: if decay lies outside of [0, 1).

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> result = fit(nn.Linear(3, 2), data, epochs=1, regularizer=WeightAveraging(decay=0.9))
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAveraging: decay must lie in [0, 1), got {decay!r}")
        self.decay = decay
        self.warmup = warmup
        self._average: AveragedModel | None = None
        self._pending: dict[str, Any] | None = None

    @property
    def averaged(self) -> nn.Module:
        """The model with the averaged weights so far."""
        if self._average is None:
            raise RuntimeError("WeightAveraging: no step was taken yet")
        return self._average.module

    def update(self, model: nn.Module) -> None:
        """Take the current weights into the average; after each optimizer step of a plain loop."""
        average = self._shadow(unwrap(model))
        updates = int(average.n_averaged)
        decay = warmed_decay(self.decay, updates) if self.warmup else self.decay
        average.multi_avg_fn = get_ema_multi_avg_fn(decay)
        average.update_parameters(unwrap(model))

    def on_step(self, step: Step) -> None:
        self.update(step.model)

    def finish(self, model: nn.Module) -> nn.Module:
        if self._average is not None:
            model.load_state_dict(self._average.module.state_dict())
        return model

    def _shadow(self, model: nn.Module) -> AveragedModel:
        if self._average is None:
            # `object.__setattr__` keeps the shadow out of this module's parameters: it is state, not to be trained.
            shadow = AveragedModel(copy.deepcopy(model), use_buffers=True)
            object.__setattr__(self, "_average", shadow.requires_grad_(False))
            assert self._average is not None
            if self._pending is not None:
                self._average.load_state_dict(self._pending)
                self._pending = None
        return self._average

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs beside the buffers."""
        return {"average": None if self._average is None else self._average.state_dict()}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`; the shadow is built at the next update, when the model is known."""
        object.__setattr__(self, "_average", None)
        self._pending = state["average"]
        if self._pending is not None:
            self._pending = {k: torch.as_tensor(v).clone() for k, v in self._pending.items()}
