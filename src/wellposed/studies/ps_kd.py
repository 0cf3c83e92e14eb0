"""Progressive self-distillation: better confidences than tuned cross-entropy and label smoothing, or only tamer ones?

Problem: letter recognition, 1500 examples to train, a network that fits all of them and is over-confident. Weight decay is
tuned in every arm, because it lowers the likelihood on test data as well; temperature scaling and early stopping are the
cheap ways to the same end, and constant alpha shows what the growing share of the past is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compose import Compose
from ..features import Dropout
from ..indexed_dataset import TensorLoader
from ..lab.study import Condition, Seed, Study
from ..lab.trial import Setting, Trial, TrialResult
from ..losses import LabelSmoothing, Mixup, ProgressiveSelfDistillation, doubt, hard_example_shift
from ..losses.progressive_share import scheduled
from ..metrics import (
    area_under_risk_coverage,
    expected_calibration_error,
    negative_log_likelihood,
    optimal_temperature,
)
from ..regularizer import Regularizer
from ..step import DivergenceError, Step
from .problems.letters import SIZES, Split, hierarchical_mixture, letters
from .training import accuracy, logits_of, train

if TYPE_CHECKING:
    from ..lab.study import Figure

HIDDEN = 256
JITTER = 0.1
FIRST_EPOCH = 5
"""First epoch (from 1) of the share difference: hardness is ranked on the epochs four to two before."""

FITTED_AT_LEAST, ERROR_AT_LEAST, OVERCONFIDENT_BY = 99.0, 10.0, 2.0


class ConfidencePenalty(Regularizer):
    """`-strength * entropy(prediction)`, added to cross-entropy (Pereyra et al. 2017, arXiv 1701.06548)."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def penalty(self, step: Step) -> Tensor:
        log_p = step.logits.log_softmax(-1)
        return self.strength * (log_p.exp() * log_p).sum(-1)


METHODS: Mapping[str, Callable[[Mapping[str, Any], Split], Regularizer | None]] = {
    "ce": lambda s, p: None,
    "label_smoothing": lambda s, p: LabelSmoothing(s["smoothing"]),
    "ps_kd": lambda s, p: ProgressiveSelfDistillation(len(p.labels), p.classes, s["alpha"]),
    "constant_alpha": lambda s, p: ProgressiveSelfDistillation(
        len(p.labels), p.classes, s["alpha"], schedule="constant"
    ),
    "confidence_penalty": lambda s, p: ConfidencePenalty(s["strength"]),
    "mixup": lambda s, p: Mixup(s["alpha"], num_classes=p.classes),
    "dropout": lambda s, p: Dropout(s["p"]),
}


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm."""
    settings, seed = trial.settings, trial.seed
    problem = draw_problem(settings, seed)
    method = METHODS[str(settings["loss"])](settings, problem)
    testing = trial.phase == "evaluate"
    doubts = DoubtRecord(problem.labels) if testing and settings["loss"] == "ps_kd" else None
    parts = [part for part in (method, doubts) if part is not None]
    watch = Watch(problem, testing)
    loader = TensorLoader(
        problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed, transform=_jittered
    )  # fmt: skip
    model = train(
        network(problem.train.shape[1], problem.classes, seed), loader, settings, seed, Compose(*parts),
        nesterov=True, on_epoch_end=watch,
    ).model  # fmt: skip
    metrics = watch.metrics(model)
    if doubts is not None:
        shifts = doubts.shifts(float(settings["alpha"]))
        watch.curves["shift"] = shifts
        metrics["share_difference"] = sum(shifts) / max(1, len(shifts))
    return TrialResult(metrics, watch.curves)


def draw_problem(settings: Mapping[str, Setting], seed: int) -> Split:
    """The letters, or at smoke scale the mixture, which needs no package."""
    names = ("train_size", "validation_size", "test_size")
    train_size, validation, test = (int(settings.get(name, n)) for name, n in zip(names, SIZES, strict=True))
    draw = {"letter": letters, "mixture": hierarchical_mixture}[str(settings["problem"])]
    return draw(seed, (train_size, validation, test))


def network(features: int, classes: int, seed: int) -> nn.Module:
    """Two hidden layers with batch normalization, initialised from `seed`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        hidden = [[nn.Linear(n, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()] for n in (features, HIDDEN)]
        return nn.Sequential(*hidden[0], *hidden[1], nn.Linear(HIDDEN, classes))


def _jittered(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh noise at every visit: without it the network would fit its own targets, and they would stay one-hot."""
    return inputs + JITTER * torch.randn(inputs.shape, generator=generator)


class Watch:
    """Validation likelihood after every epoch, and the weights of the epoch at which it was best."""

    def __init__(self, problem: Split, testing: bool) -> None:
        self.problem, self.testing = problem, testing
        self.curves: dict[str, list[float]] = {"validation_nll": []}
        self.best: dict[str, Tensor] = {}

    def __call__(self, step: Step, entry: dict[str, float]) -> None:
        problem, curve = self.problem, self.curves["validation_nll"]
        nll = float(negative_log_likelihood(logits_of(step.model, problem.validation), problem.validation_labels))
        if not math.isfinite(nll):
            raise DivergenceError(f"ps-kd: the validation likelihood of epoch {len(curve) + 1} is {nll}")
        if self.testing and nll < min(curve, default=math.inf):
            self.best = {name: value.clone() for name, value in step.model.state_dict().items()}
        curve.append(nll)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Scores on validation data; while testing also everything on test data."""
        problem, curve = self.problem, self.curves["validation_nll"]
        validation = logits_of(model, problem.validation)
        temperature = optimal_temperature(validation, problem.validation_labels)
        tempered = float(negative_log_likelihood(validation / temperature, problem.validation_labels))
        found = {"score": -curve[-1], "score_early_stop": -min(curve), "score_temperature": -tempered}
        if not self.testing:
            return found
        labels, logits = problem.test_labels, logits_of(model, problem.test)
        right = accuracy(logits, labels)
        wrong = int((logits.argmax(1) != labels).sum())
        found |= {
            "nll": float(negative_log_likelihood(logits, labels)),
            "error": (wrong + 0.5) / (len(labels) + 1),
            "aurc": float(area_under_risk_coverage(logits, labels)),
            "ece": float(expected_calibration_error(logits, labels, num_bins=10)),
            "accuracy": right,
            "overconfidence": 100.0 * float(logits.softmax(1).amax(1).double().mean()) - right,
            "train_accuracy": accuracy(logits_of(model, problem.train), problem.labels),
            "temperature": float(temperature),
            "nll_temperature": float(negative_log_likelihood(logits / temperature, labels)),
        }
        model.load_state_dict(self.best)
        return {**found, "nll_early_stop": float(negative_log_likelihood(logits_of(model, problem.test), labels))}


class DoubtRecord(Regularizer):
    """`1 - p(label)` of every training example at its visit in every epoch."""

    requires = frozenset({"index"})

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels = labels
        self.gamma: list[Tensor] = []

    def on_epoch(self, step: Step) -> None:
        if not step.finished:
            self.gamma.append(torch.full((len(self.labels),), math.nan))

    def on_backward(self, step: Step) -> None:
        assert step.index is not None
        # The labels themselves: the step's targets have been softened.
        self.gamma[-1][step.index] = doubt(step.logits, self.labels[step.index])

    def shifts(self, alpha: float) -> list[float]:
        """The share difference of each epoch from `FIRST_EPOCH` to the middle of training."""
        epochs, found = len(self.gamma), []
        gamma = [g.double() for g in self.gamma]
        for epoch in range(FIRST_EPOCH - 1, epochs // 2):
            share = scheduled(alpha, "epoch", epoch, epochs)
            hardness = torch.stack(gamma[epoch - 4 : epoch - 1]).mean(0)
            found.append(float(hard_example_shift(gamma[epoch], gamma[epoch - 1], share, hardness)))
        return found


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _log_ratio(other: float, own: float) -> float:
    return math.log(max(other, 1e-12) / max(own, 1e-12))


def _gains(metric: str, rivals: Mapping[str, str], own: str = "ps_kd") -> Callable[[Seed], dict[str, float]]:
    """ln(rival / PS-KD) for each rival and the name of its metric: positive where PS-KD's is smaller."""

    def gains(seed: Seed) -> dict[str, float]:
        return {arm: _log_ratio(seed[arm][name], seed[own][metric]) for arm, name in rivals.items()}

    return gains


def hard_examples(seed: Seed) -> float:
    """Mean share difference of the hardest tenth under the paper's recipe."""
    return seed["ps_kd_recipe"]["share_difference"]


def fits_and_is_overconfident(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime R: plain cross-entropy under the recipe fits what it trains on, errs on the rest, and is too sure."""

    def mean(metric: str) -> float:
        return sum(seed["ce_recipe"][metric] for seed in seeds) / len(seeds)

    fitted, error, excess = mean("train_accuracy"), 100.0 - mean("accuracy"), mean("overconfidence")
    return [
        Condition("cross-entropy fits >= 99 % of the training examples", fitted, fitted >= FITTED_AT_LEAST),
        Condition("its test error is >= 10 %", error, error >= ERROR_AT_LEAST),
        Condition("its mean confidence exceeds its accuracy by >= 2 points", excess, excess >= OVERCONFIDENT_BY),
    ]


def figures(run_: Any) -> list[Figure]:
    """Where over-confidence comes in, and how little the gradient moves."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    arms = {"ce_recipe": "cross-entropy", "label_smoothing_recipe": "label smoothing", "ps_kd_recipe": "PS-KD"}
    curves = {label: run_.arms[arm].curves("validation_nll") for arm, label in arms.items()}
    lines = {label: (range(1, len(found[0]) + 1), found) for label, found in curves.items() if found}
    drawn = []
    if lines:
        svg = line_plot(lines, "epoch", "validation NLL, nats", "Negative log-likelihood on validation data by epoch")
        caption = "One recipe for all (mean and range over the seeds). The learning rate is cut at a half and at three quarters."
        drawn.append(Figure("When confidences go wrong", caption, svg))
    shifts = [shift for shift in run_.arms["ps_kd_recipe"].curves("shift") if shift]
    if shifts:
        places = range(FIRST_EPOCH, FIRST_EPOCH + len(shifts[0]))
        svg = line_plot(
            {"PS-KD": (places, shifts)}, "epoch", "share difference", "Shift of gradient to hard examples by epoch"
        )
        caption = (
            "Share of the hardest tenth in the push on the true class, minus its share under cross-entropy at the same "
            "outputs. Hardness is ranked on earlier epochs; ranked on the present one, chance alone would show a shift."
        )
        drawn.append(Figure("Do hard examples get more of the gradient?", caption, svg))
    return drawn


_TWO = ("ce", "label_smoothing")

STUDY = Study(
    slug="ps-kd",
    run=run,
    estimands={
        "nll": _gains("nll", dict.fromkeys(_TWO, "nll")),
        "nll-recipe": _gains("nll", {f"{arm}_recipe": "nll" for arm in _TWO}, own="ps_kd_recipe"),
        "error": _gains("error", dict.fromkeys(_TWO, "error")),
        "ranking": _gains("aurc", {"ce": "aurc"}),
        "beyond-post-hoc": _gains("nll", {"ce_temperature": "nll_temperature", "ce_early_stop": "nll_early_stop"}),
        "progressive": _gains("nll", {"constant_alpha": "nll"}),
        "hard-examples": hard_examples,
    },
    regimes=dict.fromkeys(
        ("nll", "nll-recipe", "error", "ranking", "beyond-post-hoc", "progressive", "hard-examples"),
        fits_and_is_overconfident,
    ),
    headline=("nll", "test negative log-likelihood, nats"),
    needs=("letter",),
    figures=figures,
)
