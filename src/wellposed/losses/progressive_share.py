"""How much of a target is the network's own past prediction: a share that grows through training."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step
from .classification_head import ClassificationHead

Schedule = Literal["epoch", "step", "constant"]
"""How the share of the past prediction grows: by the epoch (the paper), by the step, or not at all (a control)."""


def scheduled(alpha: Any, schedule: Schedule, epoch: float, epochs: float, number: float = 0, total: float = 1) -> Any:
    """Share of the past prediction in the targets, `alpha * t / T` (section 3.1 of arXiv 2006.12000).

    Args:
        alpha: share at the end, a float or a tensor.
        schedule: "epoch": t is the epoch, counted from 1; "step": t is the optimizer step, counted from 1;
            "constant": `alpha` throughout.
        epoch, epochs: current epoch from 0, and their planned number.
        number, total: current optimizer step from 0, and their planned number.

    Example:
        >>> [scheduled(0.8, "epoch", epoch, 4) for epoch in range(4)]
        [0.2, 0.4, 0.6000000000000001, 0.8]
    """
    if schedule == "constant":
        return alpha
    share = (epoch + 1) / epochs if schedule == "epoch" else (number + 1) / total
    return alpha * min(1.0, share)


class ProgressiveShare(Regularizer):
    """What both forms of progressive self-distillation share: the schedule of alpha, and where class logits are.

    Args:
        num_classes: C.
        alpha: share of the past prediction at the end of training, in [0, 1]; a float or a `Hyperparameter`.
        schedule: "epoch", "step" or "constant"; see `scheduled`.
        epochs: T, for a plain loop.
        output_key, target_key: see `ClassificationHead`.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> base = ProgressiveShare(num_classes=3, alpha=0.8, epochs=4)
        >>> base.choose_share(epoch=1)
        0.4
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float | Hyperparameter = 0.8,
        schedule: Schedule = "epoch",
        epochs: int | None = None,
        output_key: str | None = None,
        target_key: str | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if num_classes < 2:
            raise ValueError(f"{owner}: num_classes must be >= 2, got {num_classes}")
        check_strength(owner, "alpha", alpha, low=0.0, high=1.0)
        if schedule not in ("epoch", "step", "constant"):
            raise ValueError(f"{owner}: schedule must be 'epoch', 'step' or 'constant', got {schedule!r}")
        if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
            raise ValueError(f"{owner}: epochs must be an integer >= 1 or None, got {epochs!r}")
        self.num_classes, self.alpha, self.epochs = num_classes, alpha, epochs
        self.schedule: Schedule = schedule
        self.head = ClassificationHead(output_key, target_key)
        self.epoch = -1
        self.share: Any = None

    def choose_share(self, epoch: int, done: float = 0.0) -> Any:
        """Set the share of a plain loop's epoch (or step), and return it; see `set_epoch`."""
        owner = type(self).__name__
        if self.epochs is None and self.schedule != "constant":
            raise ValueError(
                f"{owner}: epochs is missing: alpha grows over the planned number of epochs; pass epochs=, or "
                "schedule='constant'"
            )
        if self.epochs is not None and epoch >= self.epochs:
            warnings.warn(f"{owner}: epoch {epoch} lies beyond epochs={self.epochs}; alpha stays at its end")
        # Steps are counted in epochs here: the one that ends at epoch + done has the number epoch + done - 1.
        total = self.epochs or 1
        self.share = scheduled(value_of(self.alpha), self.schedule, epoch, total, epoch + done - 1, total)
        return self.share

    def share_at(self, step: Step) -> Any:
        """Set the share of a training loop's step, and return it."""
        self.share = scheduled(
            value_of(self.alpha), self.schedule, step.epoch, step.epochs, step.number, step.total
        )  # fmt: skip
        return self.share

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs beside the memory."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self.epoch = int(state["epoch"])
        self.share = None
