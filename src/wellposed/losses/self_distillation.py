"""Progressive self-distillation (PS-KD): each example's target moves towards what the network predicted for it before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import IGNORE_INDEX, valid_positions
from ..hyperparameter import Hyperparameter
from ..objective import cross_entropy
from ..step import Step
from .prediction_memory import PredictionMemory
from .progressive_share import ProgressiveShare, Schedule
from .soft_targets import progressive_targets
from .token_rows import first_rows, token_rows

_VALID = "ps-kd valid"


class ProgressiveSelfDistillation(ProgressiveShare):
    """Progressive self-knowledge distillation (PS-KD) of Kim et al. 2021 (arXiv 2006.12000, section 3).

    The target of every example is `(1 - alpha_t) * label + alpha_t * (the network's own prediction one epoch ago)`, and
    `alpha_t = alpha * t / T` grows through training. The predictions are those of the training passes themselves, taken
    before the update: no second pass. An example that was never visited is trained on its label.

    Works alone (`loss = criterion(logits, targets, index)`), and as a Regularizer in `fit` or a `Compose`. There it
    rewrites `step.targets` into probabilities; any loss that takes them may follow. Behind `Mixup` it mixes the rows of
    both partners; the row that it stores is then that of the mixed view (`PastModelTeacher` needs no rows).

    Args:
        num_examples: size of the whole training set.
        num_classes: C.
        alpha: share of the past prediction at the end of training, in [0, 1]; a float or a `Hyperparameter`.
        schedule: "epoch" (the paper), "step", or "constant" (a control).
        epochs: T, for a plain loop; `fit` and adapters tell it through the step.
        lengths: for sequences, the number of target tokens of each example, (examples,), or one number for all.
            Targets are then (batch, length) with -100 where there is none, logits (batch, length, classes). The k-th target
            token of an example must be the same one at every visit; padding may differ.
        refresh: "visit": a row holds the example's last prediction, as in the authors' code; where an example comes
            twice in an epoch, the second visit sees the first. "epoch": that of the epoch before; doubles the memory.
        top_k: keep only so many of the largest probabilities of a row and spread the rest evenly.
        output_key, target_key: of the class logits and targets, where a model returns, or a loader yields, a dict.
        dtype: storage of the rows; float16 halves it.
        storage, path, sync: see `SampleTable`.

    Raises:
        ValueError: for an argument out of range; in use, for logits, targets or an index that do not fit.
        RuntimeError: if training starts at a later epoch with an empty memory.

    Example:
        >>> criterion = ProgressiveSelfDistillation(num_examples=4, num_classes=2, alpha=0.8, epochs=2)
        >>> targets, index = torch.tensor([0, 1]), torch.tensor([3, 0])
        >>> for epoch in range(2):
        ...     criterion.set_epoch(epoch)
        ...     loss = criterion(torch.zeros(2, 2), targets, index)
        >>> criterion.soften(targets, index)
        tensor([[0.6000, 0.4000],
                [0.4000, 0.6000]])
    """

    requires = frozenset({"index"})
    first: Tensor | None

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        alpha: float | Hyperparameter = 0.8,
        *,
        schedule: Schedule = "epoch",
        epochs: int | None = None,
        lengths: int | Int[Tensor, " examples"] | None = None,
        refresh: Literal["visit", "epoch"] = "visit",
        top_k: int | None = None,
        output_key: str | None = None,
        target_key: str | None = None,
        dtype: torch.dtype = torch.float32,
        storage: Literal["device", "cpu", "memmap"] = "device",
        path: str | Path | None = None,
        sync: Literal["auto", "never"] = "auto",
    ) -> None:
        super().__init__(num_classes, alpha, schedule, epochs, output_key, target_key)
        if num_examples < 1:
            raise ValueError(f"ProgressiveSelfDistillation: num_examples must be >= 1, got {num_examples}")
        if refresh not in ("visit", "epoch"):
            raise ValueError(f"ProgressiveSelfDistillation: refresh must be 'visit' or 'epoch', got {refresh!r}")
        self.num_examples = num_examples
        first = None if lengths is None else first_rows(num_examples, lengths)
        self.register_buffer("first", first, persistent=False)
        rows = num_examples if first is None else int(first[-1])

        def memory(where: str | Path | None) -> PredictionMemory:
            options: Any = {"top_k": top_k, "dtype": dtype, "storage": storage, "path": where, "sync": sync}
            return PredictionMemory(rows, num_classes, **options)

        self.memory = memory(path)
        pending = None if path is None else Path(path).with_suffix(".pending.npy")
        self.pending = memory(pending) if refresh == "epoch" else None
        self._checked = self._told = False
        self._trained = 0

    def set_epoch(self, epoch: int, done: float = 0.0) -> None:
        """For a plain loop: before each epoch, or before each step under `schedule="step"`.

        Args:
            epoch: from 0. At or beyond `epochs` alpha stays at its end, with a warning.
            done: for `schedule="step"`, the share of this epoch's steps that are done once the coming one is.
        """
        self._told = True
        self._enter(epoch)
        self.choose_share(epoch, done)

    def forward(
        self, logits: Tensor, targets: Tensor, index: Tensor | None = None, *, update: bool = True
    ) -> Float[Tensor, ""]:
        """Mean loss of a plain loop. In training mode the memory is updated; in evaluation mode it is cross-entropy.

        Args:
            logits: (batch, classes), or (batch, length, classes) with `lengths`.
            targets: integer classes of the logits' shape without the last dimension (-100: none), or probabilities.
            index: (batch,) int64 positions in the training set; not needed in evaluation mode.
            update: write the memory; pass False for a second evaluation of the same step.
        """
        logits = self.head.logits(logits)
        if not self.training:
            return _mean(cross_entropy(logits, targets), targets)
        if index is None:
            raise ValueError("ProgressiveSelfDistillation: index is missing: the positions in the training set")
        if self.share is None:  # set_epoch was not called yet: the epoch of the state, or the first
            self._enter(max(0, self.epoch))
            self.choose_share(self.epoch)
        self._warn_if_epochs_pass_unnoticed(len(index))
        self._require_memory(self.epoch)
        loss = _mean(cross_entropy(logits, self.soften(targets, index)), targets)
        if update:
            self.store(logits, index, valid_positions(targets, {}))
        return loss

    def soften(
        self,
        targets: Tensor,
        index: Tensor,
        *,
        valid: Tensor | None = None,
        partner: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        """The soft targets of a batch at the current share; for a loss of your own.

        Args:
            targets: integer classes (-100: none), or probabilities.
            index: (batch,) positions in the training set.
            valid: (batch, length), for sequences: which tokens have a target; by default those that are not -100.
            partner, mix: under mixup or CutMix, the partner's position and the example's own weight, each (batch,).
        """
        share = 0.0 if self.share is None else self.share
        if self.first is not None:
            if partner is not None:
                raise ValueError(
                    "ProgressiveSelfDistillation: the tokens of two sequences do not correspond, so their rows cannot "
                    "be mixed; use PastModelTeacher"
                )
            return self._soften_tokens(targets, index, self._valid(targets, valid), share)
        past, seen = self._past(index, targets.device)
        if targets.ndim - targets.is_floating_point() != 1:
            raise ValueError(
                "ProgressiveSelfDistillation: targets must be classes (batch,) or probabilities (batch, classes), got "
                f"{tuple(targets.shape)}; for sequences pass lengths="
            )
        if partner is not None and mix is not None:
            other, other_seen = self._past(partner, targets.device)
            past = torch.lerp(other, past, mix.to(past)[:, None])
            # Two labels that were mixed cannot be told apart any more: the pair waits until both were visited.
            seen = seen & other_seen
        return progressive_targets(targets, past, share * seen)

    def store(self, logits: Tensor, index: Tensor, valid: Tensor | None = None) -> None:
        """Remember the predictions of a batch, without gradient; `valid` as in `soften`."""
        length = "" if self.first is None else "length, "
        if logits.shape[-1] != self.num_classes or logits.ndim != (2 if self.first is None else 3):
            raise ValueError(
                f"ProgressiveSelfDistillation: logits must have shape (batch, {length}{self.num_classes}), got "
                f"{tuple(logits.shape)}"
            )
        probabilities, rows = logits.detach().softmax(-1), index
        if self.first is not None:
            if valid is None:
                valid = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            rows, probabilities = token_rows(self.first, index, valid), probabilities[valid]
        (self.memory if self.pending is None else self.pending).write(rows, probabilities)

    def on_epoch(self, step: Step) -> None:
        self._enter(step.epoch)

    def on_batch(self, step: Step) -> None:
        self._require_memory(step.epoch)
        self.share_at(step)
        targets, index = self.head.targets(step.targets), self._index(step)
        partner, mix = step.extra.get("partner"), step.extra.get("mix")
        if self.first is not None:
            step.extra[_VALID] = self._valid(targets, step.extra.get("valid"))
            if self.head.target_key is None and not targets.is_floating_point():
                step.extra["valid"] = step.extra[_VALID]  # probabilities no longer say which tokens count
        soft = self.soften(targets, index, valid=step.extra.get(_VALID), partner=partner, mix=mix)
        step.targets = self.head.replaced(step.targets, soft)

    def on_backward(self, step: Step) -> None:
        self.store(self.head.logits(step.outputs), self._index(step), step.extra.get(_VALID))

    def _enter(self, epoch: int) -> None:
        if self.pending is not None and epoch != self.epoch:
            self.memory.absorb(self.pending)
        self.epoch = epoch

    def _past(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.memory.read(rows, device=device), self.memory.seen(rows).to(device)

    def _soften_tokens(self, targets: Tensor, index: Tensor, valid: Tensor, share: Any) -> Tensor:
        assert self.first is not None
        rows, seen = self._past(token_rows(self.first, index, valid), targets.device)
        past = rows.new_zeros(*valid.shape, self.num_classes)
        past[valid] = rows
        shares = rows.new_zeros(valid.shape)
        shares[valid] = share * seen.to(rows.dtype)
        if targets.is_floating_point():
            return torch.where(valid[..., None], progressive_targets(targets, past, shares), 0.0)
        return progressive_targets(targets.masked_fill(~valid, IGNORE_INDEX), past, shares)

    def _valid(self, targets: Tensor, given: Tensor | None) -> Tensor:
        if targets.ndim - targets.is_floating_point() != 2:
            raise ValueError(
                "ProgressiveSelfDistillation: with lengths, targets must be classes (batch, length) or probabilities "
                f"(batch, length, classes), got {tuple(targets.shape)}"
            )
        found = valid_positions(targets, {})
        if found is None:
            found = torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
        return found if given is None else found & given.bool()

    def _require_memory(self, epoch: int) -> None:
        if self._checked:  # once: it reads a result back from the device
            return
        held = self.memory.visited.any() or (self.pending is not None and self.pending.visited.any())
        if epoch > 0 and not held:
            raise RuntimeError(
                f"ProgressiveSelfDistillation: the memory is empty at epoch {epoch}; to resume, load the state_dict of "
                "this method beside the model's; to start anew, count epochs from 0"
            )
        self._checked = True

    def _warn_if_epochs_pass_unnoticed(self, size: int) -> None:
        self._trained += size
        if not self._told and self.schedule != "constant" and self._trained > 2 * self.num_examples:
            self._told = True
            warnings.warn("ProgressiveSelfDistillation: set_epoch was never called, so that alpha does not grow")

    @staticmethod
    def _index(step: Step) -> Tensor:
        if step.index is None:
            raise ValueError("ProgressiveSelfDistillation: step.index is missing; wrap the data set in IndexedDataset")
        return step.index


def _mean(loss: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions that have a target, as `torch.nn.functional.cross_entropy` takes it."""
    if targets.is_floating_point():
        return loss.mean()
    valid = targets != IGNORE_INDEX
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)
