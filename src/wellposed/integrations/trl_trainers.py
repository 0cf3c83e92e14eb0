"""Any `Regularizer` in TRL: supervised fine-tuning and direct preference optimization."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from ..batching import Batch
from ..objective import Criterion
from ..pair import Pair
from ..step import Step
from .peft_models import base_model_of
from .trainer_batches import INDEX
from .trainer_checks import TRAINER
from .trainer_data import has_positions
from .transformers_trainer import RegularizerMixin


def make_forward_copyable(model: nn.Module) -> None:
    """Let a deep copy of a model with TRL's fused head compute with its own weights.

    TRL puts a `forward` on the instance that remembers the original model: a copy of it (a teacher, a past model) would
    go on calling the original.
    """
    fused = vars(model).get("forward")
    if fused is None or not hasattr(fused, "__func__"):
        return
    function = fused.__func__

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            return function(self, *args, fused_lm_head=True, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


class _Prepared:
    """Numbers the examples before TRL tokenizes, filters and shuffles them: positions are those of the user's data."""

    def _attach(self) -> None:
        trainer: Any = self
        make_forward_copyable(base_model_of(trainer.model))
        super()._attach()  # type: ignore[misc]
        if isinstance(trainer.model, Pair):
            raise ValueError(
                f"{type(self).__name__}: a method made the model a Pair of two networks, and TRL's losses know one; use "
                "RegularizedTrainer"
            )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = super()._prepare_dataset  # type: ignore[misc]
        bound = inspect.signature(prepare).bind(dataset, *args, **kwargs).arguments
        if bound.get("dataset_name") == "train" and has_positions(dataset) and INDEX not in dataset.column_names:
            dataset = dataset.add_column(INDEX, list(range(len(dataset))))
        return prepare(dataset, *args, **kwargs)


class RegularizedSFTTrainer(_Prepared, RegularizerMixin, SFTTrainer):
    """`trl.SFTTrainer` under a `Regularizer`; see `RegularizerMixin` for its arguments.

    The default criterion is the cross-entropy of every token from the model's logits, which equals TRL's own loss of
    type "nll". `criterion="trainer"` keeps TRL's `compute_loss` (its fused head, its statistics, other loss types); the
    step's outputs then hold log-probabilities and no logits.
    """

    def _chosen_criterion(self, criterion: Criterion | str | None) -> Criterion | str | None:
        loss_type = self.args.loss_type  # type: ignore[attr-defined]
        if criterion is None and loss_type != "nll":
            raise ValueError(
                f"{type(self).__name__}: loss_type={loss_type!r} belongs to TRL's own loss; pass criterion='trainer' to "
                "keep it, or an unreduced criterion"
            )
        return criterion


class RegularizedDPOTrainer(_Prepared, RegularizerMixin, DPOTrainer):
    """`trl.DPOTrainer` under a `Regularizer`; see `RegularizerMixin` for its arguments.

    The task loss is TRL's own, as one number a micro-batch (`criterion="trainer"`). An example of the step is a pair:
    its inputs have shape (batch, 2, length), chosen first. Methods may add penalties, act on the batch, on gradients and
    on parameters; those that replace the loss or read logits have nothing to act on.
    """

    def _chosen_criterion(self, criterion: Criterion | str | None) -> Criterion | str | None:
        if criterion not in (None, TRAINER):
            raise ValueError(
                f"{type(self).__name__}: criterion must be 'trainer': the preference loss needs both completions and "
                f"the reference model, got {criterion!r}"
            )
        return TRAINER

    def _read(self, inputs: Any) -> Batch:
        pairs = len(inputs["input_ids"]) // 2
        batch = super()._read(inputs)
        batch.inputs = {name: _fold(value, pairs) for name, value in batch.inputs.items()}
        return batch

    def _trainer_inputs(self, step: Step) -> dict[str, Any]:
        pairs = len(step.inputs["input_ids"])
        return {name: _unfold(value, pairs) for name, value in step.inputs.items()}


def _fold(value: Any, pairs: int) -> Any:
    """(2 pairs, ...) with the chosen ones first becomes (pairs, 2, ...)."""
    if isinstance(value, Tensor) and value.ndim >= 2 and len(value) == 2 * pairs:
        return torch.stack([value[:pairs], value[pairs:]], dim=1)
    return value


def _unfold(value: Any, pairs: int) -> Any:
    """Back from `_fold`."""
    if isinstance(value, Tensor) and value.ndim >= 3 and len(value) == pairs and value.shape[1] == 2:
        return torch.cat([value[:, 0], value[:, 1]])
    return value
