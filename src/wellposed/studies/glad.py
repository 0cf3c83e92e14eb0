"""Sharpness-referenced gradients for few-shot tuning (GLAD): more than early stopping, interpolation and SAM give?

Problem: a pair of small towers, pre-trained on compositional classes, gets low-rank adapters and four shots of twenty base
classes; what counts is the harmonic mean of accuracies on base and on novel classes. Steps are tuned in every arm, because
stopping early is the cheapest cure of the same disease. The authors' rule is not published: a family of rules stands for it.
Beside it, in a group of its own and not judged: the same on pre-trained networks, a stand-in for a vision-language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..compose import Compose
from ..fit import fit
from ..gradients.sharpness_steering import RegularizedGradient
from ..lab.protocol import Protocol
from ..lab.study import Condition, Seed, Study
from ..lab.trial import Trial, TrialResult
from ..losses import LabelSmoothing
from ..regularizer import Regularizer
from ..step import DivergenceError, Step
from ..weights import WeightAveraging
from ..weights.low_rank import LowRankLinear, add_low_rank
from .problems.gradient_rule_cases import identity_cases
from .problems.paired_towers import (
    FewShotTask,
    PairedTowers,
    StepLoader,
    compositional_task,
    harmonic_mean,
    share_right,
)
from .problems.vision_language_stand_in import require_packages, stand_in_task

if TYPE_CHECKING:
    from ..lab.study import Figure

RANK, ALPHA, BATCH = 4, 8.0, 32
WATCHED = (20, 40, 80, 120, 150)
FITTED_AT_LEAST, FALLS_BY, GAINS, PROMPT_GAINS, FORGETS = 0.99, 0.02, 0.03, 0.01, 0.02

METHODS: Mapping[str, Callable[[Mapping[str, Any]], Regularizer | None]] = {
    "zero_shot": lambda s: None,
    "lora": lambda s: None,
    "prompt": lambda s: None,
    "ema": lambda s: WeightAveraging(s["decay"]),
    "smoothing": lambda s: LabelSmoothing(s["smoothing"]),
    "rule": lambda s: RegularizedGradient(s["rho"], s["rule"], s.get("lam", 0.5), sagm_alpha=s.get("sagm_alpha", 1e-3)),
}


def run(trial: Trial) -> TrialResult:
    """Tune the towers of one seed by one arm, and measure."""
    settings, evaluating = trial.settings, trial.phase == "evaluate"
    task = problem(settings, trial.seed)
    watch = Watch(task) if evaluating and settings.get("watch") else None
    model, history = tuned(task, settings, trial.seed, watch)
    metrics = measured(model, task, ("base", "novel"))
    if not evaluating:
        return TrialResult({"score": metrics["hm"]})
    metrics |= measured(model, task, [name for name in task.tests if name not in metrics])
    with torch.no_grad():
        right = model.eval()(task.images).argmax(1) == task.labels
    metrics |= {"train_accuracy": float(right.double().mean()), "score": metrics["hm"]}
    metrics |= {name: history[f"gradient_{name}"] for name in ("cosine", "conflict") if f"gradient_{name}" in history}
    return TrialResult(metrics | (watch.found if watch is not None else {}))


def problem(settings: Mapping[str, Any], seed: int) -> FewShotTask:
    """The compositional images, or the stand-in for a vision-language model."""
    tests = int(settings.get("test_images", 4000))
    if settings["problem"] == "stand_in":
        return stand_in_task(seed, str(settings.get("features", "pretrained")), min(tests, 2000))
    return compositional_task(seed, int(settings.get("pretraining_steps", 500)), tests)


def tuned(
    task: FewShotTask, settings: Mapping[str, Any], seed: int, watch: Regularizer | None = None
) -> tuple[PairedTowers, dict[str, float]]:
    """A copy of the task's towers, tuned on its shots, and what training logged."""
    model, method = task.towers.among(task.towers.candidates), str(settings["method"])
    if method == "zero_shot":
        return model, {}
    if method == "prompt":
        model.add_prompt()
    else:
        generator = torch.Generator().manual_seed(seed)
        add_low_rank(model, RANK, ALPHA, dropout=float(settings.get("dropout", 0.0)), generator=generator)
    parts = [part for part in (METHODS[method](settings), watch) if part is not None]
    rate, decay = float(settings["learning_rate"]), float(settings["weight_decay"])
    result = fit(
        model,
        StepLoader(task.images, task.labels, BATCH, int(settings["steps"]), seed),
        epochs=1,
        regularizer=Compose(*parts),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=decay, foreach=True),
        scheduler=cosine,
        seed=seed,
    )
    interpolate(model, float(settings.get("share", 1.0)))
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise DivergenceError("glad: the tuned parameters are not finite")
    return model, result.history[-1]


def cosine(optimizer: Optimizer, total: int) -> CosineAnnealingLR:
    """To zero at the last step."""
    return CosineAnnealingLR(optimizer, total)


def interpolate(model: nn.Module, share: float) -> None:
    """WiSE (Wortsman et al. 2022, arXiv 2109.01903) for adapters: weights between the pre-trained (0) and the tuned (1)."""
    for part in model.modules():
        if isinstance(part, LowRankLinear):
            part.scaling *= share


def measured(model: PairedTowers, task: FewShotTask, names: Sequence[str]) -> dict[str, float]:
    """Accuracies on test sets, and the harmonic mean of base and novel where both are asked for."""
    found = {name: share_right(model, task.tests[name]) for name in names}
    if "base" in found and "novel" in found:
        found["hm"] = harmonic_mean(found["base"], found["novel"])
    return found


class Watch(Regularizer):
    """The harmonic mean along training, at the steps of `WATCHED`."""

    def __init__(self, task: FewShotTask) -> None:
        super().__init__()
        self.task = task
        self.found: dict[str, float] = {}

    def on_step(self, step: Step) -> None:
        number = step.number + 1
        if number in WATCHED or number == step.total:
            assert isinstance(step.model, PairedTowers)
            # The last step counts as the last of the list: at smoke scale there are fewer.
            name = WATCHED[-1] if number == step.total else number
            self.found[f"hm_{name}"] = measured(step.model, self.task, ("base", "novel"))["hm"]
            step.model.train()


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _lead(metric: str, own: str, rivals: Sequence[str]) -> Callable[[Seed], dict[str, float] | float]:
    """Difference of a metric: one number against one rival, else one a rival."""

    def lead(seed: Seed) -> dict[str, float] | float:
        found = {rival: seed[own][metric] - seed[rival][metric] for rival in rivals}
        return found if len(rivals) > 1 else found[rivals[0]]

    return lead


def _mean(seeds: Sequence[Seed], arm: str, metric: str) -> float:
    return sum(seed[arm][metric] for seed in seeds) / len(seeds)


def overfits(seeds: Sequence[Seed]) -> list[Condition]:
    """The regime: plain LoRA trained long fits its shots and falls behind its own past, and tuned LoRA is worth having."""
    names = [f"hm_{number}" for number in WATCHED]
    present = [name for name in names if all(name in seed["lora_long"] for seed in seeds)]
    curve = [_mean(seeds, "lora_long", name) for name in present]
    fitted, falls = _mean(seeds, "lora_long", "train_accuracy"), max(curve) - curve[-1]
    gains = _mean(seeds, "lora", "hm") - _mean(seeds, "zero_shot", "hm")
    return [
        Condition("LoRA trained long has a training accuracy >= 0.99", fitted, fitted >= FITTED_AT_LEAST),
        Condition("it ends >= 0.02 of HM below its best on the way", falls, falls >= FALLS_BY),
        Condition("tuned LoRA gains >= 0.03 of HM over no tuning", gains, gains >= GAINS),
    ]


def forgets(seeds: Sequence[Seed]) -> list[Condition]:
    """Tuning plain LoRA costs accuracy in the other domain."""
    lost = _mean(seeds, "zero_shot", "d2") - _mean(seeds, "lora", "d2")
    return [Condition("tuned LoRA loses >= 0.02 of accuracy in domain 2", lost, lost >= FORGETS)]


def prompt_learns(seeds: Sequence[Seed]) -> list[Condition]:
    """The prompt is worth having."""
    gains = _mean(seeds, "prompt", "hm") - _mean(seeds, "zero_shot", "hm")
    return [Condition("the prompt gains >= 0.01 of HM over no tuning", gains, gains >= PROMPT_GAINS)]


def prepare(protocol: Protocol) -> None:
    """Look for the packages of the stand-in before any training."""
    if any(arm.fixed.get("problem") == "stand_in" for arm in protocol.arms.values()):
        require_packages()


def figures(run_: Any) -> list[Figure]:
    """Where tuned and long arms end between base and novel classes, and when plain LoRA begins to fall."""
    from .problems.generalization_figures import drawn

    return drawn(run_)


STUDY = Study(
    slug="glad",
    run=run,
    estimands={
        "hm": _lead("hm", "glad", ["lora"]),
        "long": _lead("hm", "mix_long", ["lora_long"]),
        "rivals": _lead("hm", "glad", ["sam", "lora_wise", "lora_ema"]),
        "domain": _lead("d2", "glad", ["lora"]),
        "lora_prompt": _lead("hm", "lora", ["prompt"]),
    },
    regimes={"hm": overfits, "long": overfits, "rivals": overfits, "domain": forgets, "lora_prompt": prompt_learns},
    exact={"identities": identity_cases},
    headline=("hm", "harmonic mean of base and novel accuracy"),
    needs=("fashion-mnist",),
    prepare=prepare,
    figures=figures,
)
