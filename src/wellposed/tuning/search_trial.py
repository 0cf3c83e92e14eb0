"""`SearchTrial`: one whole training of a search, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Status = Literal["running", "finished", "pruned", "diverged"]


@dataclass
class SearchTrial:
    """One whole training of a search.

    Attributes:
        number: from 0, which is the trial of the initial values.
        values: the hyperparameters, constrained and continuous, on the CPU.
        losses: (training steps, validation loss), one for each evaluation.
        steps: training steps taken.
        status: "running", "finished", "pruned" (ended before its last step) or "diverged".

    Example:
        >>> SearchTrial(0, {}, [(10, 0.7), (20, 0.6), (30, 0.8)]).loss
        0.6
    """

    number: int
    values: dict[str, Tensor]
    losses: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    status: Status = "running"

    @property
    def loss(self) -> float:
        """The lowest validation loss; infinite for a trial that diverged or was not evaluated yet."""
        if self.status == "diverged" or not self.losses:
            return math.inf
        return min(loss for _, loss in self.losses)
