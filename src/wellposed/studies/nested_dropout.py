"""Nested dropout with co-teaching: do compressed features resist wrong labels, and does co-teaching add to them?

Digits with 40 % of the labels of training and validation changed to another class. Stage 1 trains one network with a
compressor on its features, or with what everyone would try first; stage 2 fine-tunes two of them by co-teaching.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..compose import Compose
from ..features import (
    FeatureCompression,
    NestedDropout,
    feature_decomposition,
    prefix_accuracy,
    select_prefix,
)
from ..features.insertion import inserted
from ..fit import FitResult
from ..indexed_dataset import TensorLoader
from ..lab.study import Case, Condition, Seed, Study
from ..lab.trial import Setting, Trial, TrialResult
from ..losses import CoTeaching, GeneralizedCrossEntropy, LabelSmoothing
from ..pair import Pair
from ..regularizer import Regularizer
from ..step import Step
from .problems.noisy_digits import CLASSES, TEST, NoisyDigits, noisy_digits
from .training import accuracy, logits_of, multilayer_perceptron, train

if TYPE_CHECKING:
    from ..lab.study import Figure

Settings = Mapping[str, Setting]

RATE = 0.4
WIDTH = 256
PREFIXES = (1, 2, 4, 8, 16, 32, 64, 128)
BOTTLENECKS = (8, 16, 32)
MEMORISED_AT_LEAST = 0.15
FALLS_BY_AT_LEAST = 2.0
NARROW, NARROW_AT_MOST = 16, 0.8
_SECOND_NETWORK = 500_000
"""Added to the seed of the second network, so that no two trials share one."""


def compressor(settings: Settings, select: bool = False) -> FeatureCompression | None:
    """The compressor that the settings ask for; the layer stays in the network, so that prefixes can be measured."""
    kind = settings.get("kind", "none")
    if kind == "dropout":
        return FeatureCompression("dropout", p=float(settings["p"]))
    if kind == "nested":
        return FeatureCompression(
            "nested", sigma=float(settings["sigma"]), select="best" if select else None, fold=False
        )
    return None


def _method(settings: Settings) -> Regularizer | None:
    if settings["loss"] == "label_smoothing":
        return LabelSmoothing(float(settings["smoothing"]))
    if settings["loss"] == "gce":
        return GeneralizedCrossEntropy(float(settings["q"]))
    return compressor(settings)


def network(settings: Settings, seed: int) -> nn.Sequential:
    """64-512-width-10 with a classifier without bias, as in the authors' code; `width` is 256 or a bottleneck's."""
    return multilayer_perceptron([64, 512, int(settings.get("width", WIDTH)), CLASSES], seed, bias_of_head=False)


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm."""
    settings, testing = trial.settings, trial.phase == "evaluate"
    problem = noisy_digits(trial.seed, RATE, "other")
    stage = settings["stage"]
    if stage == "one":
        model, curves = trained(settings, trial.seed, 0, testing)
        return _result(model, problem, curves, testing)
    if stage == "scratch":
        watch = _Watch(problem, testing)
        pair: nn.Module = Pair(network(settings, trial.seed), network(settings, trial.seed + _SECOND_NETWORK))
        teaching = CoTeaching(float(settings["forget_rate"]), 10, "full")
        found = train(pair, _loader(problem, 64, trial.seed), settings, trial.seed, teaching, on_epoch_end=watch)
        return _result(found.model, problem, watch.curves, testing)
    pair = Pair(*(copy.deepcopy(trained(settings, trial.seed, n, testing)[0]) for n in (0, 1)))
    if stage == "pair":
        return _result(pair, problem, {}, testing)
    result, curves = co_taught(pair, settings, problem, trial.seed, testing)
    return _result(result.model, problem, curves, testing)


def trained(settings: Settings, seed: int, number: int, testing: bool) -> tuple[nn.Module, dict[str, list[float]]]:
    """A network of stage 1 and its curves; the second of a pair has its own initialisation, order and masks.

    The few that a process trained last are kept: tuning fine-tunes the same two networks again and again. They must not
    be changed.
    """
    names = ("loss", "kind", "p", "sigma", "width", "q", "smoothing", "learning_rate", "weight_decay", "epochs")
    return _trained(tuple((name, settings[name]) for name in names if name in settings), seed, number, testing)


@lru_cache(maxsize=32)
def _trained(
    items: tuple[tuple[str, Setting], ...], seed: int, number: int, testing: bool
) -> tuple[nn.Module, dict[str, list[float]]]:
    settings, own = dict(items), seed + number * _SECOND_NETWORK
    problem = noisy_digits(seed, RATE, "other")
    watch = _Watch(problem, testing)
    result = train(
        network(settings, own), _loader(problem, 64, own), settings, own, _method(settings), on_epoch_end=watch
    )
    return result.model, watch.curves


def co_taught(
    pair: nn.Module, settings: Settings, problem: NoisyDigits, seed: int, testing: bool
) -> tuple[FitResult, dict[str, list[float]]]:
    """Stage 2: fine-tune two trained networks by co-teaching, each under its compressor."""
    compress = compressor(settings, select=True)
    if settings.get("kind") == "nested":
        _set_prefix(pair, _chosen(pair, problem)[0])  # the first epoch judges by the prefix of stage 1
    teaching = CoTeaching(float(settings["forget_rate"]), num_gradual=0, mode=str(settings["mode"]))  # type: ignore[arg-type]
    second = {name: settings[f"stage2_{name}"] for name in ("learning_rate", "weight_decay", "epochs")}
    watch = _Watch(problem, testing)
    result = train(
        pair,
        _loader(problem, 128, seed),
        second,
        seed,
        teaching if compress is None else Compose(compress, teaching),
        validation=TensorLoader(problem.validation, problem.validation_labels, batch_size=1024),
        on_epoch_end=watch,
    )
    return result, watch.curves


def _loader(problem: NoisyDigits, batch_size: int, seed: int) -> TensorLoader:
    return TensorLoader(problem.train, problem.labels, batch_size=batch_size, shuffle=True, seed=seed)


# ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────────
class _Watch:
    """Accuracies after every epoch, all features kept. Nothing but the noisy validation labels decides anything."""

    def __init__(self, problem: NoisyDigits, testing: bool) -> None:
        self.problem, self.testing = problem, testing
        self.curves: dict[str, list[float]] = {}

    def __call__(self, step: Step, entry: dict[str, float]) -> None:
        problem, layers = self.problem, _layers(step.model)
        chosen = [layer.eval_k for layer in layers]
        _set_prefix(step.model, None)
        self._add("validation", accuracy(logits_of(step.model, problem.validation), problem.validation_labels))
        if self.testing:
            self._add("test", accuracy(logits_of(step.model, problem.test), problem.test_labels))
            wrong = problem.wrong
            # Memorised: a wrong label that the network predicts as given.
            self._add("memorized", accuracy(logits_of(step.model, problem.train[wrong]), problem.labels[wrong]))
        for layer, k in zip(layers, chosen, strict=True):
            layer.eval_k = k

    def _add(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(value)


def _result(model: nn.Module, problem: NoisyDigits, curves: dict[str, list[float]], testing: bool) -> TrialResult:
    """Metrics of a finished network or pair: with all features, and with the prefix that validation chooses."""
    shortest, curve = _chosen(model, problem)
    last = accuracy(logits_of(_unmasked(model), problem.validation), problem.validation_labels)
    metrics = {"score": last, "score_prefix": 100 * float(curve[shortest - 1])}
    best = None
    if curves:
        validation = curves["validation"]
        best = max(range(len(validation)), key=validation.__getitem__)  # the first of equals
        metrics["score_early_stop"] = validation[best]
    if not testing:
        return TrialResult(metrics, curves)
    test = 100 * _prefix_accuracies(model, problem.test, problem.test_labels)
    cautious = select_prefix(curve, rule="one_se", num_examples=len(problem.validation_labels))
    full = accuracy(logits_of(model, problem.test), problem.test_labels)
    metrics |= {
        "accuracy": full,
        "errors": _errors(full),
        "prefix": float(shortest),
        "accuracy_prefix": float(test[shortest - 1]),
        "errors_prefix": _errors(float(test[shortest - 1])),
        "prefix_one_se": float(cautious),
        "accuracy_prefix_one_se": float(test[cautious - 1]),
    }
    metrics |= {f"accuracy_first_{k}": float(test[k - 1]) for k in PREFIXES if k <= len(test)}
    if len(test) > max(PREFIXES):
        metrics["area"] = float(test[[k - 1 for k in PREFIXES]].mean()) / 100
    if best is not None:
        metrics["accuracy_early_stop"] = curves["test"][best]
        metrics["errors_early_stop"] = _errors(curves["test"][best])
        metrics["best_epoch_accuracy"] = max(curves["test"])
        metrics["memorised"] = curves["memorized"][-1] / 100
    return TrialResult(metrics, {**curves, "prefix_accuracy": test.tolist()})


def _errors(points: float) -> float:
    return float(round((1 - points / 100) * TEST))


def _networks(model: nn.Module) -> list[nn.Sequential]:
    return [model.a, model.b] if isinstance(model, Pair) else [model]  # type: ignore[list-item]


def _layers(model: nn.Module) -> list[NestedDropout]:
    return [layer for net in _networks(model) if isinstance(layer := inserted(net[-1]), NestedDropout)]


def _set_prefix(model: nn.Module, k: int | None) -> None:
    for layer in _layers(model):
        layer.eval_k = k


def _unmasked(model: nn.Module) -> nn.Module:
    _set_prefix(model, None)
    return model


def _prefix_accuracies(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Accuracy with the first k features, for every k; of a pair, of the average of the two networks' logits."""
    nets = _networks(_unmasked(model))
    features = [logits_of(net[:-1], inputs) for net in nets]
    heads = [net[-1] for net in nets]
    return prefix_accuracy(features, labels, heads)


def _chosen(model: nn.Module, problem: NoisyDigits) -> tuple[int, Tensor]:
    """k* by the paper's rule on the noisy validation labels, and the curve that it rests on."""
    curve = _prefix_accuracies(model, problem.validation, problem.validation_labels)
    return select_prefix(curve), curve


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def error_rate(seed: Seed, arm: str) -> float:
    """Error of an arm as the card counts it: at the last epoch with all features, else as the arm's name says."""
    metric = {"ce_early_stop": "errors_early_stop", "nested": "errors_prefix"}.get(arm, "errors")
    return (seed[arm][metric] + 0.5) / (TEST + 1)


def _log_ratios(own: str, rivals: Sequence[str]) -> Callable[[Seed], dict[str, float]]:
    def estimand(seed: Seed) -> dict[str, float]:
        return {rival: math.log(error_rate(seed, rival) / error_rate(seed, own)) for rival in rivals}

    return estimand


def ordered(seed: Seed) -> dict[str, float]:
    """By how much the mean accuracy over prefix lengths 1, 2, 4, ..., 128 exceeds that of other networks."""
    return {rival: seed["nested"]["area"] - seed[rival]["area"] for rival in ("dropout", "ce")}


def prefix_for_free(seed: Seed) -> float:
    """Log ratio of accuracies: a prefix of the nested network over a bottleneck of its width, mean over the widths."""
    ratios = [
        math.log(seed["nested"][f"accuracy_first_{k}"] / seed[f"bottleneck_{k}"]["accuracy"]) for k in BOTTLENECKS
    ]
    return sum(ratios) / len(ratios)


def memorises(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime R: untuned cross-entropy fits wrong labels, and was better before."""
    memorised = _mean(seeds, "memorised")
    fall = _mean(seeds, "best_epoch_accuracy") - _mean(seeds, "accuracy")
    return [
        Condition("untuned cross-entropy memorises >= 15 % of the wrong labels", memorised, memorised >= MEMORISED_AT_LEAST),
        Condition("its best epoch lies >= 2 points above its last", fall, fall >= FALLS_BY_AT_LEAST),
    ]  # fmt: skip


def needs_its_width(seeds: Sequence[Seed]) -> list[Condition]:
    """Plain features are not ordered: few of them do not suffice."""
    share = _mean(seeds, f"accuracy_first_{NARROW}") / _mean(seeds, "accuracy")
    return [
        Condition(
            f"untuned cross-entropy's first {NARROW} features reach < {NARROW_AT_MOST:.0%} of its accuracy", share,
            share < NARROW_AT_MOST,
        )
    ]  # fmt: skip


def _mean(seeds: Sequence[Seed], metric: str) -> float:
    return sum(seed["ce_recipe"][metric] for seed in seeds) / len(seeds)


@cache
def decomposition_cases() -> list[Case]:
    """Theorem 1 on random categoricals, against its formulas written out; and the variance against -log Z."""
    cases = []
    generator = np.random.default_rng(0)
    shapes = sorted((int(generator.integers(2, 11)), int(generator.integers(1, 21))) for _ in range(200))
    for number, (classes, states) in enumerate(shapes):
        p = generator.dirichlet(np.ones(classes))
        q = generator.dirichlet(np.ones(classes), size=states)
        w = generator.dirichlet(np.ones(states))
        found = feature_decomposition(
            torch.from_numpy(np.log(q))[:, None], torch.from_numpy(p)[None], torch.from_numpy(w)
        )
        mean = w @ np.log(q)
        z = np.exp(mean).sum()
        g = np.exp(mean) / z
        expected = {
            "total": -(w @ np.log(q)) @ p,
            "bias": p @ np.log(p / g),
            "variance": sum(w[i] * (g @ np.log(g / q[i])) for i in range(states)),
            "constant": -(p @ np.log(p)),
        }
        errors = [abs(float(getattr(found, name)) - value) for name, value in expected.items()]
        errors.append(abs(float(found.variance) + math.log(z)))
        cases.append(Case(f"draw {number}: {classes} classes, {states} states", max(errors), 1e-10))
    return cases


def figures(run_: Any) -> list[Figure]:
    """Accuracy against the number of features kept."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    names = {"nested": "nested dropout", "dropout": "dropout", "ce": "cross-entropy"}
    lines = {
        label: ([float(k) for k in range(1, WIDTH + 1)], curves)
        for arm, label in names.items()
        if (curves := run_.arms[arm].curves("prefix_accuracy"))
    }
    if not lines:
        return []
    drawn = line_plot(lines, "features kept", "test accuracy, points", "Accuracy of the first k features", log_x=True)
    caption = (
        "Test accuracy of the same network when only its first k of 256 features reach the classifier (mean and range "
        "over the seeds). Nested dropout puts what matters first; elsewhere the order of the features means nothing."
    )
    return [Figure("Ordered features", caption, drawn)]


STUDY = Study(
    slug="nested-dropout",
    run=run,
    estimands={
        "compressed-coteaching": _log_ratios("compress_coteaching", ("ce", "ce_early_stop", "ce_coteaching")),
        "compression-alone": _log_ratios("compress", ("ce", "ce_early_stop")),
        "nested-alone": _log_ratios("nested", ("ce", "ce_early_stop")),
        "ordered": ordered,
        "prefix-for-free": prefix_for_free,
        "coteaching-boost": _log_ratios("compress_coteaching", ("compress", "compress_pair")),
    },
    regimes={
        "compressed-coteaching": memorises,
        "compression-alone": memorises,
        "nested-alone": memorises,
        "ordered": needs_its_width,
        "prefix-for-free": memorises,
        "coteaching-boost": memorises,
    },
    exact={"decomposition": decomposition_cases},
    headline=("accuracy", "test accuracy, points"),
    figures=figures,
)
