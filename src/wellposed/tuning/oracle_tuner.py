"""What tuners that ask a bilevel problem's oracles have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..bilevel import BilevelProblem
from ..tuner import StepInfo, Tuner
from .bilevel_updates import Schedule, schedule_factor, schedule_position
from .oracles import Oracles, check_disjoint

_RECORDED = 16
"""Hyperparameters of more numbers (sample weights, encoders) are not copied into the history at every step."""


class OracleTuner(Tuner):
    """A tuner of stochastic problems: its parameters as a list, and oracles in the order of that list.

    Args:
        problem: both losses; inner must have a derivative in the hyperparameters.
        accumulate: batches over which every oracle is averaged.

    Attributes:
        oracles: what it asks of the problem.
        params: the lower level, moved in place.

    Raises:
        ValueError: for a problem that does not meet the requirements, or parameters that are hyperparameters as well.
    """

    requires = frozenset({"double_backward", "inner_derivative"})

    def __init__(self, problem: BilevelProblem, accumulate: int = 1) -> None:
        super().__init__(problem)
        check_disjoint(problem, type(self).__name__)
        self.oracles = Oracles(problem, accumulate)
        self.params = list(problem.params.values())

    def small_values(self) -> dict[str, float | Tensor]:
        """Constrained values for a history; those of more than a few numbers are left out."""
        small = {n: h().detach() for n, h in self.problem.hypers.items() if h.raw.numel() <= _RECORDED}
        return {n: float(v) if v.ndim == 0 else v.cpu() for n, v in small.items()}


class ScheduledTuner(OracleTuner):
    """One whose upper step size follows a schedule over its steps.

    Args:
        problem, accumulate: see `OracleTuner`.
        outer_lr: step size before the schedule's factor; a tensor for several independent problems.
        schedule: None, "cosine" to 0, or a function from the step's number to a factor.
        total_steps: length of the cosine; `run` and `fit` know it.

    Attributes:
        number: steps taken.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        outer_lr: float | Tensor,
        schedule: Schedule,
        total_steps: int | None,
        accumulate: int = 1,
    ) -> None:
        super().__init__(problem, accumulate)
        self.outer_lr, self.schedule, self.total_steps = outer_lr, schedule, total_steps
        self.number = 0

    def scheduled_lr(self) -> float | Tensor:
        """The upper step size of the present step.

        Raises:
            ValueError: for a cosine of unknown length.
        """
        position = schedule_position(self.problem, self.schedule, self.number, self.total_steps)
        return self.outer_lr * schedule_factor(self.schedule, *position)

    def run(self, train: Iterable[Any], validation: Iterable[Any], steps: int) -> list[StepInfo]:
        if self.schedule == "cosine" and self.total_steps is None:
            self.total_steps = self.number + steps
        return super().run(train, validation, steps)
