"""What a trainer evaluates, logs and saves, with a method's part in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..batching import call_model, unwrap
from ..objective import Criterion
from ..pair import Pair
from ..parameters import select_parameters, trainable_names
from ..regularizer import Regularizer
from ..step import Step
from .peft_models import is_peft
from .trainer_loss import as_outputs, mean_loss
from .trainer_services import TrainerServices
from .trainer_state import (
    FILE,
    check_probe,
    load_regularizer,
    method_names,
    parameter_probe,
    save_regularizer,
    unshared,
)


class RecordsMixin:
    """The part of `RegularizerMixin` that evaluates, logs, and writes and reads checkpoints."""

    regularizer: Regularizer
    criterion: Criterion
    _services: TrainerServices
    _generator: torch.Generator
    _epoch_begun: int

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own; of two networks that train as one, the criterion of their averaged outputs."""
        if not isinstance(unwrap(model), Pair):
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        trainer: Any = self
        batch = trainer._read(inputs)
        outputs = call_model(model, batch.inputs)
        loss = mean_loss(self.criterion, outputs, batch.targets, Step(model, targets=batch.targets).valid)
        return (loss, {"loss": loss, **as_outputs(outputs)}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As the trainer does; `step.validate()` takes the result if no step came in between."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        if eval_dataset is None and metric_key_prefix == "eval":
            self._services.remember(metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer does, with the means of what methods logged since."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._services.means())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trainer: Any = self
        if state_dict is None and "attach" in self.regularizer.acts_in and not is_peft(trainer.model):
            # transformers refuses shared tensors under names that it does not know to be tied.
            state_dict = unshared(trainer.model.state_dict())
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        trainer: Any = self
        state = {
            "methods": method_names(self.regularizer),
            "regularizer": self.regularizer.state_dict(),
            "generator": self._generator.get_state(),
            "trainable": trainable_names(trainer.model),
            "probe": parameter_probe(trainer.model),
            "epoch_begun": self._epoch_begun,
            **self._services.state(),
        }
        save_regularizer(Path(output_dir), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_regularizer(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_regularizer(self, checkpoint: str) -> None:
        trainer: Any = self
        state = load_regularizer(Path(checkpoint), method_names(self.regularizer))
        check_probe(Path(checkpoint), trainer.model, state["probe"])
        if state["trainable"] != trainable_names(trainer.model):
            select_parameters(trainer.model_wrapped, trainer._bare_optimizer(), state["trainable"])
        self.regularizer.load_state_dict(state["regularizer"])
        self._generator.set_state(state["generator"])
        self._epoch_begun = state["epoch_begun"]
        self._services.load_state(state)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        trainer: Any = self
        folder = Path(trainer.state.best_model_checkpoint)
        if (folder / FILE).exists():
            state = load_regularizer(folder, method_names(self.regularizer))
            self.regularizer.load_state_dict(state["regularizer"])
