"""Early-learning regularization: does it end above tuned rivals under label noise, and does the linear theorem hold?

Problems: digits with 40, 60 and 80 % symmetric noise, digits mislabelled as people mislabel (no claim rests on
these), and the linear model of the paper's section 3, on which cross-entropy must memorise everything in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compose import Compose
from ..features import Dropout
from ..gradients import SharpnessAwareMinimization
from ..hyperparameter import value_of
from ..indexed_dataset import TensorLoader
from ..lab.study import Case, Condition, Seed, Study
from ..lab.trial import Setting, Trial, TrialResult
from ..losses import (
    EarlyLearning,
    EarlyLearningPlus,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    Mixup,
    SymmetricCrossEntropy,
    early_learning_penalty,
)
from ..losses.early_learning import updated_memory
from ..regularizer import Regularizer
from ..step import DivergenceError, Step
from .problems.noisy_digits import CLASSES, TRAIN, NoisyDigits, noisy_digits
from .training import accuracy, logits_of, multilayer_perceptron, train

if TYPE_CHECKING:
    from ..lab.study import Figure

RIVALS = ("ce", "ce_early_stop", "gce", "sce")
EVERYDAY = ("label_smoothing", "dropout", "mixup", "sam")
MEMORISED_AT_LEAST = 0.15
FALLS_BY_AT_LEAST = 2.0


class MemoryCrossEntropy(EarlyLearning):
    """Negative control: `-strength * sum_c t_c log p_c` with ELR's memory t, ordinary distillation of the past self."""

    def penalty(self, step: Step) -> Tensor:
        logits = step.logits
        assert step.index is not None
        memory = updated_memory(self.table.read(step.index), logits, self.momentum, self.clamp, self.eps)
        return -value_of(self.strength) * (memory * logits.log_softmax(-1)).sum(-1)


METHODS: Mapping[str, Callable[[Mapping[str, Any]], Regularizer | None]] = {
    "ce": lambda s: None,
    "gce": lambda s: GeneralizedCrossEntropy(s["q"]),
    "sce": lambda s: SymmetricCrossEntropy(alpha=s["alpha"], beta=1.0, log_zero=-4.0),
    "label_smoothing": lambda s: LabelSmoothing(s["smoothing"]),
    "dropout": lambda s: Dropout(s["p"]),
    "mixup": lambda s: Mixup(s["alpha"], num_classes=CLASSES),
    "sam": lambda s: SharpnessAwareMinimization(s["rho"]),
    "kl": lambda s: MemoryCrossEntropy(TRAIN, CLASSES, s["strength"], s["momentum"]),
    "elr": lambda s: EarlyLearning(TRAIN, CLASSES, s["strength"], s["momentum"]),
    "elr_plus": lambda s: EarlyLearningPlus(
        TRAIN, CLASSES, s["strength"], s["momentum"], s["alpha"], s["decay"], ramp_fraction=0.57
    ),
    # What is left of ELR+ with one network and no averaging.
    "one_network": lambda s: Compose(
        Mixup(s["alpha"], num_classes=CLASSES), EarlyLearning(TRAIN, CLASSES, s["strength"], s["momentum"])
    ),
}


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm on digits, or on the linear problem."""
    if trial.settings["problem"] == "linear":
        return _run_linear(trial.settings, trial.seed)
    settings, seed = trial.settings, trial.seed
    problem = noisy_digits(seed, float(settings["rate"]), settings["noise"])  # type: ignore[arg-type]
    watch = _Watch(problem, testing=trial.phase == "evaluate")
    method = METHODS[str(settings["loss"])](settings)
    train(
        multilayer_perceptron([64, 512, 512, CLASSES], seed),
        TensorLoader(problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed),
        settings,
        seed,
        method,
        on_epoch_end=watch,
    )
    metrics = watch.metrics()
    if trial.phase == "evaluate" and isinstance(method, (EarlyLearning, EarlyLearningPlus)):
        found = method.label_issues(problem.labels)
        right = float((found & problem.wrong).sum())
        metrics["issue_precision"] = right / max(1, int(found.sum()))
        metrics["issue_recall"] = right / max(1, int(problem.wrong.sum()))
    return TrialResult(metrics, watch.curves)


class _Watch:
    """Accuracies after every epoch. Nothing but the noisy validation labels decides anything."""

    def __init__(self, problem: NoisyDigits, testing: bool) -> None:
        self.problem, self.testing = problem, testing
        self.curves: dict[str, list[float]] = {"validation": []}
        if testing:
            self.curves |= {"test": [], "memorized": []}

    def __call__(self, step: Step, entry: dict[str, float]) -> None:
        problem = self.problem
        self._add("validation", accuracy(logits_of(step.model, problem.validation), problem.validation_labels))
        if self.testing:
            self._add("test", accuracy(logits_of(step.model, problem.test), problem.test_labels))
            wrong = problem.wrong
            # Memorised: a wrong label that the network predicts as given.
            self._add("memorized", accuracy(logits_of(step.model, problem.train[wrong]), problem.labels[wrong]))

    def _add(self, name: str, value: float) -> None:
        self.curves[name].append(value)

    def metrics(self) -> dict[str, float]:
        validation = self.curves["validation"]
        best = max(range(len(validation)), key=validation.__getitem__)  # the first of equals
        found = {"score": validation[-1], "score_early_stop": validation[best]}
        if self.testing:
            test = self.curves["test"]
            smoothed = [sum(test[i - 2 : i + 1]) / 3 for i in range(2, len(test))]
            found |= {
                "accuracy": test[-1],
                "accuracy_early_stop": test[best],
                "errors": round((1 - test[-1] / 100) * len(self.problem.test_labels)),
                "best_epoch_accuracy": max(test),
                "best_smoothed_accuracy": max(smoothed, default=test[-1]),
                "memorised": self.curves["memorized"][-1] / 100,
            }
        return found


# ── the linear model of section 3 ─────────────────────────────────────────────────────────────────────────────────
_EXAMPLES, _DIMENSIONS, _SPREAD, _FLIPPED, _STEP_SIZE = 130, 100, 0.2, 0.4, 0.5


def _run_linear(settings: Mapping[str, Setting], seed: int) -> TrialResult:
    """Gradient descent on a two-class mixture in high dimension; the three losses of one seed share everything."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction = F.normalize(normal(_DIMENSIONS), dim=0)
    truth = torch.randint(0, 2, (_EXAMPLES,), generator=generator)
    inputs = (2.0 * truth - 1)[:, None] * direction + _SPREAD * normal(_EXAMPLES, _DIMENSIONS)
    flips = torch.rand(_EXAMPLES, generator=generator) < _FLIPPED
    labels = torch.where(flips, 1 - truth, truth)
    weights = normal(_DIMENSIONS, 2)
    weights = (2.0 * weights / weights.norm()).requires_grad_()
    loss, strength, momentum = str(settings["loss"]), float(settings["strength"]), float(settings["momentum"])
    memory = inputs.new_zeros(_EXAMPLES, 2)
    curve: list[float] = []
    steps = int(settings["steps"])
    shown = {round(10 ** (i / 8)) for i in range(8 * 6)}  # evenly on a logarithmic axis
    places: list[float] = []
    for step in range(steps + 1):
        logits = inputs @ weights
        if step == steps or step < 100 or step in shown:
            curve.append(_share(logits.argmax(1)[flips] == truth[flips]))
            places.append(float(step))
        if step == steps:
            break
        objective = F.cross_entropy(logits, labels)
        if loss != "ce":
            memory = updated_memory(memory, logits, momentum)
            if loss == "elr":
                objective = objective + strength * early_learning_penalty(logits, memory).mean()
            else:
                objective = objective - strength * (memory * logits.log_softmax(-1)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(objective, weights)
        with torch.no_grad():
            weights -= _STEP_SIZE * gradient
    if not bool(weights.isfinite().all()):
        raise DivergenceError("linear problem: the weights left the finite numbers")
    metrics = {
        "truth_on_wrong": curve[-1],
        "start": curve[0],
        "peak": max(curve),
        "fitted": _share(logits.argmax(1) == labels),
    }
    return TrialResult(metrics, {"step": places, "truth_on_wrong": curve})


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _accuracy(seed: Seed, arm: str, suffix: str = "") -> float:
    early = arm == "ce_early_stop"
    return seed[arm + suffix]["accuracy_early_stop" if early else "accuracy"]


def _gains(rivals: Sequence[str], suffix: str = "") -> Callable[[Seed], dict[str, float]]:
    def gains(seed: Seed) -> dict[str, float]:
        own = _accuracy(seed, "elr", suffix)
        return {rival: own - _accuracy(seed, rival, suffix) for rival in rivals}

    return gains


def no_memorisation(seed: Seed) -> float:
    """What ELR's last epoch keeps of its best three-epoch mean, in points."""
    return seed["elr"]["accuracy"] - seed["elr"]["best_smoothed_accuracy"]


def linear_theorem(seed: Seed) -> dict[str, float]:
    """True-label accuracy on wrong-label points at the end: ELR's lead."""
    own = seed["elr_linear"]["truth_on_wrong"]
    return {rival: own - seed[f"{rival}_linear"]["truth_on_wrong"] for rival in ("ce", "kl")}


def elr_plus(seed: Seed) -> float:
    """Log ratio of the error rates of ELR and ELR+ at 80 % noise."""
    return math.log((seed["elr_80"]["errors"] + 0.5) / (seed["elr_plus_80"]["errors"] + 0.5))


def _mean(seeds: Sequence[Seed], arm: str, metric: str) -> float:
    return sum(seed[arm][metric] for seed in seeds) / len(seeds)


def _memorises(suffix: str) -> Callable[[Sequence[Seed]], list[Condition]]:
    def regime(seeds: Sequence[Seed]) -> list[Condition]:
        arm = f"ce_recipe{suffix}"
        memorised = _mean(seeds, arm, "memorised")
        fall = _mean(seeds, arm, "best_epoch_accuracy") - _mean(seeds, arm, "accuracy")
        return [
            Condition(
                "untuned cross-entropy memorises >= 15 % of the wrong labels",
                memorised,
                memorised >= MEMORISED_AT_LEAST,
            ),
            Condition("its best epoch lies >= 2 points above its last", fall, fall >= FALLS_BY_AT_LEAST),
        ]

    return regime


def early_learning_happens(seeds: Sequence[Seed]) -> list[Condition]:
    """On the linear problem cross-entropy first learns the truth, and in the end fits what it was given."""
    rise = _mean(seeds, "ce_linear", "peak") - _mean(seeds, "ce_linear", "start")
    fitted = _mean(seeds, "ce_linear", "fitted")
    return [
        Condition("cross-entropy's peak exceeds its start by >= 0.1", rise, rise >= 0.1),
        Condition("cross-entropy fits >= 99 % of the given labels at the end", fitted, fitted >= 0.99),
    ]


def gradient_cases() -> list[Case]:
    """Autograd of the stable form against lemma 2: g_c = p_c (<p, t> - t_c) / (1 - <p, t>)."""
    cases = []
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 10, 100):
        for number in range(200 // 3 + 1):
            strength = (1.0, 3.0, 7.0)[number % 3]
            logits = 3 * torch.randn(1, classes, generator=generator, dtype=torch.float64)
            memory = torch.randn(1, classes, generator=generator, dtype=torch.float64).softmax(-1) * 0.999
            label = int(torch.randint(0, classes, (), generator=generator))
            cases.append(
                _gradient_case(
                    f"{classes} classes, draw {number}, strength {strength:g}", logits, memory, label, strength
                )
            )
        saturated = torch.full((1, classes), -80.0, dtype=torch.float64)
        saturated[0, 0] = 80.0
        for held in (0, 1):
            memory = F.one_hot(torch.tensor([held]), classes).double()
            cases.append(
                _gradient_case(f"{classes} classes, logits +-80, memory on class {held}", saturated, memory, 1, 3.0)
            )
    return cases


def _gradient_case(name: str, logits: Tensor, memory: Tensor, label: int, strength: float) -> Case:
    z = logits.clone().requires_grad_()
    loss = F.cross_entropy(z, torch.tensor([label])) + strength * early_learning_penalty(z, memory, clamp=None).sum()
    (found,) = torch.autograd.grad(loss, z)
    p = logits.softmax(-1)
    # As p sums to 1: <p, t> - t_c = sum_k (t_k - t_c) p_k and 1 - <p, t> = sum_k (1 - t_k) p_k, without cancellation.
    g = p * ((memory[:, None, :] - memory[:, :, None]) * p[:, None, :]).sum(-1) / (p * (1 - memory)).sum()
    expected = p - F.one_hot(torch.tensor([label]), logits.shape[1]) + strength * g
    return Case(name, float((found - expected).abs().max()), 1e-12)


def figures(run_: Any) -> list[Figure]:
    """The theorem's picture, from the curves of the linear problem."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    names = {"ce_linear": "cross-entropy", "kl_linear": "KL to memory", "elr_linear": "ELR"}
    lines = {
        label: (run_.arms[arm].curves("step")[0], run_.arms[arm].curves("truth_on_wrong"))
        for arm, label in names.items()
        if run_.arms[arm].curves("step")
    }
    if not lines:
        return []
    drawn = line_plot(
        lines, "gradient step", "truth on wrong labels", "Accuracy on points with a wrong label", log_x=True
    )
    caption = (
        "Share of the points with a wrong label whose TRUE class the linear model predicts, by gradient step (mean and "
        "range over the seeds). Every loss learns the truth first; what follows is memorisation, or none."
    )
    return [Figure("The theorem: early learning, then memorisation", caption, drawn)]


STUDY = Study(
    slug="elr",
    run=run,
    estimands={
        "beats-loss-only": _gains(RIVALS),
        "no-memorisation": no_memorisation,
        "beats-everyday": _gains(EVERYDAY),
        "heavy-noise": _gains(RIVALS[1:], "_60"),
        "linear-theorem": linear_theorem,
        "elr-plus": elr_plus,
    },
    regimes={
        "beats-loss-only": _memorises(""),
        "no-memorisation": _memorises(""),
        "beats-everyday": _memorises(""),
        "heavy-noise": _memorises("_60"),
        "linear-theorem": early_learning_happens,
        "elr-plus": _memorises("_80"),
    },
    exact={"gradient": gradient_cases},
    headline=("accuracy", "test accuracy, points"),
    figures=figures,
)
