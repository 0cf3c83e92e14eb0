"""Any `Regularizer` in `transformers.Trainer`: a mixin for trainers, and the plain trainer with it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..accumulation import Accumulation
from ..batching import Batch, unwrap
from ..objective import Criterion
from ..parameters import trainable_names
from ..regularizer import Regularizer, check_requirements
from ..step import LoopServices, Step
from .peft_models import base_model_of, check_base_weights, check_saved_by_peft
from .trainer_batches import join_batches, read_batch, shifts_labels, trim_padding, unshift_labels
from .trainer_checks import (
    TRAINER,
    check_arguments,
    check_loss,
    check_optimizer,
    check_provided,
    check_surroundings,
    is_packed,
    provided,
)
from .trainer_gradients import GradientsMixin
from .trainer_loading import LoadingMixin
from .trainer_loss import TrainerLoss, task_criterion
from .trainer_records import RecordsMixin
from .trainer_services import TrainerServices

logger = logging.getLogger(__name__)


class _Events(transformers.TrainerCallback):
    """The moments of a training run that a trainer tells to callbacks alone."""

    def __init__(self, trainer: RegularizerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._epochs_counted = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._enter_epoch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._leave_step()


class _EmptyEpoch(transformers.TrainerCallback):
    """Last among the callbacks: an epoch that a method has refused is not evaluated and saved once more."""

    def __init__(self, trainer: RegularizerMixin) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._refused_epoch:
            control.should_evaluate = control.should_save = False


class RegularizerMixin(LoadingMixin, GradientsMixin, RecordsMixin):
    """Puts any `Regularizer` into a trainer of the transformers family; comes before the trainer among the bases.

    Every hook runs where the contract says: `attach` before the optimizer is built, `on_batch` on the pool of all
    micro-batches of an optimizer step, `on_gradients` after unscaling and all-reduce and before clipping, `on_step` after
    the optimizer unless a gradient scaler skipped it. `step.closure()` evaluates all micro-batches of the step again.
    Checkpoints hold the method's state in `regularizer.pt`; `train(resume_from_checkpoint=...)` continues exactly.

    Labels of causal language models are aligned: `step.targets[:, t]` is what `step.logits[:, t]` predicts.

    Args:
        args: as the trainer takes them.
        regularizer: the method, or a `Compose` of several.
        criterion: unreduced task loss `(outputs, targets) -> (batch,) or (batch, length)`. None: cross-entropy of
            classes or tokens, squared error of regression, whatever the model was built for. "trainer": the trainer's
            own `compute_loss`, as one number; methods that replace the loss are then refused.
        finish: call `finish` at the end of `train()`, so that `trainer.model` is a plain model. False: call
            `trainer.finish()` yourself.
        extra_columns: columns of the training data that go to `step.extra` and not to the model; one called "weights"
            weighs the examples.
        align_labels: shift labels as causal language models do; None asks the model.
        kwargs: as the trainer takes them.

    Attributes:
        regularizer: the method.
        stopped: why the method ended training early, or None.

    Raises:
        ValueError: for an option that this adapter or the method cannot work with, naming it.
        RequirementError: if the method requires what this trainer does not provide (`index` under packing, ...).
    """

    regularizer: Regularizer
    stopped: str | None

    def __init__(
        self,
        *args: Any,
        regularizer: Regularizer,
        criterion: Criterion | str | None = None,
        finish: bool = True,
        extra_columns: Sequence[str] = (),
        align_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        check_arguments(name, regularizer, criterion, kwargs)
        self.regularizer = regularizer
        self.extra_columns = tuple(extra_columns)
        self.finish_model = finish
        self.stopped = None
        super().__init__(*args, **kwargs)
        trainer: Any = self
        criterion = self._chosen_criterion(criterion)
        check_loss(name, regularizer, criterion, self)
        check_surroundings(name, regularizer, self)
        check_optimizer(name, regularizer, self)
        # Whether attention can be differentiated twice may depend on a context around train(), so it is asked there.
        check_provided(name, regularizer, self, assume={"double_backward"})
        base = base_model_of(trainer.model)
        self.align_labels = shifts_labels(base) if align_labels is None else align_labels
        self._own_loss = TrainerLoss(self._compute_own_loss, self._trainer_inputs, self._is_scaled)
        own = criterion == TRAINER
        self.criterion: Criterion = self._own_loss.criterion if own else criterion or task_criterion(trainer.model)  # type: ignore[assignment]
        self._uses_own_loss = own
        self._services = TrainerServices(self)
        self._generator = torch.Generator().manual_seed(trainer.args.seed)
        self._epoch = self._epoch_begun = -1
        self._epochs_counted = 0
        self._batches: list[Any] = []
        self._accumulation: Accumulation | None = None
        self._call = 0
        self._unscaled = self._refused_epoch = self._is_finished = False
        self._attach()
        # First among the callbacks, so that those of the user see what the hooks have done.
        trainer.callback_handler.callbacks.insert(0, _Events(self))
        trainer.add_callback(_EmptyEpoch(self))

    # What comes before the run

    def _chosen_criterion(self, criterion: Criterion | str | None) -> Criterion | str | None:
        """The criterion of this kind of trainer, where none was given."""
        own = next(c for c in type(self).__mro__ if "compute_loss" in vars(c) and c is not RecordsMixin)
        if criterion is None and own is not transformers.Trainer:
            raise ValueError(
                f"{type(self).__name__}: {own.__name__} computes its own loss (compute_loss), which the default "
                "criterion would replace; pass criterion='trainer' to keep it, or an unreduced criterion"
            )
        return criterion

    def _attach(self) -> None:
        trainer: Any = self
        trainer._set_signature_columns_if_needed()  # of the model that the data were made for
        check_base_weights(self.regularizer, trainer.model)
        before = set(trainable_names(trainer.model))
        device = trainer.args.device
        model = self.regularizer.to(device).attach(trainer.model)
        check_saved_by_peft(self.regularizer, model, before)
        if trainer.place_model_on_device:
            model = model.to(device)
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model

    # The run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does; then the closing `on_epoch`, and `finish` unless it was switched off.

        Raises:
            RuntimeError: if the model was finished before.
        """
        name = type(self).__name__
        if self._is_finished:
            raise RuntimeError(f"{name}.train: the model is finished; build a new trainer, or pass finish=False")
        check_provided(name, self.regularizer, self)
        self.stopped = None
        self._epoch = self._epoch_begun = -1
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        step = self._step()
        step.epoch = step.epochs
        self.regularizer.on_epoch(step)
        if self.finish_model:
            self.finish()
        return result

    def finish(self) -> nn.Module:
        """Turn `trainer.model` into a plain model (fold, merge, average), once; returns it."""
        trainer: Any = self
        if not self._is_finished:
            self._is_finished = True
            model = self.regularizer.finish(unwrap(trainer.model))
            trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
        return trainer.model  # type: ignore[no-any-return]

    def _enter_epoch(self) -> None:
        trainer: Any = self
        # A stream has no length, so its epochs are no whole numbers and must be counted.
        reached = int((trainer.state.epoch or 0) + 1e-9)
        self._epoch = reached if self._epochs_counted == 0 else max(reached, self._epoch + 1)
        self._epochs_counted += 1

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step; none, once a method has asked to stop."""
        trainer: Any = self
        if self._epoch > self._epoch_begun:
            # Here and not in the callback: a resumed trainer restores its random numbers in between.
            self._epoch_begun = self._epoch
            self.regularizer.on_epoch(self._step())
            self._refused_epoch = self.stopped is not None
        if self.stopped is not None:
            trainer.control.should_training_stop = True
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self._batches, self._call, self._accumulation = batches, 0, None
        self._own_loss.num_items = count
        return batches, count

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Evaluate one micro-batch; after the last, `on_gradients`."""
        trainer: Any = self
        model.train()
        if callable(prepare := getattr(trainer.optimizer, "train", None)):
            prepare()  # schedule-free optimizers
        with getattr(self, "maybe_activation_offload_context", nullcontext()):
            if self._accumulation is None:
                # Only now: a resumed trainer restores its random numbers after it has fetched the batches.
                self._accumulation = self._accumulate(model)
            # A pool that became small has fewer micro-batches; they come last, where gradients are reduced.
            number = self._call - (len(self._batches) - len(self._accumulation.steps))
            self._call += 1
            loss = self._accumulation.evaluate(number) if number >= 0 else torch.zeros((), device=trainer.args.device)
            if self._call == len(self._batches):
                self._gradients_are_ready(self._accumulation)
        return loss

    def _accumulate(self, model: nn.Module) -> Accumulation:
        trainer: Any = self
        batches = [self._read(trainer._prepare_inputs(batch)) for batch in self._batches]
        if any(batch.index is None for batch in batches) and "index" in self.regularizer.requires:
            where = f"{type(self).__name__}, whose batches hold no 'index',"
            check_requirements(self.regularizer, provided(self) - {"index"}, where)
        pool = self._step()
        hooks = self.regularizer.acts_in
        joined, padded = None, False
        if "on_batch" in hooks or (hooks & {"on_gradients", "on_step"} and not is_packed(self)):
            joined, padded = join_batches(batches, self._pad_token())
            _fill(pool, joined)
        prepared = None
        if "on_batch" in hooks:
            self.regularizer.on_batch(pool)
        else:
            prepared = [_fill(dataclasses.replace(pool), batch) for batch in batches]
        accumulation = Accumulation(
            pool,
            self.regularizer,
            self.criterion,
            len(batches),
            backward=trainer.accelerator.backward,
            unscale=None if self._scaler() is None else (lambda: 1.0 / self._scaler().get_scale()),  # type: ignore[union-attr]
            synchronize=getattr(model, "no_sync", nullcontext),
            forward=self._own_loss.forward if self._uses_own_loss else None,
            prepared=prepared,
        )
        if padded and prepared is None:
            for step in accumulation.steps:
                trim_padding(step)
        if self._uses_own_loss and prepared is None:
            rewritten = [self._trainer_inputs(step) for step in accumulation.steps]
            self._own_loss.num_items = trainer._get_num_items_in_batch(rewritten, trainer.args.device)
        return accumulation

    def _gradients_are_ready(self, accumulation: Accumulation) -> None:
        trainer: Any = self
        if "on_gradients" not in self.regularizer.acts_in:
            return
        if self._scaler() is not None:
            trainer.accelerator.unscale_gradients(trainer.optimizer)
            self._unscaled = True
            if self._overflowed():
                return
        # Losses that are computed again must not enter the trainer's own statistics a second time.
        with self._services.statistics_kept():
            accumulation.on_gradients()

    def _leave_step(self) -> None:
        trainer: Any = self
        accumulation, self._accumulation, self._batches, self._unscaled = self._accumulation, None, [], False
        if accumulation is not None and not trainer.accelerator.optimizer_step_was_skipped:
            self.regularizer.on_step(accumulation.pool)

    # What a step is made of

    def _step(self) -> Step:
        trainer: Any = self
        return Step(
            trainer.model_wrapped,
            self._bare_optimizer(),
            epoch=max(0, self._epoch),
            epochs=max(1, trainer.state.num_train_epochs),
            number=trainer.state.global_step,
            total=max(1, trainer.state.max_steps),
            generator=self._generator,
            validation=self._services.validation(),
            services=LoopServices(
                log=self._services.log,
                validate=None if trainer.eval_dataset is None else self._services.validate,
                stop=self._stop,
                invalidate=self._services.invalidate,
            ),
        )

    def _stop(self, reason: str) -> None:
        trainer: Any = self
        self.stopped = reason
        trainer.control.should_training_stop = True
        logger.info("training stops: %s", reason)

    def _read(self, inputs: Any) -> Batch:
        """A batch of the collator as this library reads it."""
        trainer: Any = self
        return read_batch(inputs, trainer.label_names, self.extra_columns, self.align_labels)

    def _trainer_inputs(self, step: Step) -> dict[str, Any]:
        """Back from a step: what the trainer's own `compute_loss` takes."""
        trainer: Any = self
        targets = step.targets
        if targets is None:
            return dict(step.inputs)
        if isinstance(targets, dict):
            return {**step.inputs, **targets}
        if self.align_labels:
            if targets.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}: a method made the targets probabilities, which criterion='trainer' cannot "
                    "take; leave criterion as it is"
                )
            targets = unshift_labels(targets)
        return {**step.inputs, trainer.label_names[0]: targets}

    def _compute_own_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        trainer: Any = self
        with trainer.compute_loss_context_manager():
            return super().compute_loss(model, inputs, num_items_in_batch=num_items)  # type: ignore[misc, no-any-return]

    def _is_scaled(self, num_items: Any) -> bool:
        trainer: Any = self
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None

    def _pad_token(self) -> int:
        trainer: Any = self
        own = getattr(trainer.processing_class, "pad_token_id", None)
        config = getattr(base_model_of(trainer.model), "config", None)
        found = own if own is not None else getattr(config, "pad_token_id", None)
        return 0 if found is None else int(found)


def _fill(step: Step, batch: Batch) -> Step:
    step.inputs, step.targets, step.index = batch.inputs, batch.targets, batch.index
    step.weights, step.extra = batch.weights, dict(batch.extra)
    return step


class RegularizedTrainer(RegularizerMixin, transformers.Trainer):
    """`transformers.Trainer` under a `Regularizer`; see `RegularizerMixin` for its arguments.

    Example:
        >>> import tempfile
        >>> from wellposed.losses import EarlyLearning
        >>> config = transformers.BertConfig(
        ...     vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ... )
        >>> rows = [{"input_ids": [1, 2, 3], "labels": i % 2} for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = RegularizedTrainer(
        ...         transformers.BertForSequenceClassification(config),
        ...         transformers.TrainingArguments(folder, num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True),
        ...         train_dataset=rows,
        ...         regularizer=EarlyLearning(num_examples=8, num_classes=2),
        ...     )
        ...     result = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> result.global_step
        1
    """
