"""Dropout with one rate, fixed or tuned, on any model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..hyperparameter import Hyperparameter, check_strength
from ..numerics.dropout_masks import dropout_rows
from ..regularizer import Regularizer

_LINEAR = (nn.Linear,)
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _InputDropout:
    """A forward pre-hook; a class, so that a model which carries it can be copied and pickled."""

    def __init__(self, p: float | Hyperparameter, channels: bool) -> None:
        self.p, self.channels = p, channels

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not module.training or self.p == 0:
            return args
        x: Tensor = args[0]
        if isinstance(self.p, Hyperparameter):
            return (dropout_rows(x, self.p(), self.channels), *args[1:])
        dropped = torch.feature_dropout(x, self.p, True) if self.channels else F.dropout(x, self.p, True)
        return (dropped, *args[1:])


class _TunedDropout(nn.modules.dropout._DropoutNd):
    """A dropout layer of the model while a tuned rate stands in for its own."""

    rate: Hyperparameter
    channels: bool

    def forward(self, input: Tensor) -> Tensor:
        return dropout_rows(input, self.rate(), self.channels) if self.training else input


class Dropout(Regularizer):
    """Dropout (Srivastava et al. 2014) with the rate `p` throughout a model.

    A model that has dropout layers gets `p` in all of them. In any other, the input of every linear and
    convolutional layer but the first is dropped (whole channels before a convolution), by hooks that leave the names
    of the parameters as they are; a model of one layer drops its input. `finish` removes what `attach` added.

    Args:
        p: probability that a unit is dropped, in [0, 1); 0 is plain training. A `Hyperparameter` with
            `per_example=True` may drop each example at a rate of its own; keep its range below 0.9 or so, as
            1 / (1 - p) explodes.

    Raises:
        ValueError: if p lies outside of [0, 1), or if the model has no layer to act on; for a Hyperparameter also if the
            model has alpha dropout.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = Dropout(p=0.5).attach(model)
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(self, p: float | Hyperparameter = 0.5) -> None:
        super().__init__()
        if isinstance(p, Hyperparameter):
            check_strength("Dropout", "p", p, 0.0, 1.0)
        elif not 0 <= p < 1:
            raise ValueError(f"Dropout: p must lie in [0, 1), got {p!r}")
        self.p = p
        self._handles: list[RemovableHandle] = []
        self._rates: list[tuple[Any, float]] = []
        self._replaced: list[tuple[Any, type[nn.Module]]] = []

    def attach(self, model: nn.Module) -> nn.Module:
        present = [m for m in model.modules() if isinstance(m, _DROPOUT)]
        for layer in present:
            if isinstance(self.p, Hyperparameter):
                self._tune(layer, self.p)
            else:
                self._rates.append((layer, layer.p))
                layer.p = self.p
        if not present:
            layers = [m for m in model.modules() if isinstance(m, _LINEAR + _CONVOLUTION)]
            if not layers:
                raise ValueError("Dropout: the model has no dropout, linear or convolutional layer to act on")
            for part in layers[1:] or layers:
                hook = _InputDropout(self.p, isinstance(part, _CONVOLUTION))
                self._handles.append(part.register_forward_pre_hook(hook))
        return model

    def _tune(self, layer: Any, rate: Hyperparameter) -> None:
        if isinstance(layer, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
            raise ValueError(f"Dropout: p cannot be a Hyperparameter in a model with {type(layer).__name__}")
        self._replaced.append((layer, type(layer)))
        # Not as a child: the rate is this method's, and would stand in the model's state dict under a second name.
        layer.__dict__.update(rate=rate, channels=not isinstance(layer, nn.Dropout))
        layer.__class__ = _TunedDropout

    def finish(self, model: nn.Module) -> nn.Module:
        for tuned, kind in self._replaced:
            tuned.__class__ = kind
            del tuned.rate, tuned.channels
        for handle in self._handles:
            handle.remove()
        for layer, p in self._rates:
            layer.p = p
        self._handles, self._rates, self._replaced = [], [], []
        return model
