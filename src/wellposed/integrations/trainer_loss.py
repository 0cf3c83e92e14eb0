"""The task loss inside a Hugging Face trainer: unreduced from the logits, or the trainer's own as one number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..batching import unwrap
from ..objective import Criterion, cross_entropy, squared_error
from ..step import Step
from .peft_models import base_model_of


def task_criterion(model: nn.Module) -> Criterion:
    """The unreduced loss of what a transformers model was built for: classes or tokens, numbers, or several labels.

    Example:
        >>> task_criterion(nn.Linear(2, 2)) is cross_entropy
        True
    """
    config = getattr(base_model_of(model), "config", None)
    problem = getattr(config, "problem_type", None)
    classifies = type(base_model_of(model)).__name__.endswith("ForSequenceClassification")
    one_number = classifies and getattr(config, "num_labels", None) == 1
    if problem == "regression" or (problem is None and one_number):
        return lambda outputs, targets: squared_error(outputs.logits, targets)
    if problem == "multi_label_classification":
        return _several_labels
    return cross_entropy


def _several_labels(outputs: Any, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.logits.float(), targets.float(), reduction="none").mean(-1)


class TrainerLoss:
    """A trainer's own `compute_loss`, driven micro-batch by micro-batch: `forward` keeps the loss, `criterion` returns it.

    Args:
        compute: `(model, inputs, num_items) -> loss`, a scalar.
        inputs_of: a step's inputs in the trainer's own form, labels included.
        scaled: whether that scalar is normalised over the whole accumulated batch already; else it is the mean of
            its micro-batch.

    Attributes:
        num_items: what the trainer counted in the whole batch; set before each optimizer step.
    """

    def __init__(
        self,
        compute: Callable[[nn.Module, dict[str, Any], Any], Tensor],
        inputs_of: Callable[[Step], dict[str, Any]],
        scaled: Callable[[Any], bool],
    ) -> None:
        self.compute, self.inputs_of, self.scaled = compute, inputs_of, scaled
        self.num_items: Any = None
        self._loss: Tensor | None = None

    def forward(self, step: Step) -> Any:
        """Compute the loss, and return what the model gave out on its first call.

        Raises:
            ValueError: if a method weighs the examples, which a loss of one number cannot follow.
        """
        if step.weights is not None:
            raise ValueError(
                "criterion='trainer' is one number for a whole micro-batch, so it cannot be weighted by example; leave "
                "criterion as it is, or pass an unreduced one"
            )
        with _first_outputs(unwrap(step.model)) as found:
            loss = self.compute(step.model, self.inputs_of(step), self.num_items)
        # The objective divides scalars by the number of micro-batches.
        self._loss = loss * step.micro_batches if self.scaled(self.num_items) else loss
        return found.get("outputs", loss)

    def criterion(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of the last `forward`."""
        assert self._loss is not None
        loss, self._loss = self._loss, None
        return loss


@contextmanager
def _first_outputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What `model` returns when it is first called inside the block (preference losses call it again as reference)."""
    found: dict[str, Any] = {}

    def keep(module: nn.Module, arguments: Any, outputs: Any) -> None:
        found.setdefault("outputs", outputs)

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def mean_loss(criterion: Criterion, outputs: Any, targets: Any, valid: Tensor | None) -> Tensor:
    """The mean of an unreduced loss, over valid tokens where there are tokens."""
    losses = criterion(outputs, targets)
    if valid is None or losses.ndim < 2:
        return losses.mean()
    return losses[valid].sum() / valid.sum().clamp(min=1)


def as_outputs(outputs: Any) -> Mapping[str, Any]:
    """Outputs by name, as a trainer's evaluation reads them."""
    return {"logits": outputs} if isinstance(outputs, Tensor) else outputs
