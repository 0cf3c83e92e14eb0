"""Dropout layers that a model has, each with a rate of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..hyperparameter import Hyperparameter, check_strength, number_of
from ..regularizer import Regularizer
from ..tuning import HyperDropout, HyperDropout2d

_UNITS = (nn.Dropout,)
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def dropout_layers(model: nn.Module) -> list[str]:
    """Names of the layers that drop units or channels.

    Example:
        >>> dropout_layers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
        ['1']
    """
    return [name for name, part in model.named_modules() if isinstance(part, _UNITS + _CHANNELS)]


class DropoutLayers(Regularizer):
    """Gives each dropout layer of a model a rate of its own; layers that are not named keep theirs.

    After `finish` the layers are torch's own again, with the rates that they ended with.

    Args:
        rates: layer -> rate in [0, 1), a float or a `Hyperparameter`.

    Raises:
        ValueError: for a rate out of range; from `attach`, for a name that is no dropout layer.

    Example:
        >>> model = DropoutLayers({"1": 0.3}).attach(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
        >>> model[1].p
        0.3
    """

    def __init__(self, rates: Mapping[str, float | Hyperparameter]) -> None:
        super().__init__()
        for name, rate in rates.items():
            check_strength("DropoutLayers", f"rates[{name!r}]", rate, 0.0, 1.0)
        self.rates = dict(rates)
        # A ModuleDict takes no name with a dot in it.
        self.learned = nn.ModuleList(rate for rate in rates.values() if isinstance(rate, Hyperparameter))
        self._replaced: dict[str, nn.Module] = {}

    def attach(self, model: nn.Module) -> nn.Module:
        known = dropout_layers(model)
        for name, rate in self.rates.items():
            if name not in known:
                raise ValueError(f"DropoutLayers: rates names {name!r}; the model's dropout layers are {known}")
            layer = model.get_submodule(name)
            if isinstance(rate, Hyperparameter):
                self._replaced[name] = layer
                kind = HyperDropout if isinstance(layer, _UNITS) else HyperDropout2d
                model.set_submodule(name, kind(rate).train(layer.training))
            else:
                layer.p = rate  # type: ignore[assignment]
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        for name, layer in self._replaced.items():
            layer.p = number_of(self.rates[name])  # type: ignore[assignment]
            model.set_submodule(name, layer)
        self._replaced = {}
        return model
