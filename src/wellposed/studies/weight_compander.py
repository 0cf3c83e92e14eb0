"""Weight compander: does the bounded reparameterisation help beside tuned weight decay, and is it more than a step size?

Problem: 400 handwritten digits under fixed pixel noise, a small convolutional network with BatchNorm and dropout, and
weight decay on the weights of convolutions and linear layers in every arm. The control that the paper lacks is the
linear compander: it has the compander's slope a/b, and so its learning rate (a/b)^2, without its bound.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..batching import unwrap
from ..compose import Compose
from ..indexed_dataset import TensorLoader
from ..lab.study import Case, Condition, Seed, Study
from ..lab.trial import Setting, Trial, TrialResult
from ..regularizer import Regularizer
from ..step import DivergenceError, Step
from ..weights import (
    WeightCompander,
    WeightDecay,
    apply_compander,
    companded,
    compander_bound,
    fold_compander,
    pruned_accuracy,
    weight_statistics,
    weight_tensors,
)
from .problems.digits_in_pixel_noise import TEST, VALIDATION, convolutional_network, digits_in_pixel_noise
from .training import accuracy, logits_of, train

if TYPE_CHECKING:
    from ..lab.study import Figure

PRUNED_SHARE = 0.3
MASKS = 10
FITTED_AT_LEAST = 99.0
ERROR_BETWEEN = (0.10, 0.40)


class WeightClipping(Regularizer):
    """Control: after every step each weight is clipped to [-bound, bound], a hard bound in the place of a soft one."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    @torch.no_grad()
    def on_step(self, step: Step) -> None:
        for weight in weight_tensors(step.model).values():
            weight.clamp_(-self.bound, self.bound)


class WeightNormalisation(Regularizer):
    """Control: `w = g v / |v|` row by row (Salimans and Kingma 2016), as the paper compares with.

    The decay of w is that of its length g, since `|w|^2 = sum g^2`; the direction v does not decay.
    """

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay

    def attach(self, model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                parametrizations.weight_norm(module)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        names = [name for name, _ in unwrap(model).named_parameters()]
        lengths = [name for name in names if name.endswith("weight.original0")]
        rest = [name for name in names if name not in lengths]
        return [{"names": lengths, "weight_decay": self.weight_decay}, {"names": rest, "weight_decay": 0.0}]

    def finish(self, model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        return model


METHODS: Mapping[str, Callable[[Mapping[str, Any]], list[Regularizer]]] = {
    "base": lambda s: [],
    "wc": lambda s: [WeightCompander(s["a"], s["b"])],
    "linear": lambda s: [WeightCompander(s["slope"], 1.0, fn="linear")],
    # The compander's own slope at zero, without the bend.
    "linear_twin": lambda s: [WeightCompander(s["a"], s["b"], fn="linear")],
    "wc_learnable": lambda s: [WeightCompander(0.5, 1.0, learnable="layer")],
    "wc_tight": lambda s: [WeightCompander(s["c"], s["c"], units="deviation")],
    "clip": lambda s: [WeightClipping(s["bound"])],
}


def method_of(settings: Mapping[str, Any]) -> Regularizer:
    """The arm's method with weight decay on the weights of convolutions and linear layers."""
    decay = float(settings["weight_decay"])
    if settings["method"] == "weight_norm":
        return WeightNormalisation(decay)
    # A companded weight decays itself while its scales are fixed, and its v where they are learned.
    return Compose(WeightDecay(decay), *METHODS[str(settings["method"])](settings))


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm; in the phase "tune" nothing of the test set is touched."""
    settings, seed = trial.settings, trial.seed
    problem = digits_in_pixel_noise(seed)
    evaluating = trial.phase == "evaluate"
    largest: list[float] = []

    def watch(step: Step, entry: dict[str, float]) -> None:
        largest.append(max(float(w.abs().max()) for w in weight_tensors(step.model).values()))

    model = train(
        convolutional_network(seed, float(settings["dropout"])),
        TensorLoader(problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed),
        settings,
        seed,
        method_of(settings),
        on_epoch_end=watch if evaluating else None,
    ).model
    errors = _errors(model, problem.validation, problem.validation_labels)
    metrics = {"score": -_error(errors, VALIDATION)}
    if evaluating:
        metrics |= _test_metrics(model, problem.test, problem.test_labels, settings, seed)
        metrics["train_accuracy"] = accuracy(logits_of(model, problem.train), problem.labels)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise DivergenceError(f"weight compander: a metric of the trained network is not finite: {metrics}")
    return TrialResult(metrics, {"largest": largest} if evaluating else {})


def _test_metrics(
    model: nn.Module, inputs: Tensor, labels: Tensor, settings: Mapping[str, Setting], seed: int
) -> dict[str, float]:
    logits = logits_of(model, inputs)
    errors = int((logits.argmax(1) != labels).sum())
    masks = int(settings.get("masks", MASKS))
    pruned = pruned_accuracy(model, [(inputs, labels)], PRUNED_SHARE, masks, torch.Generator().manual_seed(seed))
    statistics = weight_statistics(model)
    return {
        "errors": errors,
        "error": _error(errors, TEST),
        "accuracy": accuracy(logits, labels),
        "nll": float(F.cross_entropy(logits, labels)),
        "pruned_accuracy": 100.0 * pruned,
        "effective": statistics["effective"],
        "kurtosis": statistics["kurtosis"],
        "deviation": statistics["deviation"],
        "near_zero": statistics["near_zero"],
        "max_weight": statistics["max"],
    }


def _errors(model: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    logits = logits_of(model, inputs)
    if not bool(logits.isfinite().all()):
        raise DivergenceError("weight compander: the trained network's outputs are not finite")
    return int((logits.argmax(1) != labels).sum())


def _error(errors: int, count: int) -> float:
    """Error rate, kept away from zero so that its logarithm exists."""
    return (errors + 0.5) / (count + 1)


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _lowers_error(method: str, rival: str) -> Callable[[Seed], float]:
    def log_ratio(seed: Seed) -> float:
        return math.log(seed[rival]["error"] / seed[method]["error"])

    return log_ratio


def democracy(seed: Seed) -> float:
    """Log ratio of the effective numbers of weights of the compander and of its linear twin."""
    return math.log(seed["wc"]["effective"] / seed["linear_twin"]["effective"])


def redundancy(seed: Seed) -> float:
    """Accuracy with 30 % of the weights gone: the compander's lead, in points."""
    return seed["wc"]["pruned_accuracy"] - seed["base"]["pruned_accuracy"]


def _overfits(arm: str) -> Callable[[Sequence[Seed]], list[Condition]]:
    def regime(seeds: Sequence[Seed]) -> list[Condition]:
        fitted = sum(seed[arm]["train_accuracy"] for seed in seeds) / len(seeds)
        error = sum(seed[arm]["error"] for seed in seeds) / len(seeds)
        low, high = ERROR_BETWEEN
        return [
            Condition("the baseline fits >= 99 % of the training examples", fitted, fitted >= FITTED_AT_LEAST),
            Condition("its test error lies between 10 and 40 %", error, low <= error <= high),
        ]

    return regime


# Batches of 16 instead of 64: the bound does not depend on them, and a smoke run has ten seconds for everything.
_BATCH = 16
_TOLERANCE, _OUTPUTS = 1e-6, 1e-5


def bounded_cases(steps: int = 100) -> list[Case]:
    """|w| <= a pi/2 at every step, whatever the learning rate; attaching and folding leave the outputs unchanged."""
    problem = digits_in_pixel_noise(0)
    plain = convolutional_network(0, dropout=0.0)
    before = logits_of(plain, problem.validation)
    cases = []
    for rate, a, b in itertools.product((0.01, 0.1, 1.0, 10.0), (0.5, 0.7, 1.0), (0.5, 1.0)):
        model = copy.deepcopy(plain)
        apply_compander(model, a, b)
        name = f"a {a:g}, b {b:g}"
        if rate == 0.01:  # once for each pair
            attached = logits_of(model, problem.validation)
            cases.append(Case(f"{name}: outputs after attaching", _distance(attached, before), _OUTPUTS))
        name = f"learning rate {rate:g}, {name}"
        largest = _largest_weight(model, problem.train, problem.labels, rate, steps)
        excess = max(0.0, largest / compander_bound(a) - 1.0)
        cases.append(Case(f"{name}: largest |w| over a pi/2, minus 1", excess, _TOLERANCE))
        trained = logits_of(model, problem.validation)
        folded = logits_of(fold_compander(model), problem.validation)
        cases.append(Case(f"{name}: outputs after folding", _distance(folded, trained), _OUTPUTS))
    return cases


def _largest_weight(model: nn.Module, inputs: Tensor, labels: Tensor, rate: float, steps: int) -> float:
    """Largest finite |w| along SGD with momentum; training ends where it leaves the finite numbers."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    tensors = companded(model)
    largest = 0.0
    for _ in range(steps):
        rows = torch.randint(len(inputs), (_BATCH,), generator=generator)
        optimizer.zero_grad()
        # One evaluation of each weight serves the forward pass and the measurement.
        with parametrize.cached():
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            largest = max(largest, *(_largest_finite(one.w) for one in tensors))
        loss.backward()
        optimizer.step()
        if not math.isfinite(float(loss.detach())):
            break
    return max(largest, *(_largest_finite(one.w) for one in tensors))


def _largest_finite(w: Tensor) -> float:
    found = float(w.detach().abs().max())
    return found if math.isfinite(found) else float(w.detach().abs().nan_to_num(0.0, posinf=0.0).max())


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference; entries that are not finite in both count as equal."""
    both = ~found.isfinite() & ~expected.isfinite()
    return float((found - expected).masked_fill(both, 0.0).abs().max())


def figures(run_: Any) -> list[Figure]:
    """The paper's picture of early training: the largest weight after each epoch, at the common recipe."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    lines = {
        label: (list(range(1, len(curves[0]) + 1)), curves)
        for arm, label in (("base_recipe", "baseline"), ("wc_recipe", "weight compander"))
        if (curves := run_.arms[arm].curves("largest"))
    }
    if not lines:
        return []
    drawn = line_plot(lines, "epoch", "largest |w|", "Largest weight after each epoch")
    caption = (
        "Largest magnitude among the weights of convolutions and linear layers after each epoch, at the baseline's recipe "
        "(mean and range over the seeds). The compander bounds them from the first step on."
    )
    return [Figure("Large weights are held back from the start", caption, drawn)]


_REGIME = _overfits("base")

STUDY = Study(
    slug="weight-compander",
    run=run,
    estimands={
        "improves": _lowers_error("wc", "base"),
        "not-a-step-size": _lowers_error("wc", "linear"),
        "same-recipe": _lowers_error("wc_recipe", "base_recipe"),
        "learnable": _lowers_error("wc_learnable", "base"),
        "democracy": democracy,
        "redundancy": redundancy,
    },
    regimes={
        "improves": _REGIME,
        "not-a-step-size": _REGIME,
        "same-recipe": _overfits("base_recipe"),
        "learnable": _REGIME,
        "democracy": _REGIME,
        "redundancy": _REGIME,
    },
    exact={"bounded": bounded_cases},
    headline=("accuracy", "test accuracy, points"),
    figures=figures,
)
