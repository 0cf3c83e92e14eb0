"""Dropout with one tunable rate, on any model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..regularizer import Regularizer

_LINEAR = (nn.Linear,)
_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _InputDropout:
    """A forward pre-hook; a class, so that a model which carries it can be copied and pickled."""

    def __init__(self, p: float, channels: bool) -> None:
        self.p, self.channels = p, channels

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not module.training or self.p == 0:
            return args
        x: Tensor = args[0]
        dropped = torch.feature_dropout(x, self.p, True) if self.channels else F.dropout(x, self.p, True)
        return (dropped, *args[1:])


class Dropout(Regularizer):
    """Dropout (Srivastava et al. 2014) with the rate `p` throughout a model.

    A model that has dropout layers gets `p` in all of them. In any other, the input of every linear and
    convolutional layer but the first is dropped (whole channels before a convolution), by hooks that leave the names
    of the parameters as they are; a model of one layer drops its input. `finish` removes what `attach` added.

    Args:
        p: probability that a unit is dropped, in [0, 1); 0 is plain training.

    Raises:
        ValueError: if p lies outside of [0, 1), or if the model has no layer to act on.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = Dropout(p=0.5).attach(model)
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must lie in [0, 1), got {p!r}")
        self.p = p
        self._handles: list[RemovableHandle] = []
        self._rates: list[tuple[Any, float]] = []

    def attach(self, model: nn.Module) -> nn.Module:
        present = [m for m in model.modules() if isinstance(m, _DROPOUT)]
        for layer in present:
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

    def finish(self, model: nn.Module) -> nn.Module:
        for handle in self._handles:
            handle.remove()
        for layer, p in self._rates:
            layer.p = p
        self._handles, self._rates = [], []
        return model
