"""Where a trainer's data and optimizer come from, with positions, extra columns and a method's wishes carried out."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..batching import unwrap
from ..regularizer import Regularizer
from .trainer_batches import INDEX
from .trainer_checks import is_packed
from .trainer_data import CarryingCollator, has_positions, with_positions
from .trainer_optimizer import regroup


class LoadingMixin:
    """The part of `RegularizerMixin` that a trainer asks for batches and for its optimizer."""

    regularizer: Regularizer
    extra_columns: tuple[str, ...]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        trainer: Any = self
        trainer._signature_columns += [c for c in self._carried if c not in trainer._signature_columns]

    @property
    def _carried(self) -> tuple[str, ...]:
        return (INDEX, *self.extra_columns)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        training = kwargs.get("is_training", False)
        if training and not is_packed(self):
            sampler = kwargs.get("sampler_fn")
            if sampler is not None:
                kwargs["sampler_fn"] = lambda _, whole=dataset: sampler(whole)
            if has_positions(dataset) and hasattr(
                dataset, "remove_columns"
            ):  # a `datasets.Dataset`, which is no longer one once it is wrapped
                dataset = trainer._remove_unused_columns(dataset, description=description)
            dataset = with_positions(dataset)
        collator = trainer.data_collator
        trainer.data_collator = CarryingCollator(collator, self._carried, keep=training)
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)  # type: ignore[misc]
        finally:
            trainer.data_collator = collator

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The trainer's optimizer, with the method's wishes about groups carried out."""
        trainer: Any = self
        existed = trainer.optimizer is not None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)  # type: ignore[misc]
        if not existed:
            module = unwrap(trainer.model)
            wishes = self.regularizer.parameter_groups(module)
            regroup(optimizer, module, wishes, trainer.get_decay_parameter_names(module))
        return optimizer
