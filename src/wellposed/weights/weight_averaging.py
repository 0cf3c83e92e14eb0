"""Exponential moving average (EMA) of the weights along training."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..averaging import WeightAverage, constant, inverse_ramp
from ..batching import unwrap
from ..hyperparameter import refuse_hyperparameter
from ..regularizer import Regularizer
from ..step import Step


class WeightAveraging(Regularizer):
    """Exponential moving average of the weights, EMA; `finish` returns the model with the averaged weights.

    Args:
        decay: share of the old average kept in a step, in [0, 1); 0 is plain training.
        warmup: begin with a plain mean (`wellposed.averaging.inverse_ramp`), so that a short run does not average
            with its start.

    Raises:
        ValueError: if decay lies outside of [0, 1).
        TypeError: for a `Hyperparameter`: no loss in training depends on the average.

    Example:
        >>> import torch
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> result = fit(nn.Linear(3, 2), data, epochs=1, regularizer=WeightAveraging(decay=0.9))
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        reason = "the loss in training does not depend on the average, so that no tuner can learn it; search it"
        refuse_hyperparameter("WeightAveraging", "decay", decay, reason)
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAveraging: decay must lie in [0, 1), got {decay!r}")
        self.decay = decay
        self.warmup = warmup
        self._average: WeightAverage | None = None
        self._pending: dict[str, Any] | None = None

    def update(self, model: nn.Module) -> None:
        """Take the current weights into the average; after each optimizer step of a plain loop."""
        self._shadow(unwrap(model)).update(model)

    def averaged(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with the averaged weights."""
        return self._shadow(unwrap(model)).module(model)

    def on_step(self, step: Step) -> None:
        self.update(step.model)

    def finish(self, model: nn.Module) -> nn.Module:
        if self._average is not None or self._pending is not None:
            self._shadow(model).copy_to(model)
        return model

    def _shadow(self, model: nn.Module) -> WeightAverage:
        # Built at the first step: what other methods attach must be averaged too. Kept out of the submodules,
        # because a state dict cannot be loaded into a shadow that does not exist yet.
        if self._average is None:
            made = WeightAverage(model, self.decay, inverse_ramp if self.warmup else constant)
            if self._pending is not None:
                made.load_state_dict(self._pending)
                self._pending = None
            object.__setattr__(self, "_average", made)
        return cast(WeightAverage, self._average)

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs beside the buffers."""
        return {"average": None if self._average is None else self._average.state_dict()}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`; the shadow is built at the next update, when the model is known."""
        object.__setattr__(self, "_average", None)
        self._pending = state["average"]
