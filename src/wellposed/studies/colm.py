"""Mini-batch coresets (CoLM): do 64 examples chosen from 128 train better than 128 or 256 at random, and why?

Problem: ten sources of very different sizes. Keeping all examples of the small ones doubles their share of the batch, so
the control keeps them, too, takes as many of each large source as CoLM, and picks these at random: what it reaches is
re-weighting, what lies above it is choosing. With inverse-probability weights the re-weighting goes, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..batching import unwrap
from ..fit import fit
from ..gradients.last_layer_gradient import take
from ..gradients.mini_batch_coreset import MiniBatchCoreset
from ..gradients.source_shares import small_sources
from ..indexed_dataset import epoch_seed
from ..lab.study import Condition, Seed, Study
from ..lab.trial import Trial, TrialResult
from ..objective import cross_entropy
from ..regularizer import Regularizer
from ..step import DivergenceError, Step
from ..weights import WeightAveraging
from .problems.coreset_cases import greedy_cases, one_direction_cases
from .problems.source_mixture import BIG, CLASSES, FEATURES, SIZES, Mixture, Pools, source_mixture
from .training import logits_of, multilayer_perceptron

if TYPE_CHECKING:
    from ..lab.study import Figure

HIDDEN = 48
POOL = 128
TRAININGS = 3
WORST = 0.1
MEASURED_EVERY = 30
LARGER_HELPS, SHARE_LOW, SHARE_HIGH, SMALL_BEHIND = 0.01, 0.20, 0.35, 0.05

BIG_SOURCES, SMALL_SOURCES = range(BIG), range(BIG, len(SIZES))


class HighestLoss(Regularizer):
    """Trains on the half of the pool with the highest losses."""

    def on_batch(self, step: Step) -> None:
        size = len(step.targets)
        with torch.no_grad():
            losses = cross_entropy(step.forward(grad=False, training=False), step.targets)
        rows = losses.topk(size // 2).indices.sort().values
        values = (step.inputs, step.targets, step.index, step.extra)
        step.inputs, step.targets, step.index, step.extra = take(values, size, rows)


class MeasuredSelection(Regularizer):
    """A selection, and now and then how far its batch's gradient lies from the pool's."""

    def __init__(self, selection: Regularizer) -> None:
        super().__init__()
        self.selection = selection
        self.errors: list[float] = []

    def on_batch(self, step: Step) -> None:
        pool = step.inputs, step.targets
        self.selection.on_batch(step)
        if step.number % MEASURED_EVERY == 0:
            whole = _mean_gradient(step.model, *pool, None)
            chosen = _mean_gradient(step.model, step.inputs, step.targets, step.weights)
            self.errors.append(float((chosen - whole).norm() / whole.norm()))

    def on_step(self, step: Step) -> None:
        self.selection.on_step(step)


def _mean_gradient(model: nn.Module, inputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    losses = cross_entropy(model(inputs), targets)
    mean = losses.mean() if weights is None else (losses * weights).mean()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(mean, list(model.parameters()))])


def coreset(settings: Mapping[str, Any], mixture: Mixture, seed: int, **options: Any) -> MiniBatchCoreset:
    """The paper's setting but for `options`: one fixed direction, small sources kept, Adam's normalisation, l1."""
    chosen: dict[str, Any] = {
        "small_sources": small_sources(mixture.source), "feature": "zo", "fixed_z": True, "seed": seed,
    }  # fmt: skip
    return MiniBatchCoreset(0.5, topk=int(settings.get("topk", 120)), **{**chosen, **options})


METHODS: Mapping[str, Callable[[Mapping[str, Any], Mixture, int], Regularizer | None]] = {
    "random": lambda s, mixture, seed: None,
    "ema": lambda s, mixture, seed: WeightAveraging(float(s["decay"])),
    "keep_random": partial(coreset, ranking="random"),
    "keep_random_unbiased": partial(coreset, ranking="random", weights="unbiased"),
    "colm": coreset,
    "colm_m16": partial(coreset, n_directions=16, fixed_z=False),
    "colm_exact": partial(coreset, feature="last_layer_grad"),
    "colm_no_keep": partial(coreset, small_sources=()),
    "colm_no_adam": partial(coreset, adam=False),
    "colm_cluster": partial(coreset, weights="cluster"),
    "top_loss": lambda s, mixture, seed: HighestLoss(),
}


def run(trial: Trial) -> TrialResult:
    """Train one arm, three times in the evaluation, and measure it source by source."""
    settings, testing = trial.settings, trial.phase == "evaluate"
    mixture = source_mixture(trial.seed, float(settings.get("scale", 1.0)))
    found = [
        trained(mixture, settings, epoch_seed(trial.seed, 1 + number) % 2**31, testing)
        for number in range(int(settings.get("trainings", TRAININGS)) if testing else 1)
    ]
    accuracies = torch.stack([accuracy for accuracy, _ in found]).mean(0)
    macro = float(accuracies.mean())
    if not testing:
        return TrialResult({"score": macro})
    shares = mixture.shares
    metrics = {
        "score": macro,
        "macro": macro,
        "big": float(accuracies[:BIG].mean()),
        "small": float(accuracies[BIG:].mean()),
        "nat": float((shares * accuracies).sum()),
        "small_share": float(shares[BIG:].sum()),
    }
    errors = [error for _, listed in found for error in listed]
    if errors:
        metrics["gradient_error"] = sum(errors) / len(errors)
    return TrialResult(metrics, {"by_source": accuracies.tolist()})


def trained(mixture: Mixture, settings: Mapping[str, Any], seed: int, testing: bool) -> tuple[Tensor, list[float]]:
    """Accuracy on each source after one training, and the gradient errors met; 0.1 everywhere if it diverged."""
    method = METHODS[str(settings["method"])](settings, mixture, seed)
    if testing and method is not None and "on_batch" in method.acts_in:
        method = MeasuredSelection(method)
    try:
        model = fit(
            multilayer_perceptron([FEATURES, HIDDEN, CLASSES], seed),
            Pools(mixture, int(settings["pool"]), int(settings["steps"]), seed),
            epochs=1,
            regularizer=method,
            optimizer=partial(
                torch.optim.AdamW, lr=float(settings["lr"]), weight_decay=float(settings["weight_decay"]), foreach=True
            ),
            scheduler=_cosine,
            seed=seed,
        ).model
    except DivergenceError:
        return torch.full((len(SIZES),), WORST, dtype=torch.float64), []
    inputs, labels = (mixture.test, mixture.test_labels) if testing else (mixture.validation, mixture.validation_labels)
    logits = logits_of(unwrap(model), inputs.flatten(0, 1), 1 << 15).reshape(*labels.shape, CLASSES)
    if not bool(torch.isfinite(logits).all()):
        return torch.full((len(SIZES),), WORST, dtype=torch.float64), []
    return (logits.argmax(2) == labels).double().mean(1), getattr(method, "errors", [])


def _cosine(optimizer: Optimizer, total: int) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, total)


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _lead(metric: str, own: str, *rivals: str) -> Callable[[Seed], dict[str, float] | float]:
    """Difference of an accuracy: one number against one rival, else one a rival."""

    def lead(seed: Seed) -> dict[str, float] | float:
        found = {rival: seed[own][metric] - seed[rival][metric] for rival in rivals}
        return found if len(rivals) > 1 else found[rivals[0]]

    return lead


def keep_small(seed: Seed) -> float:
    """Log ratio of macro accuracies with and without keeping the small sources."""
    return math.log(seed["colm"]["macro"] / seed["colm-no-keep"]["macro"])


def _mean(seeds: Sequence[Seed], arm: str, metric: str) -> float:
    return sum(seed[arm][metric] for seed in seeds) / len(seeds)


def larger_batches_help(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime: a batch of 256 is better than one of 64 here, and small sources are as rare as in MathInstruct."""
    gain = _mean(seeds, "random-256", "macro") - _mean(seeds, "random-64", "macro")
    share = _mean(seeds, "random-64", "small_share")
    return [
        Condition("larger batches help: macro(random-256) - macro(random-64) >= 0.01", gain, gain >= LARGER_HELPS),
        Condition("small sources hold 20 to 35 % of the pool", share, SHARE_LOW <= share <= SHARE_HIGH),
    ]


def small_sources_lag(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime: under small random batches the small sources are worse off."""
    gap = _mean(seeds, "random-64", "big") - _mean(seeds, "random-64", "small")
    text = "accuracy of random-64 on small sources at least 0.05 below that on big ones"
    return [Condition(text, gap, gap >= SMALL_BEHIND)]


def figures(run_: Any) -> list[Figure]:
    """What keeping the small sources moves: accuracy source by source."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    arms = {
        "colm": "CoLM", "random-128": "random, 128", "keep-random": "small sources kept, rest at random",
        "random-256": "random, 256", "keep-random-unbiased": "the same, unbiased weights",
    }  # fmt: skip
    lines = {}
    for arm, label in arms.items():
        if found := run_.arms[arm].curves("by_source"):
            lines[label] = (SIZES, found)
    if not lines:
        return []
    title = "Test accuracy by size of the source"
    svg = line_plot(lines, "training examples of the source", "test accuracy", title, log_x=True)
    caption = (
        "Mean and range over the seeds. Where CoLM's line lies on that of random picks with the same number of examples of "
        "each source, choosing does nothing. With unbiased weights the re-weighting towards small sources is taken back."
    )
    return [Figure("Choosing, or re-weighting?", caption, svg)]


STUDY = Study(
    slug="colm",
    run=run,
    estimands={
        "larger_batches": _lead("macro", "colm", "random-128", "random-256"),
        "ranking": _lead("macro", "colm", "keep-random"),
        "exact_ranking": _lead("macro", "colm-exact", "keep-random"),
        "keep_small": keep_small,
        "natural_mixture": _lead("nat", "colm", "random-128"),
        "equal_compute": _lead("macro", "colm", "random-64-long"),
    },
    regimes={
        "keep_small": small_sources_lag,
        **dict.fromkeys(
            ("larger_batches", "ranking", "exact_ranking", "natural_mixture", "equal_compute"), larger_batches_help
        ),
    },
    exact={"one_direction": one_direction_cases, "greedy": greedy_cases},
    headline=("macro", "accuracy, mean of ten sources"),
    figures=figures,
)
