"""A trainer's gradient scaler and clipping around hooks that need gradients unscaled, and not yet clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..batching import unwrap
from ..pair import Pair
from ..parameters import clip_gradients


class GradientsMixin:
    """The part of `RegularizerMixin` between the last backward pass and the optimizer's step."""

    _unscaled: bool

    def _scaler(self) -> torch.amp.GradScaler | None:
        trainer: Any = self
        scaler = trainer.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _bare_optimizer(self) -> Any:
        """The optimizer without the accelerator's wrapper: methods look at its class and register hooks."""
        optimizer = self.optimizer  # type: ignore[attr-defined]
        return getattr(optimizer, "optimizer", optimizer)

    def _overflowed(self) -> bool:
        state = self._scaler()._per_optimizer_states[id(self._bare_optimizer())]  # type: ignore[union-attr]
        found = state["found_inf_per_device"]
        return any(bool(value) for value in found.values())

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        trainer: Any = self
        if not self._unscaled and not isinstance(unwrap(model), Pair):
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        if not self._unscaled:
            trainer.accelerator.unscale_gradients(trainer.optimizer)
            self._unscaled = True
        # Not by the accelerator: it would unscale a second time, which a gradient scaler refuses.
        return clip_gradients(model, trainer.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._unscaled:
            return clip_gradients(model, float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
