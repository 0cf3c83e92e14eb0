"""Frozen entries inside tensors that train: what a half-frozen tensor needs beside `requires_grad`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FrozenEntries:
    """Keeps chosen entries of tensors at their values, whatever the optimizer does to them.

    A gradient of zero freezes nothing: decoupled weight decay and old momentum still move the entry. So the values are
    kept, and put back after every step; gradients are masked as well, so that neither clipping nor momentum sees them.

    Args:
        parameters: tensors by name.
        masks: by name, True where an entry trains; of the parameters' shapes.

    Raises:
        ValueError: for a mask of another shape, or without its parameter.

    Example:
        >>> p = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> entries = FrozenEntries({"p": p}, {"p": torch.tensor([True, False])})
        >>> _ = p.data.add_(1.0)
        >>> entries.restore(); p.data
        tensor([2., 2.])
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(f"FrozenEntries: masks: {name!r} has shape {tuple(mask.shape)}, its parameter {shape}")
            frozen = ~mask.to(parameters[name].device)
            self._held.append((parameters[name], frozen, parameters[name].detach()[frozen].clone()))

    def __len__(self) -> int:
        return len(self._held)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the frozen entries back; after every step of the optimizer."""
        for parameter, frozen, values in self._held:
            # `.data`, so that the version counter of a leaf that a graph saved is no obstacle.
            parameter.data[frozen] = values.to(parameter.device)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the frozen entries' gradients; before clipping."""
        for parameter, frozen, _ in self._held:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0.0)
