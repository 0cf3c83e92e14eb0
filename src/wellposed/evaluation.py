"""Metrics of a model on a loader, in evaluation mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batching import IGNORE_INDEX, as_batch, call_model, to_device, unwrap
from .objective import Criterion
from .step import mode

Metric = Callable[[Tensor, Tensor], Tensor | float]
"""`metric(outputs, targets)` over a whole data set."""


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a whole loader, in evaluation mode.

    Args:
        model: returns a tensor, or an object with `.logits`.
        loader: yields what `fit` takes.

    Returns:
        outputs (examples, ...) and targets (examples, ...), on the model's device.

    Example:
        >>> batch = (torch.zeros(3, 2), torch.tensor([0, 1, 0]))
        >>> outputs, targets = predict(nn.Linear(2, 2), [batch, batch])
        >>> outputs.shape, targets.shape
        (torch.Size([6, 2]), torch.Size([6]))
    """
    module = unwrap(model)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    outputs, targets = [], []
    with mode(module, False):
        for sample in loader:
            batch = as_batch(sample)
            found = call_model(module, to_device(batch.inputs, device))
            outputs.append(found if isinstance(found, Tensor) else found.logits)
            targets.append(to_device(batch.targets, device))
    if not outputs:
        raise ValueError("predict: the loader yielded no batch")
    return torch.cat(outputs), torch.cat(targets)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: Criterion,
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, float]:
    """Mean task loss and metrics on a loader; for classification `accuracy` comes by itself.

    Returns:
        `{"loss": ..., "accuracy": ...}` and whatever `metrics` add.
    """
    outputs, targets = predict(model, loader)
    with torch.no_grad():
        losses = criterion(outputs, targets)
    found = {"loss": float(losses.mean())}
    if targets.ndim < outputs.ndim and not targets.is_floating_point():
        valid = targets != IGNORE_INDEX
        found["loss"] = float(losses.sum() / valid.sum().clamp(min=1))
        found["accuracy"] = float((outputs.argmax(-1) == targets)[valid].float().mean())
    for name, metric in (metrics or {}).items():
        found[name] = float(metric(outputs, targets))
    return found
