"""Batch normalisation that stays as it is while the rest of a network is fine-tuned."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


class _Evaluate:
    """A forward pre-hook that keeps a layer in evaluation mode, whoever calls `train()` on the model around it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        module.training = False


class FrozenBatchNorm:
    """Freeze all BatchNorm layers of a model: running statistics are used and kept, scale and shift do not train.

    Small batches that were selected by their loss would drag the statistics away from those of the data.

    Args:
        model: changed in place; call it before the optimizer is built, so that frozen parameters stay out of it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> frozen = FrozenBatchNorm(model)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.weight', '0.bias']
        >>> frozen.remove()
    """

    def __init__(self, model: nn.Module) -> None:
        self._handles: list[RemovableHandle] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._layers = [part for part in model.modules() if isinstance(part, _BatchNorm)]
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(_Evaluate()))
            layer.training = False
            for parameter in layer.parameters(recurse=False):
                self._flags.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(False)

    def remove(self) -> None:
        """Let the layers train again, as far as they did before; they are in evaluation mode until `model.train()`."""
        for handle in self._handles:
            handle.remove()
        for parameter, was in self._flags:
            parameter.requires_grad_(was)
        self._handles, self._flags = [], []
