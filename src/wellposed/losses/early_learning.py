"""Early-learning regularization (ELR): remember what the network believed early, and do not let wrong labels overrule it."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..objective import cross_entropy
from ..regularizer import Regularizer
from ..sample_table import SampleTable
from ..step import Step

Clamp = Literal["reference"]


def early_learning_penalty(
    logits: Float[Tensor, "batch classes"],
    memory: Float[Tensor, "batch classes"],
    clamp: Clamp | None = "reference",
    eps: float = 1e-4,
) -> Float[Tensor, batch]:
    """`log(1 - <p, t>)` with p the softmax of the logits, unreduced; at most 0.

    Its gradient in the logits is `p_c (<p, t> - t_c) / (1 - <p, t>)`: it pushes up the class that the memory t holds,
    whatever the label says, and does not vanish when that class is learned. Source: arXiv 2007.00151, eq. 7, lemma 2.

    Args:
        logits: (batch, classes).
        memory: t, (batch, classes), rows of at most 1 in all; constant.
        clamp: "reference" uses `clip(p, eps, 1 - eps)` as the authors' code does: no gradient flows through entries
            outside, so that the push ends once p is certain. None is the paper's formula, in a form without
            cancellation: `log(1 - <p, t>) = logsumexp(log p + log(1 - t))`, as p sums to 1.
        eps: of the clamp.

    Example:
        >>> early_learning_penalty(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
        tensor([-0.6931])
    """
    memory = memory.detach()
    if clamp is None:
        return torch.logsumexp(logits.log_softmax(-1) + torch.log1p(-memory.to(logits.dtype)), -1)
    p = logits.softmax(-1).clamp(eps, 1.0 - eps)
    return torch.log1p(-(p * memory.to(p.dtype)).sum(-1))


def updated_memory(
    memory: Float[Tensor, "batch classes"],
    logits: Float[Tensor, "batch classes"],
    momentum: float,
    clamp: Clamp | None = "reference",
    eps: float = 1e-4,
) -> Float[Tensor, "batch classes"]:
    """`momentum * t + (1 - momentum) * p`, without gradient (eq. 9); under the clamp p is clipped and renormalised.

    Example:
        >>> updated_memory(torch.zeros(1, 2), torch.zeros(1, 2), momentum=0.7)
        tensor([[0.1500, 0.1500]])
    """
    p = logits.detach().softmax(-1)
    if clamp is not None:
        p = p.clamp_(eps, 1.0 - eps)
        p /= p.sum(-1, keepdim=True)
    return torch.lerp(p.to(memory.dtype), memory, momentum)


class EarlyLearning(Regularizer):
    """Early-learning regularization (ELR) of Liu et al. 2020 (arXiv 2007.00151), for training on noisy labels.

    A running average of the network's own predictions for every training example, and the penalty
    `strength * log(1 - <p, t>)` that keeps the network to it. The loss is negative in normal operation.

    Works alone (`loss = criterion(logits, targets, index)`), and as a Regularizer in `fit` or a `Compose`.

    Args:
        num_examples: size of the whole training set.
        num_classes: C.
        strength: weight of the penalty (lambda), >= 0; a float or a `Hyperparameter`. 1 only cancels the push of a
            wrong label, more overrules it.
        momentum: share of the old memory kept at each visit (beta), in [0, 1); below 0.5 the memory follows the
            present too closely to protect anything.
        clamp: "reference" (the authors' code) or None (the paper's formula); see `early_learning_penalty`.
        eps: of the clamp, in (0, 1/C). With more than 100 classes `min(1e-4, 1e-2 / C)` is advisable.
        bias_correction: divide the memory by `1 - momentum^visits`; the paper does not, so that the penalty warms up.
        dtype: storage of the memory, of num_examples x num_classes numbers; float16 halves it.
        storage: "device", "cpu" or "memmap"; see `SampleTable`.
        path: of the memory-mapped file.
        sync: "auto" or "never"; see `SampleTable`.

    Raises:
        ValueError: for an argument out of range; in use, for logits or an index that do not fit.

    Example:
        >>> criterion = EarlyLearning(num_examples=4, num_classes=2, strength=3.0, momentum=0.7)
        >>> logits, targets, index = torch.zeros(2, 2, requires_grad=True), torch.tensor([0, 1]), torch.tensor([3, 0])
        >>> criterion(logits, targets, index).backward()
        >>> criterion.soft_targets()[3]
        tensor([0.1500, 0.1500])
    """

    requires = frozenset({"index"})

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        strength: float | Hyperparameter = 3.0,
        momentum: float = 0.7,
        *,
        clamp: Clamp | None = "reference",
        eps: float = 1e-4,
        bias_correction: bool = False,
        dtype: torch.dtype = torch.float32,
        storage: Literal["device", "cpu", "memmap"] = "device",
        path: str | None = None,
        sync: Literal["auto", "never"] = "auto",
    ) -> None:
        super().__init__()
        if num_examples < 1:
            raise ValueError(f"EarlyLearning: num_examples must be >= 1, got {num_examples}")
        if num_classes < 2:
            raise ValueError(f"EarlyLearning: num_classes must be >= 2, got {num_classes}")
        check_strength("EarlyLearning", "strength", strength)
        if not 0 <= momentum < 1:
            raise ValueError(f"EarlyLearning: momentum must lie in [0, 1), got {momentum}")
        if momentum < 0.5:
            warnings.warn(f"EarlyLearning: momentum {momentum} < 0.5 remembers too little; 0.7 to 0.99 is usual")
        if clamp not in ("reference", None):
            raise ValueError(f"EarlyLearning: clamp must be 'reference' or None, got {clamp!r}")
        if not 0 < eps < 1 / num_classes:
            raise ValueError(f"EarlyLearning: eps must lie in (0, 1/num_classes) = (0, {1 / num_classes:g}), got {eps}")
        self.num_classes = num_classes
        self.strength = strength
        self.momentum = momentum
        self.clamp: Clamp | None = clamp
        self.eps = eps
        self.bias_correction = bias_correction
        self.table = SampleTable(num_examples, (num_classes,), dtype=dtype, storage=storage, path=path, sync=sync)
        if bias_correction:
            self.visits_table = SampleTable(num_examples, (), sync=sync)

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor, *, update: bool = True) -> Tensor:
        """Mean loss of a plain loop. In training mode the memory is updated; in evaluation mode it is cross-entropy.

        Args:
            logits: (batch, classes).
            targets: (batch,) integer classes, or (batch, classes) probabilities that sum to 1.
            index: (batch,) int64 positions in the training set.
            update: write the memory; pass False for a second evaluation of the same step.
        """
        if targets.is_floating_point() and not torch.allclose(targets.sum(-1), targets.new_ones(()), atol=1e-3):
            raise ValueError("EarlyLearning: soft targets must sum to 1 over the classes")
        loss = cross_entropy(logits, targets).mean()
        if not self.training:
            return loss
        logits = self._checked(logits)
        memory = self._updated(logits, index)
        penalty = early_learning_penalty(logits, self._corrected(memory, index), self.clamp, self.eps)
        if update:
            self._write(index, memory)
        return loss + value_of(self.strength) * penalty.mean()

    def penalty(self, step: Step) -> Tensor:
        logits = self._checked(step.logits)
        index = self._index(step)
        memory = self._corrected(self._updated(logits, index), index)
        if "partner" in step.extra and "mix" in step.extra:
            # Under mixup the example and its partner share the input, so they share the memory (ELR+, eq. of tt).
            own = step.extra["mix"].to(memory)[:, None]
            partner = self._corrected(
                self.table.read(step.extra["partner"], device=logits.device), step.extra["partner"]
            )
            memory = torch.lerp(partner, memory, own)
        return early_learning_penalty(logits, memory, self.clamp, self.eps) * value_of(self.strength)

    def on_backward(self, step: Step) -> None:
        index = self._index(step)
        self._write(index, self._updated(self._checked(step.logits), index))

    def soft_targets(self) -> Float[Tensor, "examples classes"]:
        """The memory: a running average of each example's prediction."""
        return self.table.rows.float()

    def label_issues(self, labels: Int[Tensor, examples]) -> Bool[Tensor, examples]:
        """Which labels the memory disagrees with; false for examples that were never visited.

        Args:
            labels: the given label of every training example, in the order of the data set.

        Raises:
            ValueError: if their number is not num_examples.
        """
        if labels.shape != (len(self.table),):
            raise ValueError(f"EarlyLearning: labels must have shape ({len(self.table)},), got {tuple(labels.shape)}")
        rows = self.table.rows
        return (rows.float().argmax(1) != labels.to(rows.device)) & self.table.visited.to(rows.device)

    def _updated(self, logits: Tensor, index: Tensor) -> Tensor:
        old = self.table.read(index, device=logits.device)
        return updated_memory(old, logits, self.momentum, self.clamp, self.eps)

    def _corrected(self, memory: Tensor, index: Tensor) -> Tensor:
        """Divide by the weights that the average has seen, counting the visit at hand."""
        if not self.bias_correction:
            return memory
        visits = self.visits_table.read(index, device=memory.device) + 1
        return memory / (1.0 - self.momentum**visits)[:, None]

    def _write(self, index: Tensor, memory: Tensor) -> None:
        self.table.write(index, memory)
        if self.bias_correction:
            # A row that is not finite is not stored, so its visit does not count either.
            finite = memory.isfinite().all(-1).to(index.device)
            visits = self.visits_table.read(index) + 1
            self.visits_table.write(index, visits.where(finite, visits.new_tensor(math.nan)))

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"EarlyLearning: logits must have shape (batch, {self.num_classes}), got {tuple(logits.shape)}"
            )
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    @staticmethod
    def _index(step: Step) -> Tensor:
        if step.index is None:
            raise ValueError("EarlyLearning: step.index is missing; wrap the data set in IndexedDataset")
        return step.index
