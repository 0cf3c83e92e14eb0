"""What a Hugging Face trainer lends to a step: validation, logs, and statistics that a second evaluation leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..batching import Batch
from ..checkpoint import random_state, restore_random_state

_STATISTICS = ("_metrics", "_total_train_tokens")
"""Where TRL's trainers count what `compute_loss` has seen."""


class ValidationBatches:
    """The trainer's evaluation data as batches of this library; a new pass at each iteration."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders())

    def __iter__(self) -> Iterator[Batch]:
        for loader in self._loaders():
            for inputs in loader:
                yield self.trainer._read(self.trainer._prepare_inputs(inputs))

    def _loaders(self) -> list[Any]:
        names = list(self.trainer.eval_dataset) if isinstance(self.trainer.eval_dataset, dict) else [None]
        return [self.trainer.get_eval_dataloader(name) for name in names]


class TrainerServices:
    """Validation and logging of one trainer, with the state that an exact resume needs."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._logged: dict[str, list[Any]] = {}
        self._validated: tuple[int, dict[str, float]] | None = None

    def validation(self) -> ValidationBatches | None:
        """Batches of the evaluation data, or None."""
        return None if self.trainer.eval_dataset is None else ValidationBatches(self.trainer)

    def validate(self) -> dict[str, float]:
        """The trainer's own `evaluate`, once between two steps; names without "eval_"."""
        if self._validated is None or self._validated[0] != self.trainer.state.global_step:
            model = self.trainer.model
            before, training = random_state(), model.training
            self.trainer.evaluate()  # remembers its result
            model.train(training)
            restore_random_state(before)
        assert self._validated is not None
        return self._validated[1]

    def remember(self, metrics: dict[str, float]) -> None:
        """Keep the result of an evaluation for this step; of several data sets, with the mean of their losses."""
        found = {name.removeprefix("eval_"): float(value) for name, value in metrics.items() if _is_number(value)}
        losses = [value for name, value in found.items() if name.endswith("_loss")]
        if "loss" not in found and losses:
            found["loss"] = sum(losses) / len(losses)
        self._validated = (self.trainer.state.global_step, found)

    def invalidate(self) -> None:
        """Forget the last evaluation."""
        self._validated = None

    def log(self, name: str, value: Any) -> None:
        """Keep a number until the trainer writes its next log."""
        self._logged.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Mean of each logged number since the last call."""
        found = {name: sum(float(v) for v in values) / len(values) for name, values in self._logged.items()}
        self._logged = {}
        return found

    def state(self) -> dict[str, Any]:
        """What has been logged and validated, for a checkpoint."""
        logged = {name: [float(v) for v in values] for name, values in self._logged.items()}
        return {"logged": logged, "validated": self._validated}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._logged = {name: list(values) for name, values in state["logged"].items()}
        self._validated = state["validated"]

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Give the trainer's own counters back after the block."""
        before = {
            name: copy.deepcopy(getattr(self.trainer, name)) for name in _STATISTICS if hasattr(self.trainer, name)
        }
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.trainer, name, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)
