"""Early stopping: keep the weights that did best on validation data."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from ..batching import unwrap
from ..hyperparameter import refuse_hyperparameter
from ..regularizer import Regularizer
from ..step import Step


class EarlyStopping(Regularizer):
    """Early stopping: after each epoch the model is judged on validation data, and `finish` restores the best.

    Args:
        patience: stop after this many epochs without improvement; None trains to the end and still restores the best.
        metric: name of a validation metric, as the loop computes it.
        goal: "min" or "max".

    Raises:
        TypeError: for a `Hyperparameter`, which no tuner could learn.
        ValueError: if patience < 1, or if the metric is not among those of the loop.

    Attributes:
        best_epoch: epochs that the restored model trained for, or None before the first judgement.
        best_value: its validation metric.

    Example:
        >>> import torch
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> stopping = EarlyStopping(patience=1)
        >>> result = fit(nn.Linear(3, 2), data, validation=data, epochs=2, regularizer=stopping)
        >>> stopping.best_epoch in (1, 2)
        True
    """

    requires = frozenset({"validation"})

    def __init__(self, patience: int | None = None, metric: str = "loss", goal: Literal["min", "max"] = "min") -> None:
        super().__init__()
        reason = "it ends training, which no loss in training depends on; search it"
        refuse_hyperparameter("EarlyStopping", "patience", patience, reason)
        if patience is not None and patience < 1:
            raise ValueError(f"EarlyStopping: patience must be >= 1 or None, got {patience!r}")
        if goal not in ("min", "max"):
            raise ValueError(f"EarlyStopping: goal must be 'min' or 'max', got {goal!r}")
        self.patience = patience
        self.metric = metric
        self.goal = goal
        self.best_epoch: int | None = None
        self.best_value: float | None = None
        self._best_state: dict[str, Tensor] | None = None
        self._judged = 0

    def on_epoch(self, step: Step) -> None:
        done = step.number // max(1, step.total // step.epochs)
        if done == 0 or done == self._judged:
            return  # untrained, or called again for the same epoch
        self._judged = done
        found = step.validate()
        if self.metric not in found:
            raise ValueError(f"EarlyStopping: metric must be one of {sorted(found)}, got {self.metric!r}")
        value = found[self.metric]
        better = self.best_value is None or (value < self.best_value if self.goal == "min" else value > self.best_value)
        if better:
            self.best_epoch, self.best_value = done, value
            self._best_state = {k: v.detach().clone() for k, v in unwrap(step.model).state_dict().items()}
        elif self.patience is not None and self.best_epoch is not None and not step.finished:
            if done - self.best_epoch >= self.patience:
                step.stop(
                    f"no better validation {self.metric} in {self.patience} epochs; best after epoch {self.best_epoch}"
                )

    def finish(self, model: nn.Module) -> nn.Module:
        if self._best_state is not None:
            model.load_state_dict(self._best_state)
        return model

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs beside the buffers."""
        return {
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "best_state": self._best_state,
            "judged": self._judged,
        }

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self.best_epoch, self.best_value = state["best_epoch"], state["best_value"]
        self._best_state, self._judged = state["best_state"], state["judged"]
