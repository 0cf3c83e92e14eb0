"""Penalties on logits, each a method of its own: stay near a teacher, stay diverse (the spectrum: `spectral_term`)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step
from .adapter_teacher import AdapterTeacher, InitialAdapterTeacher
from .logit_consistency import check_temperature, kl_consistency, normalized_mse_consistency, teacher_confidence
from .logit_diversity import logit_covariance, topk_entropy
from .logit_rows import valid_rows
from .shared_rows import Rows, rows_of
from .strength_schedule import Factor, Schedule, find_schedule

Per = Literal["token", "sequence"]
_LEAST = 0.1
"""Share of the strength that the adaptive weight keeps where the teacher knows nothing."""


class LogitTerm(Regularizer):
    """A penalty on the logits with a strength that follows a schedule.

    Args:
        strength: weight, >= 0; a float or a `Hyperparameter`.
        schedule: of the weight over `step.progress`: a name of `strength_schedule.SCHEDULES`, or a function of it.
    """

    def __init__(self, strength: float | Hyperparameter, schedule: Schedule | Factor) -> None:
        super().__init__()
        owner = type(self).__name__
        check_strength(owner, "strength", strength)
        find_schedule(owner, schedule)
        self.strength, self.schedule = strength, schedule

    def weight(self, progress: float) -> Any:
        """The strength at a share of training, in [0, 1]."""
        return value_of(self.strength) * find_schedule(type(self).__name__, self.schedule)(progress)

    def is_off(self, progress: float) -> bool:
        """Whether the term counts nothing now, so that it need not be computed."""
        return not isinstance(self.strength, Hyperparameter) and self.weight(progress) == 0


class LogitConsistency(LogitTerm):
    """BA-LoRA's consistency term alone: the tuned model's predictions stay near the pretrained one's (arXiv 2408.04556).

    Plain distillation from the model's own start: the control that every richer method of its kind should be compared
    with.

    Args:
        strength: weight, >= 0; a float or a `Hyperparameter`.
        teacher: where the pretrained logits come from; `InitialAdapterTeacher()` by default.
        form: "kl" (`kl_consistency`) or "normalized_mse" (`normalized_mse_consistency`).
        temperature: T of "kl", > 0.
        schedule: see `LogitTerm`.
        adaptive: weigh by the teacher's confidence instead of the schedule: strength times 0.1 to 1.
        per: of sequences: "token", the mean over valid tokens; "sequence", the sum over the tokens of each sequence.

    Raises:
        ValueError: for an argument out of range; in use, for teacher logits of another shape.

    Example:
        >>> from wellposed.losses.adapter_teacher import StoredTeacher
        >>> term = LogitConsistency(0.5, teacher=StoredTeacher(torch.zeros(4, 2)))
        >>> term.penalty(Step(nn.Identity(), outputs=torch.zeros(1, 2), index=torch.tensor([3])))
        tensor([0.])
    """

    def __init__(
        self,
        strength: float | Hyperparameter = 0.15,
        *,
        teacher: AdapterTeacher | None = None,
        form: Literal["kl", "normalized_mse"] = "kl",
        temperature: float = 2.0,
        schedule: Schedule | Factor = "constant",
        adaptive: bool = False,
        per: Per = "token",
    ) -> None:
        super().__init__(strength, schedule)
        if form not in ("kl", "normalized_mse"):
            raise ValueError(f"LogitConsistency: form must be 'kl' or 'normalized_mse', got {form!r}")
        if teacher is not None and not isinstance(teacher, AdapterTeacher):
            raise TypeError(
                f"LogitConsistency: teacher must be an AdapterTeacher, got {type(teacher).__name__}; a model of your own goes "
                "into FrozenCopyTeacher(model)"
            )
        check_temperature("LogitConsistency", temperature)
        check_per("LogitConsistency", per)
        self.teacher = InitialAdapterTeacher() if teacher is None else teacher
        self.form, self.temperature, self.adaptive, self.per = form, temperature, adaptive, per
        self.requires = self.teacher.requires
        self.coupled = adaptive  # by the mean of the teacher's confidence

    def attach(self, model: nn.Module) -> nn.Module:
        self.teacher.attach(model)
        return model

    def term(self, logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None) -> Tensor:
        """The term without its strength: (batch,) or (batch, length)."""
        if self.form == "kl":
            found = kl_consistency(logits, teacher_logits, self.temperature)
        else:
            found = normalized_mse_consistency(logits, teacher_logits)
        if self.per == "sequence" and found.ndim == 2:
            found = (found if valid is None else torch.where(valid, found, 0.0)).sum(1)
        return found

    def weight_by(
        self, teacher_logits: Tensor, progress: float, valid: Tensor | None = None, step: Step | None = None
    ) -> Any:
        """The strength by schedule, or by the teacher's mean confidence on the valid rows (of all ranks, in a step)."""
        if not self.adaptive:
            return self.weight(progress)
        rows = valid_rows(teacher_logits, valid)
        where = Rows() if step is None else rows_of("LogitConsistency", rows, step)
        confidence = where.total(teacher_confidence(rows, self.temperature).sum()) / max(1, where.count(rows))
        return value_of(self.strength) * (_LEAST + (1.0 - _LEAST) * confidence)

    def penalty(self, step: Step) -> Tensor | None:
        if self.is_off(step.progress):
            return None
        teacher_logits = self.teacher.logits(step)
        weight = self.weight_by(teacher_logits, step.progress, step.valid, step)
        return self.term(step.logits, teacher_logits, step.valid) * weight


class LogitDiversity(LogitTerm):
    """BA-LoRA's diversity term alone: decorrelated logits of a batch, or entropy of each token's top K (arXiv 2408.04556).

    Args:
        strength: weight, >= 0; a float or a `Hyperparameter`.
        form: "covariance" (`logit_covariance`, a statistic of the micro-batch, on all ranks together) or "topk_entropy"
            (one number a row).
        top_k: K of "topk_entropy"; None for all classes.
        center_rows: of "covariance": leave out what no probability shows.
        schedule: see `LogitTerm`.

    Raises:
        ValueError: for an argument out of range; in the first step, for a batch of one example under "covariance" (a
            smaller rest at the end of an epoch is skipped), or more top classes than there are.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        >>> LogitDiversity(0.5).penalty(Step(nn.Identity(), outputs=z))
        tensor(2.)
    """

    def __init__(
        self,
        strength: float | Hyperparameter = 0.03,
        *,
        form: Literal["covariance", "topk_entropy"] = "covariance",
        top_k: int | None = 20,
        center_rows: bool = False,
        schedule: Schedule | Factor = "constant",
    ) -> None:
        super().__init__(strength, schedule)
        if form not in ("covariance", "topk_entropy"):
            raise ValueError(f"LogitDiversity: form must be 'covariance' or 'topk_entropy', got {form!r}")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"LogitDiversity: top_k must be an integer >= 1, or None for all classes, got {top_k!r}")
        self.form, self.top_k, self.center_rows = form, top_k, center_rows
        self.coupled = form == "covariance"

    def term(self, logits: Tensor, valid: Tensor | None = None) -> Tensor:
        """The term without its strength: a scalar, or (batch,) or (batch, length) of entropies."""
        if self.form == "topk_entropy":
            return topk_entropy(logits, self.top_k)
        return logit_covariance(valid_rows(logits, valid), self.center_rows)

    def penalty(self, step: Step) -> Tensor | None:
        if self.is_off(step.progress):
            return None
        if self.form == "topk_entropy":
            return self.term(step.logits, step.valid) * self.weight(step.progress)
        own = valid_rows(step.logits, step.valid)
        where = rows_of("LogitDiversity", own, step)
        if where.count(own) < 2 and step.number > 0:  # in the first step the batch size is wrong, and `term` says so
            return None
        return logit_covariance(where.join(own), self.center_rows) * self.weight(step.progress)


def check_per(owner: str, per: str) -> None:
    """Raise for an unknown way to count the tokens of sequences."""
    if per not in ("token", "sequence"):
        raise ValueError(f"{owner}: per must be 'token' or 'sequence', got {per!r}")
