"""The past model as teacher: PS-KD without a memory of predictions, for mixed inputs, detectors and many classes."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..batching import unwrap
from ..hyperparameter import Hyperparameter
from ..step import Step
from .progressive_share import ProgressiveShare, Schedule
from .soft_targets import progressive_targets


class PastModelTeacher(ProgressiveShare):
    """Progressive self-distillation (PS-KD) with the model of one epoch ago as teacher (arXiv 2006.12000, section 3).

    The targets are `(1 - alpha_t) * label + alpha_t * p`, as in `ProgressiveSelfDistillation`, but p is what the weights
    of the end of the last epoch predict for the CURRENT input: mixed, cropped, or never seen before. It costs one forward
    pass without gradient a step, and one copy of the weights, instead of a row for each example; no index is needed.
    Put it behind whatever mixes inputs (`Compose(Mixup(...), PastModelTeacher(...))`). In the first epoch targets are
    the labels.

    For sequences and the class branch of detectors targets are (batch, length) or (batch, boxes), -100 where there is none,
    and logits have one more dimension. Where a detector returns a dict, `output_key` names the logits, and `target_key`
    the class targets: nothing else is softened.

    Not under FSDP, whose weights are spread over the ranks.

    Args:
        num_classes: C.
        alpha: share of the past prediction at the end of training, in [0, 1]; a float or a `Hyperparameter`.
        schedule: "epoch" (the paper), "step", or "constant".
        epochs: T, for a plain loop; `fit` and adapters tell it through the step.
        mode: how the teacher predicts: "eval", or "train", with dropout and with the batch's own statistics, as the
            stored predictions of `ProgressiveSelfDistillation` were made.
        output_key, target_key: of the class logits and targets, where a model returns, or a loader yields, a dict.

    Raises:
        ValueError: for an argument out of range; in use, for logits or targets that do not fit.
        RuntimeError: under FSDP.

    Example:
        >>> model, inputs, targets = nn.Linear(3, 2), torch.ones(1, 3), torch.tensor([0])
        >>> teacher = PastModelTeacher(num_classes=2, alpha=0.5, epochs=2)
        >>> teacher.set_epoch(0, model)
        >>> teacher.soften(model, inputs, targets)
        tensor([[1., 0.]])
        >>> teacher.set_epoch(1, model)
        >>> expected = 0.5 * torch.tensor([[1.0, 0.0]]) + 0.5 * model(inputs).softmax(1)
        >>> torch.allclose(teacher.soften(model, inputs, targets), expected)
        True
    """

    def __init__(
        self,
        num_classes: int,
        alpha: float | Hyperparameter = 0.8,
        *,
        schedule: Schedule = "epoch",
        epochs: int | None = None,
        mode: Literal["eval", "train"] = "eval",
        output_key: str | None = None,
        target_key: str | None = None,
    ) -> None:
        super().__init__(num_classes, alpha, schedule, epochs, output_key, target_key)
        if mode not in ("eval", "train"):
            raise ValueError(f"PastModelTeacher: mode must be 'eval' or 'train', got {mode!r}")
        self.mode = mode
        self.past: dict[str, Tensor] | None = None

    def set_epoch(self, epoch: int, model: nn.Module, done: float = 0.0) -> None:
        """For a plain loop: before each epoch, or before each step under `schedule="step"`.

        Args:
            epoch: from 0. At or beyond `epochs` alpha stays at its end, with a warning.
            model: the network that trains; its weights are copied where a new epoch begins.
            done: for `schedule="step"`, the share of this epoch's steps that are done once the coming one is.
        """
        self._enter(epoch, model)
        self.choose_share(epoch, done)

    def soften(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """The soft targets of a batch at the current share; for a loss of your own.

        Args:
            model: the network that trains: its present weights stand in for what was frozen when they were copied.
            inputs: as the model takes them: a tensor, a tuple, or a dict.
            targets: integer classes (-100: none), or probabilities.
        """
        return self._soften(Step(model, inputs=inputs), targets)

    def on_epoch(self, step: Step) -> None:
        if not step.finished:
            self._enter(step.epoch, step.model)

    def on_batch(self, step: Step) -> None:
        self.share_at(step)
        targets = self.head.targets(step.targets)
        if targets.ndim == 2 and not targets.is_floating_point() and self.head.target_key is None:
            step.extra["valid"] = step.valid  # probabilities no longer say which tokens count
        step.targets = self.head.replaced(step.targets, self._soften(step, targets))

    def get_extra_state(self) -> dict[str, Any]:
        """The epoch and the past weights."""
        return {**super().get_extra_state(), "past": self.past}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        super().set_extra_state(state)
        self.past = state["past"]

    @torch.no_grad()
    def _enter(self, epoch: int, model: nn.Module) -> None:
        if epoch == self.epoch:
            return
        module = unwrap(model)
        if any(type(part).__name__.startswith("FSDP") for part in (model, module)):
            raise RuntimeError(
                f"PastModelTeacher: {type(module).__name__} spreads the weights over the ranks, so that they cannot be "
                "copied; use ProgressiveSelfDistillation"
            )
        self.past = None
        if epoch > 0:
            self.past = {name: buffer.clone() for name, buffer in module.named_buffers()}
            self._copy_trainable(module)
        self.epoch = epoch

    def _copy_trainable(self, module: nn.Module) -> None:
        # What is frozen is shared with the model. If it is unfrozen later, it is copied at the next batch, which comes
        # before the first update.
        assert self.past is not None
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self.past:
                self.past[name] = parameter.detach().clone()

    def _soften(self, step: Step, targets: Tensor) -> Tensor:
        if self.past is None:
            past = torch.zeros(self._row_shape(targets), device=targets.device)
            # The past has no share yet; a share that a tuner learns stays in the graph, so that it is seen to matter.
            share = 0.0 * self.share if isinstance(self.share, Tensor) else 0.0
            return progressive_targets(targets, past, share)
        module = unwrap(step.model)
        self._copy_trainable(module)
        training = self.mode == "train"
        teacher = _Past(module, self._on_device(module), training)
        logits = self.head.logits(step.forward(model=teacher, grad=False, training=training)).to(targets.device)
        if logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"PastModelTeacher: logits must have {self.num_classes} classes in the last dimension, got "
                f"{tuple(logits.shape)}"
            )
        past = logits.softmax(-1)
        # A teacher that overflowed in half precision must not spoil the targets.
        finite = past.isfinite().all(-1)
        return progressive_targets(targets, past.nan_to_num(0.0), self.share * finite)

    def _row_shape(self, targets: Tensor) -> tuple[int, ...]:
        return tuple(targets.shape) if targets.is_floating_point() else (*targets.shape, self.num_classes)

    def _on_device(self, module: nn.Module) -> dict[str, Tensor]:
        assert self.past is not None
        live = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if unknown := sorted(set(self.past) - set(live)):
            raise ValueError(f"PastModelTeacher: the model has no tensor {unknown[0]!r}, which the past one had")
        self.past = {name: tensor.to(live[name].device) for name, tensor in self.past.items()}
        return self.past


class _Past(nn.Module):
    """The live model's forward pass with the past weights."""

    def __init__(self, live: nn.Module, tensors: dict[str, Tensor], training: bool) -> None:
        super().__init__()
        self.live = live
        buffers = {name for name, _ in live.named_buffers()}
        # In training mode the pass updates running statistics: on copies, as the past must stay what it was.
        self.tensors = {k: v.clone() if training and k in buffers else v for k, v in tensors.items()}

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.live, cast(Any, self.tensors), arguments, keywords)
