"""ELR+: two networks, weight averages and mixup around early-learning regularization."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..averaging import exponential_moving_average_, inverse_ramp, sigmoid_decay, sigmoid_ramp
from ..batching import Paired, batch_size, unwrap
from ..hyperparameter import Hyperparameter, check_strength, number_of, value_of
from ..pair import Pair, reinitialized
from ..regularizer import Regularizer
from ..sample_table import SampleTable
from ..step import Step
from .early_learning import early_learning_penalty
from .mixup import draw_coefficients, mix

_NETWORKS = ("a", "b")


def refined_labels(
    labels: Float[Tensor, "batch classes"], memory: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    """`y_c t_c / sum_c y_c t_c` (appendix F): re-weights the two classes of a mixed pair by what the memory believes.

    The identity for one-hot labels.

    Example:
        >>> refined_labels(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.6, 0.2, 0.2]]))
        tensor([[0.7500, 0.2500, 0.0000]])
    """
    weighed = labels * (memory + 1e-12)  # a memory of exactly 0 must not divide 0 by 0
    return weighed / weighed.sum(-1, keepdim=True)


class EarlyLearningPlus(Regularizer):
    """ELR+ of Liu et al. 2020 (arXiv 2007.00151, algorithm 2), for training on very noisy labels.

    Two networks (one `Pair`) train on differently mixed versions of each batch. The memory of each is fed by the
    moving average of the OTHER network's weights on the unmixed inputs. Evaluation averages the two networks' logits.
    Replaces the task loss. About four times the cost of plain training.

    The reference trains the networks in turn, an epoch each, on loaders of their own; here both see the same batches,
    with mixing coefficients and partners of their own.

    Args:
        num_examples: size of the whole training set.
        num_classes: C.
        strength: weight of the penalty (lambda), >= 0; a float or a `Hyperparameter`.
        momentum: of the memory (beta), in [0, 1).
        alpha: of mixup's Beta distribution; 0 trains on the unmixed inputs. A float or a `Hyperparameter`.
        decay: of the weight average (gamma), in [0, 1).
        ramp: "sigmoid" (CIFAR) ramps the decay over `ramp_fraction` of training; "inverse" is the reference's other rule,
            `min(1 - 1/(m + 1), decay)`.
        ramp_fraction: in (0, 1]. The reference's 40,000 steps are 57 % of its training on CIFAR-10.
        ramp_strength: ramp the strength too, as the reference does on CIFAR-100.
        refine_labels: re-weight mixed labels by the memory, as it does on CIFAR-100; see `refined_labels`.
        per_sample: draw a mixing coefficient for each example instead of one for each batch.
        keep: which networks `finish` returns, "networks" or their "averages".
        eps: of the penalty's clamp.
        dtype, storage, sync: of the memories; see `SampleTable`.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> from wellposed import fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> method = EarlyLearningPlus(num_examples=32, num_classes=2, decay=0.9)
        >>> fit(nn.Linear(3, 2), data, epochs=1, regularizer=method).model.eval()(torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """

    requires = frozenset({"index"})
    pairs_batch = True

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        strength: float | Hyperparameter = 3.0,
        momentum: float = 0.7,
        alpha: float | Hyperparameter = 1.0,
        decay: float = 0.997,
        *,
        ramp: Literal["sigmoid", "inverse"] = "sigmoid",
        ramp_fraction: float = 0.57,
        ramp_strength: bool = False,
        refine_labels: bool = False,
        per_sample: bool = False,
        keep: Literal["networks", "averages"] = "networks",
        eps: float = 1e-4,
        dtype: torch.dtype = torch.float32,
        storage: Literal["device", "cpu"] = "device",
        sync: Literal["auto", "never"] = "auto",
    ) -> None:
        super().__init__()
        check_strength("EarlyLearningPlus", "strength", strength)
        check_strength("EarlyLearningPlus", "alpha", alpha)
        ranges = {
            "momentum": (momentum, 0 <= momentum < 1, "in [0, 1)"),
            "decay": (decay, 0 <= decay < 1, "in [0, 1)"),
            "ramp_fraction": (ramp_fraction, 0 < ramp_fraction <= 1, "in (0, 1]"),
            "ramp": (ramp, ramp in ("sigmoid", "inverse"), "'sigmoid' or 'inverse'"),
            "keep": (keep, keep in ("networks", "averages"), "'networks' or 'averages'"),
            "num_classes": (num_classes, num_classes >= 2, ">= 2"),
            "eps": (eps, 0 < eps < 1 / max(2, num_classes), "in (0, 1/num_classes)"),
        }
        for name, (value, fits, allowed) in ranges.items():
            if not fits:
                raise ValueError(f"EarlyLearningPlus: {name} must be {allowed}, got {value!r}")
        self.num_classes, self.strength, self.momentum = num_classes, strength, momentum
        self.alpha, self.decay, self.ramp, self.ramp_fraction = alpha, decay, ramp, ramp_fraction
        self.ramp_strength, self.refine_labels, self.per_sample = ramp_strength, refine_labels, per_sample
        self.keep, self.eps = keep, eps
        self.tables = nn.ModuleDict(
            {k: SampleTable(num_examples, (num_classes,), dtype=dtype, storage=storage, sync=sync) for k in _NETWORKS}
        )
        self.averages = nn.ModuleDict()

    def attach(self, model: nn.Module) -> nn.Module:
        pair = model if isinstance(model, Pair) else Pair(model, reinitialized(model))
        for key in _NETWORKS:
            self.averages[key] = copy.deepcopy(getattr(pair, key)).requires_grad_(False)
        return pair

    def on_batch(self, step: Step) -> None:
        if step.index is None:
            raise ValueError("EarlyLearningPlus: step.index is missing; wrap the data set in IndexedDataset")
        size = batch_size(step)
        labels = step.targets
        if not labels.is_floating_point():
            labels = F.one_hot(labels, self.num_classes).float()
        clean, mixed = step.inputs, {}
        for key, other in zip(_NETWORKS, reversed(_NETWORKS), strict=True):
            # Training mode: the averaged network normalises with the batch's statistics, having none of its own.
            logits = step.forward(inputs=clean, model=self.averages[other], grad=False, training=True)
            p = logits.float().softmax(-1)
            updated = torch.lerp(p, self._table(key).read(step.index, device=p.device), self.momentum)
            alpha = number_of(self.alpha)
            if alpha > 0:
                coefficient = draw_coefficients(size, alpha, step.generator, self.per_sample).to(p.device)
                permutation = torch.randperm(size, generator=step.generator).to(p.device)
            else:
                coefficient, permutation = p.new_ones(size), torch.arange(size, device=p.device)
            mixed[key] = mix(clean, coefficient, permutation)
            step.extra[f"elr+ updated {key}"] = updated
            step.extra[f"elr+ memory {key}"] = mix(updated, coefficient, permutation)
            step.extra[f"elr+ labels {key}"] = mix(labels, coefficient, permutation)
        step.inputs = Paired(mixed["a"], mixed["b"])

    def loss(self, step: Step) -> Tensor:
        """Cross-entropy on the mixed labels plus penalty, summed over the two networks; (batch,)."""
        strength = value_of(self.strength)
        if self.ramp_strength:
            strength = strength * sigmoid_ramp(step.number + 1, self._ramp_steps(step))
        terms = []
        for key, logits in zip(_NETWORKS, step.outputs, strict=True):
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            memory, labels = step.extra[f"elr+ memory {key}"], step.extra[f"elr+ labels {key}"]
            if self.refine_labels:
                labels = refined_labels(labels, memory)
            task = -(labels.to(logits.dtype) * logits.log_softmax(-1)).sum(-1)
            terms.append(task + early_learning_penalty(logits, memory, eps=self.eps) * strength)
        return terms[0] + terms[1]

    def on_backward(self, step: Step) -> None:
        assert step.index is not None
        for key in _NETWORKS:
            self._table(key).write(step.index, step.extra[f"elr+ updated {key}"])

    def on_step(self, step: Step) -> None:
        number = step.number + 1
        if self.ramp == "sigmoid":
            decay = sigmoid_decay(number, self.decay, self._ramp_steps(step))
        else:
            decay = inverse_ramp(number, self.decay)
        pair = unwrap(step.model)
        for key in _NETWORKS:
            live = [p.detach() for p in getattr(pair, key).parameters()]
            if [p.shape for p in live] != [p.shape for p in self.averages[key].parameters()]:
                raise ValueError(
                    "EarlyLearningPlus: the networks' parameters were replaced after it copied them; a method that changes "
                    "the model must come before: Compose(WeightCompander(...), EarlyLearningPlus(...)). A self-tuning network "
                    "changes it after all; learn the strength with wellposed.tuning.BOREP"
                )
            exponential_moving_average_(list(self.averages[key].parameters()), live, decay)

    def finish(self, model: nn.Module) -> nn.Module:
        if self.keep == "networks":
            return model
        for key in _NETWORKS:
            live = dict(getattr(model, key).named_buffers())
            for name, buffer in self.averages[key].named_buffers():
                buffer.copy_(live[name])
        return Pair(self.averages["a"], self.averages["b"])

    def soft_targets(self) -> Float[Tensor, "examples classes"]:
        """Mean of the two memories."""
        return (self._table("a").rows.float() + self._table("b").rows.float()) / 2

    def label_issues(self, labels: Int[Tensor, examples]) -> Bool[Tensor, examples]:
        """Which labels the mean memory disagrees with; false for examples that were never visited."""
        memory = self.soft_targets()
        return (memory.argmax(1) != labels.to(memory.device)) & self._table("a").visited.to(memory.device)

    def _ramp_steps(self, step: Step) -> int:
        return max(1, math.ceil(self.ramp_fraction * step.total))

    def _table(self, key: str) -> SampleTable:
        table = self.tables[key]
        assert isinstance(table, SampleTable)
        return table
