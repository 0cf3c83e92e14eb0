"""BA-LoRA: three penalties on the logits that accompany a low-rank adaptation, in both published versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..hyperparameter import Hyperparameter
from ..regularizer import Regularizer
from ..step import Step
from .adapter_teacher import AdapterTeacher
from .logit_rows import shifted, valid_labels
from .logit_spectrum import Norm
from .logit_terms import LogitConsistency, LogitDiversity, LogitTerm, Per
from .spectral_term import SpectralConcentration

Task = Literal["classification", "generation"]
Variant = Literal["v6", "v5"]


@dataclass(frozen=True)
class _Published:
    """What a version prescribes for a task."""

    strengths: tuple[float, float, float]
    k: int
    norm: Norm
    form: Literal["kl", "normalized_mse"]
    diversity: Literal["covariance", "topk_entropy"]
    temperature: float = 2.0
    top_k: int | None = 20
    per: Per = "token"
    scheduled: bool = True


_PUBLISHED: Mapping[tuple[Variant, Task], _Published] = {
    ("v6", "classification"): _Published((0.15, 0.03, 0.03), 5, "nuclear", "kl", "covariance"),
    ("v6", "generation"): _Published((0.025, 0.005, 0.005), 10, "frobenius", "kl", "topk_entropy"),
    ("v5", "classification"): _Published(
        (1e-4, 3e-4, 1e-4), 3, "nuclear", "normalized_mse", "covariance", scheduled=False
    ),
    ("v5", "generation"): _Published(
        (1e-4, 3e-4, 1e-4), 3, "nuclear", "kl", "topk_entropy", temperature=1.0, top_k=None, per="sequence",
        scheduled=False,
    ),
}  # fmt: skip


class BiasAlleviatingTerms(NamedTuple):
    """The terms of a plain loop, each a scalar without its strength (NaN-free; 0 where no token is valid).

    Attributes:
        total: the sum of all, weighted; what is added to the loss.
        consistency, diversity, concentration: the terms.
        rows: number of examples, or of valid tokens, over which means were taken.
    """

    total: Float[Tensor, ""]
    consistency: Float[Tensor, ""]
    diversity: Float[Tensor, ""]
    concentration: Float[Tensor, ""]
    rows: int


class BiasAlleviatingLoRA(Regularizer):
    """Bias-alleviating low-rank adaptation, BA-LoRA (Chang et al. 2024, arXiv 2408.04556), beside a LoRA or PiSSA adapter.

    Adds `l1 * consistency + l2 * diversity + l3 * concentration` to the task loss:

    - consistency: divergence from the pretrained model's predictions (`kl_consistency`);
    - diversity: decorrelated class logits (`logit_covariance`), or the entropy of each token's top K (`topk_entropy`);
    - concentration: the share of the k leading singular values of the batch's logits (`spectral_concentration`).

    The adapter is another method (`wellposed.weights.LowRankAdaptation(init="pissa")` before this one in a `Compose`, or
    PEFT). Each term is a method of its own as well: `LogitConsistency`, `LogitDiversity`, `SpectralConcentration`. Try the
    first alone: it is plain distillation from the start.

    For "classification" diversity and concentration are statistics of the micro-batch; for "generation" concentration is.
    Under data parallelism the ranks' micro-batches count as one, so that gradients are those of one process; `forward`,
    for plain loops, sees the rank's own. On tasks with at most k classes the concentration of class logits is constant.

    Args:
        task: "classification" (the paper's understanding tasks) or "generation": which forms of the terms, and defaults.
        variant: "v6" (ICLR 2026) or "v5" (the first versions of the paper).
        consistency, diversity, concentration: strengths l1, l2, l3, >= 0: floats or `Hyperparameter`s. None is the
            version's own value.
        k: leading singular values; None is the version's own.
        temperature: of the divergence; None is the version's own.
        top_k: of the entropy; "published" is the version's own, None all classes.
        teacher: the pretrained model; `InitialAdapterTeacher()` by default.
        head: name of a frozen output layer, for a cheap exact spectrum (v6; see `SpectralConcentration`).
        schedules: "published": v6 lowers l1 to a tenth along a cosine, and begins l2 and l3 after a fifth of training; v5
            has none. "constant".
        adaptive: l1 follows the teacher's confidence instead.
        center_rows: of the covariance; see `logit_covariance`.
        seed: of the randomized spectrum.

    Raises:
        ValueError: for an argument out of range; see the terms for what is checked in use.

    Example:
        >>> from wellposed import Compose, fit
        >>> from wellposed.weights.low_rank import LowRankAdaptation
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 8)
        >>> method = Compose(LowRankAdaptation(rank=2, init="pissa"), BiasAlleviatingLoRA("classification"))
        >>> tuned = fit(model, data, epochs=1, regularizer=method).model
    """

    def __init__(
        self,
        task: Task,
        variant: Variant = "v6",
        *,
        consistency: float | Hyperparameter | None = None,
        diversity: float | Hyperparameter | None = None,
        concentration: float | Hyperparameter | None = None,
        k: int | None = None,
        temperature: float | None = None,
        top_k: int | Literal["published"] | None = "published",
        teacher: AdapterTeacher | None = None,
        head: str | None = None,
        schedules: Literal["published", "constant"] = "published",
        adaptive: bool = False,
        center_rows: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("task", task, ("classification", "generation")),
            ("variant", variant, ("v6", "v5")),
            ("schedules", schedules, ("published", "constant")),
        ):
            if value not in allowed:
                raise ValueError(f"BiasAlleviatingLoRA: {name} must be {allowed[0]!r} or {allowed[1]!r}, got {value!r}")
        of = _PUBLISHED[variant, task]
        l1, l2, l3 = (
            own if given is None else given
            for own, given in zip(of.strengths, (consistency, diversity, concentration), strict=True)
        )
        scheduled = of.scheduled and schedules == "published"
        self.task, self.variant = task, variant
        self.consistency = LogitConsistency(
            l1, teacher=teacher, form=of.form, temperature=of.temperature if temperature is None else temperature,
            schedule="cosine" if scheduled else "constant", adaptive=adaptive, per=of.per,
        )  # fmt: skip
        self.diversity = LogitDiversity(
            l2, form=of.diversity, top_k=of.top_k if top_k == "published" else top_k, center_rows=center_rows,
            schedule="two_phase" if scheduled else "constant",
        )  # fmt: skip
        self.concentration = SpectralConcentration(
            l3, k=of.k if k is None else k, norm=of.norm, method="auto", head=head, per=of.per,
            schedule="two_phase" if scheduled else "constant", seed=seed,
        )  # fmt: skip
        self.requires = frozenset() if _is_absent(self.consistency) else self.consistency.requires
        self.coupled = any(term.coupled and not _is_absent(term) for term in self.terms)

    @property
    def terms(self) -> tuple[LogitConsistency, LogitDiversity, SpectralConcentration]:
        """The three methods."""
        return self.consistency, self.diversity, self.concentration

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        progress: float = 1.0,
        shift: bool = False,
        hidden: Tensor | None = None,
    ) -> BiasAlleviatingTerms:
        """The terms of one batch, for a plain loop: add `.total` to the task loss.

        Args:
            logits, teacher_logits: (batch, classes) or (batch, length, classes).
            labels: (batch, length) of sequences, -100 where no token counts; None counts all.
            progress: share of training that is done, for the schedules.
            shift: labels stand at the positions of the inputs, as in transformers: logits at t belong to the label at
                t + 1. False: they are aligned.
            hidden: inputs of the head, for its basis.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if shift:
            if labels is None:
                raise ValueError("BiasAlleviatingLoRA: shift needs labels, got None")
            teacher_logits = shifted(teacher_logits, labels)[0]
            hidden = None if hidden is None else hidden[:, :-1]
            logits, labels = shifted(logits, labels)
        valid = valid_labels(labels)
        if valid is not None and valid.shape != logits.shape[:-1]:
            raise ValueError(
                f"BiasAlleviatingLoRA: labels must have shape {tuple(logits.shape[:-1])}, got {tuple(valid.shape)}"
            )
        count = logits[..., 0].numel() if valid is None else int(valid.sum())
        parts = [_mean(self.consistency.term(logits, teacher_logits, valid), valid, count)]
        many = self.diversity.form == "topk_entropy" or count >= 2 or valid is None
        parts.append(_mean(self.diversity.term(logits, valid), valid, count) if many else parts[0].new_zeros(()))
        try:
            parts.append(self.concentration.term(logits, valid, hidden))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            self.concentration.failures += 1
            parts.append(parts[0].new_zeros(()))
        weights = [
            self.consistency.weight_by(teacher_logits, progress, valid),
            *(term.weight(progress) for term in self.terms[1:]),
        ]
        total = torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum()
        return BiasAlleviatingTerms(total, parts[0], parts[1], parts[2], count)

    def attach(self, model: nn.Module) -> nn.Module:
        if not _is_absent(self.consistency):
            self.consistency.attach(model)
        return model if _is_absent(self.concentration) else self.concentration.attach(model)

    def penalty(self, step: Step) -> list[Tensor] | None:
        found = [value for term in self.terms if (value := term.penalty(step)) is not None]
        return found or None

    def on_backward(self, step: Step) -> None:
        self.concentration.on_backward(step)

    def finish(self, model: nn.Module) -> nn.Module:
        return self.concentration.finish(model)


def _is_absent(term: LogitTerm) -> bool:
    return not isinstance(term.strength, Hyperparameter) and term.strength == 0


def _mean(values: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """Of a scalar itself; of rows over those that count, or over the batch."""
    if values.ndim == 0:
        return values
    if values.ndim == 2 and valid is not None:
        return torch.where(valid, values, 0.0).sum() / max(1, count)
    return values.mean()
