"""The schedule of hyperparameters that a tuner found, and training a plain network under it."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..hyperparameter import Hyperparameter
from ..regularizer import Regularizer
from ..step import Step

Values = Mapping[str, float | Sequence[Any]]


@dataclass
class Schedule:
    """Values of hyperparameters over training steps; between two records the earlier one holds.

    Attributes:
        steps: training steps done at each record, ascending from 0.
        values: one dict of constrained values by name a record; lists where a hyperparameter has a shape.
        total: training steps of the whole run.

    Example:
        >>> schedule = Schedule([0, 60], [{"p": 0.1}, {"p": 0.3}], total=100)
        >>> schedule.at(0.5), schedule.at(0.6), Schedule.from_json(schedule.to_json()) == schedule
        ({'p': 0.1}, {'p': 0.3}, True)
    """

    steps: list[int] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0

    def record(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Append the values that hold from a training step on.

        Raises:
            ValueError: if the step lies before the last record.
        """
        if self.steps and step < self.steps[-1]:
            raise ValueError(f"Schedule.record: steps must ascend, got {step} after {self.steps[-1]}")
        plain = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}
        self.steps.append(step)
        self.values.append(plain)
        self.total = max(self.total, step)

    def place(self, progress: float) -> int:
        """The number of the record that holds at a share of training in [0, 1].

        Raises:
            ValueError: for a share outside of [0, 1], or an empty schedule.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"Schedule: progress must lie in [0, 1], got {progress}")
        if not self.steps:
            raise ValueError("Schedule: nothing was recorded")
        # A step that is a hair early by rounding belongs to its own record.
        return max(0, bisect.bisect_right(self.steps, progress * self.total + 1e-9) - 1)

    def at(self, progress: float) -> dict[str, Any]:
        """The values at a share of training in [0, 1]."""
        return self.values[self.place(progress)]

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"steps": self.steps, "values": self.values, "total": self.total})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """From `to_json`.

        Raises:
            ValueError: for a text that is no schedule.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or set(found) != {"steps", "values", "total"}:
            raise ValueError("Schedule.from_json: the text must hold steps, values and total")
        if len(found["steps"]) != len(found["values"]) or found["steps"] != sorted(found["steps"]):
            raise ValueError("Schedule.from_json: steps must ascend, with one entry of values each")
        return cls(**found)


class ReplaySchedule(Regularizer):
    """Sets hyperparameters by the share of training that is done, as a recorded schedule had them.

    A plain network trains under a schedule with it: put it before the methods that read the hyperparameters.

    Args:
        schedule: the record, e.g. `SelfTuner.schedule`.
        hypers: hyperparameters by the names in the schedule; a hyperparameter may be left out and keeps its value.

    Raises:
        ValueError: for an empty schedule, or a name that it does not hold.

    Example:
        >>> from wellposed import Compose
        >>> from wellposed.losses import LabelSmoothing
        >>> smoothing = Hyperparameter(0.1, 0.0, 1.0)
        >>> replay = ReplaySchedule(Schedule([0, 5], [{"s": 0.2}, {"s": 0.4}], total=10), {"s": smoothing})
        >>> method = Compose(replay, LabelSmoothing(smoothing))
        >>> method.on_batch(Step(torch.nn.Identity(), number=6, total=10))
        >>> round(float(smoothing.value), 4)
        0.4
    """

    def __init__(self, schedule: Schedule, hypers: Mapping[str, Hyperparameter]) -> None:
        super().__init__()
        schedule.place(0.0)
        for name in hypers:
            if name not in schedule.values[0]:
                raise ValueError(f"ReplaySchedule: the schedule holds no {name!r}; it has {sorted(schedule.values[0])}")
        self.schedule = schedule
        # In a list: they belong to the methods that read them, and are saved there.
        self._hypers = list(hypers.items())

    def on_batch(self, step: Step) -> None:
        values = self.schedule.at(step.progress)
        for name, h in self._hypers:
            h.set_(torch.as_tensor(values[name]))
