"""BA-LoRA: do three penalties on the logits help a low-rank adapter, or does the first of them, plain distillation, do it alone?

Problem: a perceptron pretrained on upright digits, a share p of whose labels is wrong, is adapted to rotated digits: few
examples, five rare classes, 15 % wrong labels. Upright digits would be no test: with a clean teacher the best adaptation
is not to move, and any term that ties the model to its teacher wins. Learning rate, weight decay and steps are tuned in
every arm at every p.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..batching import Batch
from ..fit import fit
from ..gradients.sharpness_aware import SharpnessAwareMinimization
from ..lab.study import Condition, Seed, Study
from ..lab.trial import Trial, TrialResult
from ..losses.adapter_teacher import StoredTeacher
from ..losses.bias_alleviating import BiasAlleviatingLoRA
from ..losses.label_smoothing import LabelSmoothing
from ..losses.logit_consistency import kl_consistency
from ..losses.logit_terms import LogitConsistency
from ..losses.mixup import Mixup
from ..losses.strength_schedule import cosine_decay
from ..regularizer import Regularizer
from ..step import DivergenceError
from ..weights.low_rank import add_low_rank, merge_low_rank
from ..weights.principal_adapter import adapter_start, scale_adapters, to_plain_adapter
from ..weights.weight_averaging import WeightAveraging
from .problems.bias_alleviating_cases import gauge_cases, inert_cases, zero_start_cases
from .problems.bias_alleviating_figures import drawn
from .problems.rotated_digits import CLASSES, RotatedDigits, corrupted, rotated_digits
from .training import logits_of, multilayer_perceptron

WIDTH, BATCH, RANK = 128, 64, 8
PRETRAINING_STEPS, PRETRAINING_RATE = 400, 2e-3
NOISE_SEED = 1_000_000
"""Added to the seed for the noise of the pretraining labels, which is another one for every rate p."""
LEARNS_BY, GAP, RARE_RECALL, TEACHERS_APART = 0.05, 0.15, 0.6, 0.10

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """What all arms of a (seed, p) share: the data, the pretrained model, and its logits for the adaptation examples."""

    problem: RotatedDigits
    model: nn.Module
    teacher: Tensor


def _trio(settings: Settings, start: Start, **options: Any) -> Regularizer:
    strengths = {name: settings.get(name, 0.0) for name in ("consistency", "diversity", "concentration")}
    return BiasAlleviatingLoRA("classification", teacher=StoredTeacher(start.teacher), **{**strengths, **options})


def _kl(settings: Settings, start: Start) -> Regularizer:
    return LogitConsistency(
        settings["consistency"],
        teacher=StoredTeacher(start.teacher),
        schedule="cosine" if settings["schedule"] == "published" else "constant",
    )


METHODS: Mapping[str, Callable[[Settings, Start], Regularizer | None]] = {
    "plain": lambda s, start: None,
    "trio": lambda s, start: _trio(s, start, schedules=s["schedule"]),
    "v5": lambda s, start: _trio(s, start, variant="v5"),
    "kl": _kl,
    "balanced": lambda s, start: None,
    "smoothing": lambda s, start: LabelSmoothing(s["smoothing"]),
    "mixup": lambda s, start: Mixup(s["alpha"], num_classes=CLASSES),
    "ema": lambda s, start: WeightAveraging(s["decay"]),
    "sam": lambda s, start: SharpnessAwareMinimization(s["rho"]),
    "wise": lambda s, start: None,
}


class FixedSteps:
    """Batches of one size for a given number of steps; every example comes once before one comes twice.

    Example:
        >>> loader = FixedSteps(torch.arange(5.0), torch.arange(5), steps=3, seed=0, batch=2)
        >>> [len(batch.targets) for batch in loader]
        [2, 2, 2]
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, steps: int, seed: int, weights: Tensor | None = None, batch: int = BATCH
    ) -> None:
        self.inputs, self.targets, self.weights = inputs, targets, weights
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(steps * batch / len(targets))
        order = torch.cat([torch.randperm(len(targets), generator=generator) for _ in range(passes)])
        self.order = order[: steps * batch].reshape(steps, batch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.order:
            weights = None if self.weights is None else self.weights[rows]
            yield Batch(self.inputs[rows], self.targets[rows], rows, weights)


def run(trial: Trial) -> TrialResult:
    """Adapt and measure one arm."""
    settings, seed = trial.settings, trial.seed
    sizes = int(settings.get("pretraining_steps", PRETRAINING_STEPS)), int(settings.get("width", WIDTH))
    start = pretrained(seed, float(settings["p"]), str(settings["source"]), *sizes)
    model = start.model if settings["method"] == "teacher" else adapted(start, settings, seed)
    return TrialResult(measured(model, start, trial.phase == "tune"))


@lru_cache(maxsize=8)
def pretrained(seed: int, p: float, source: str, steps: int = PRETRAINING_STEPS, width: int = WIDTH) -> Start:
    """The start of a (seed, p): the same for every arm, and a function of its arguments alone."""
    problem = rotated_digits(seed, source)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(NOISE_SEED + 1000 * round(100 * p) + seed)
    labels = corrupted(problem.upright_labels, p, noise)
    untrained = multilayer_perceptron([problem.upright.shape[1], width, width, CLASSES], seed)
    model = fit(
        untrained,
        FixedSteps(problem.upright, labels, steps, seed),
        epochs=1,
        optimizer=partial(torch.optim.AdamW, lr=PRETRAINING_RATE, fused=True),
        seed=seed,
    ).model.requires_grad_(False)
    return Start(problem, model, logits_of(model, problem.train))


def adapted(start: Start, settings: Settings, seed: int) -> nn.Module:
    """The model after low-rank adaptation by one arm, merged."""
    problem, method = start.problem, str(settings["method"])
    model = copy.deepcopy(start.model)
    init = str(settings["init"])
    add_low_rank(model, RANK, init=init, generator=torch.Generator().manual_seed(seed))
    before = adapter_start(model)
    weights = class_weights(problem.labels, float(settings["exponent"])) if method == "balanced" else None
    result = fit(
        model,
        FixedSteps(problem.train, problem.labels, int(settings["steps"]), seed, weights),
        epochs=1,
        regularizer=METHODS[method](settings, start),
        optimizer=partial(
            torch.optim.AdamW,
            lr=float(settings["learning_rate"]),
            weight_decay=float(settings["weight_decay"]),
            fused=True,
        ),
        scheduler=cosine,
        seed=seed,
    )
    if method == "wise":
        scale_adapters(to_plain_adapter(result.model, before), float(settings["share"]))
    return merge_low_rank(result.model)


def cosine(optimizer: torch.optim.Optimizer, total: int) -> LambdaLR:
    """The learning rate down to 0 along half a cosine."""
    return LambdaLR(optimizer, lambda step: cosine_decay(step / total, floor=0.0))


def class_weights(labels: Tensor, exponent: float) -> Tensor:
    """`n_c^-a` for each example, n_c the number of examples that carry its label; of mean 1.

    Example:
        >>> class_weights(torch.tensor([0, 0, 0, 1]), 1.0)
        tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    weights = torch.bincount(labels, minlength=CLASSES).double()[labels] ** -exponent
    return (weights / weights.mean()).float()


def measured(model: nn.Module, start: Start, tuning: bool) -> dict[str, float]:
    """Balanced accuracies. Tuning sees images that no evaluation uses, so that all of its block counts for the score."""
    problem = start.problem
    validation = logits_of(model, problem.validation)
    test = logits_of(model, problem.test)
    if not (validation.isfinite().all() and test.isfinite().all()):
        raise DivergenceError("ba-lora: the adapted model's logits are not finite")
    if tuning:
        logits, labels = torch.cat([validation, test]), torch.cat([problem.validation_labels, problem.test_labels])
        return {"score": float(recalls(logits, labels).mean())}
    recall = recalls(test, problem.test_labels)
    teacher = logits_of(start.model, problem.test)
    fitted = logits_of(model, problem.train).argmax(1) == problem.labels
    return {
        "score": float(recalls(validation, problem.validation_labels).mean()),
        "acc": float(recall.mean()),
        "min": float(recall[problem.minority].mean()),
        "maj": float(recall[~problem.minority].mean()),
        "kl": float(kl_consistency(test, teacher, temperature=1.0).mean()),
        "train_accuracy": float(fitted.double().mean()),
    }


def recalls(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions in each class, in [0, 1]."""
    right = labels[logits.argmax(1) == labels]
    counts = torch.bincount(labels, minlength=CLASSES).clamp(min=1)
    return torch.bincount(right, minlength=CLASSES).double() / counts


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def gains(*rivals: str) -> Callable[[Seed], dict[str, float]]:
    """Balanced accuracy of the trio minus each rival's, after pretraining with 30 % wrong labels."""
    return lambda seed: {rival: seed["trio_p30"]["acc"] - seed[f"{rival}_p30"]["acc"] for rival in rivals}


def minority(seed: Seed) -> float:
    """Log ratio of the minority recalls, trio over PiSSA, each raised by one point against zeros."""
    return math.log((seed["trio_p30"]["min"] + 0.01) / (seed["pissa_p30"]["min"] + 0.01))


def noisier(seed: Seed) -> float:
    """Gain over PiSSA at p = 0.6, minus the gain at p = 0."""
    return _over_pissa(seed, "p60") - _over_pissa(seed, "p00")


def _over_pissa(seed: Seed, level: str) -> float:
    return seed[f"trio_{level}"]["acc"] - seed[f"pissa_{level}"]["acc"]


def _mean(seeds: Sequence[Seed], arm: str, metric: str) -> float:
    return sum(seed[arm][metric] for seed in seeds) / len(seeds)


def adapting_pays_and_imbalance_bites(seeds: Sequence[Seed]) -> list[Condition]:
    """On plain LoRA and the teacher alone: moving helps, and rare classes suffer."""
    learned = _mean(seeds, "lora_p30", "acc") - _mean(seeds, "teacher_p30", "acc")
    gap = _mean(seeds, "lora_p30", "maj") - _mean(seeds, "lora_p30", "min")
    return [
        Condition("LoRA's accuracy exceeds the teacher's by >= 0.05", learned, learned >= LEARNS_BY),
        Condition("LoRA's recall of majority classes exceeds that of minority classes by >= 0.15", gap, gap >= GAP),
    ]


def minority_is_hard(seeds: Sequence[Seed]) -> list[Condition]:
    """On PiSSA alone: there is room for better recall of rare classes."""
    recall = _mean(seeds, "pissa_p30", "min")
    return [Condition("PiSSA's minority recall is <= 0.6", recall, recall <= RARE_RECALL)]


def noise_harms_the_teacher(seeds: Sequence[Seed]) -> list[Condition]:
    """On the teachers alone: noisy pretraining made a worse one."""
    fall = _mean(seeds, "teacher_p00", "acc") - _mean(seeds, "teacher_p60", "acc")
    return [Condition("the teacher's accuracy falls by >= 0.10 from p = 0 to p = 0.6", fall, fall >= TEACHERS_APART)]


_regime = adapting_pays_and_imbalance_bites

STUDY = Study(
    slug="ba-lora",
    run=run,
    estimands={
        "trio": gains("lora", "pissa"),
        "beyond_kl": gains("pissa_kl"),
        "each_term": gains("trio_no_cr", "trio_no_dr", "trio_no_svd"),
        "minority": minority,
        "noisier": noisier,
    },
    regimes={
        "trio": _regime,
        "beyond_kl": _regime,
        "each_term": _regime,
        "minority": minority_is_hard,
        "noisier": noise_harms_the_teacher,
    },
    exact={"zero_start": zero_start_cases, "inert_svd": inert_cases, "gauge": gauge_cases},
    headline=("acc", "balanced test accuracy"),
    needs=("mnist",),
    figures=drawn,
)
