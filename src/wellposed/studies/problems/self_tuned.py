"""One self-tuning run on `regularized_digits`, by the library's own tuner and methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...bilevel import BilevelProblem
from ...compose import Compose
from ...features import InputNoise
from ...hyperparameter import Hyperparameter
from ...indexed_dataset import TensorLoader
from ...loading import EndlessBatches
from ...losses import LabelSmoothing
from ...objective import cross_entropy
from ...step import DivergenceError
from ...tuning import HyperDropout, Schedule, SelfTuner
from ...weights import WeightDecay
from ..training import accuracy, logits_of, multilayer_perceptron
from .regularized_digits import (
    BATCH,
    DECAYS,
    DROPOUTS,
    EVALUATE_EVERY,
    INITIAL,
    MOMENTUM,
    NAMES,
    RANGES,
    UNIFORM,
    WIDTHS,
    RegularizedDigits,
)

PLAIN_STEP, STN_STEP, DELTA_STEP, VALIDATION_STEP = 1.0, 2.0, 4.5, 2.0
"""Compute of one step, in plain training steps, as the card registers it: counted, not timed."""
DECAY = "l2"
"""The strength of `WeightDecay`, which holds those of all layers."""
WARMUP_SHARE = 10
"""A tenth of the steps comes before the first validation step."""


@dataclass
class SelfTuned:
    """What a self-tuning run leaves.

    Attributes:
        validation, test: cross-entropy at the best evaluation, on validation data, and on test data if asked for.
        last_test: at the last step, likewise.
        accuracy: on test data at the best evaluation, in points.
        units: compute in plain steps.
        schedule: values of the strengths, by the names of `regularized_digits`.
        curves: by name, one number an evaluation.
    """

    validation: float = UNIFORM
    test: float = UNIFORM
    last_test: float = UNIFORM
    accuracy: float = 0.0
    units: float = 0.0
    schedule: Schedule = field(default_factory=Schedule)
    curves: dict[str, list[float]] = field(default_factory=dict)


def strengths(initial_dropout: float) -> dict[str, Hyperparameter]:
    """Hyperparameters of all strengths: dropout rates from `initial_dropout`, the others from `INITIAL`."""
    starts = {**INITIAL, **dict.fromkeys(DROPOUTS, initial_dropout)}
    found = {n: Hyperparameter(starts[n], *RANGES[n], per_example=True) for n in NAMES if n not in DECAYS}
    # One strength a layer. The penalty of `WeightDecay` is half of strength * ||W||^2; what is registered has no half.
    start = torch.tensor([2 * INITIAL[n] for n in DECAYS])
    return {**found, DECAY: Hyperparameter(start, chart="exp", shape=(len(DECAYS),), per_example=True)}


def as_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Values of `strengths` by the names of `regularized_digits`.

    Example:
        >>> found = as_numbers({name: h.value for name, h in strengths(0.05).items()})
        >>> all(abs(found[name] / INITIAL[name] - 1) < 1e-4 for name in NAMES)
        True
    """
    plain = {name: float(value) for name, value in values.items() if name != DECAY}
    return {**plain, **{name: 0.5 * float(value) for name, value in zip(DECAYS, values[DECAY], strict=True)}}


def self_tuned_problem(seed: int, own: Mapping[str, Hyperparameter]) -> BilevelProblem:
    """The network and its methods, under the strengths given."""
    linears = [part for part in multilayer_perceptron(WIDTHS, seed) if isinstance(part, nn.Linear)]
    layers: list[nn.Module] = []
    for number, (name, linear) in enumerate(zip(DROPOUTS, linears, strict=True)):
        layers += [HyperDropout(own[name]), linear, *([nn.ReLU()] if number < len(linears) - 1 else [])]
    method = Compose(InputNoise(own["noise"]), LabelSmoothing(own["smoothing"]), WeightDecay(own[DECAY]))
    return BilevelProblem.from_regularizer(nn.Sequential(*layers), method, cross_entropy, seed=seed)


def self_tuned(
    problem: RegularizedDigits,
    seed: int,
    settings: Mapping[str, Any],
    *,
    delta: bool,
    initial_dropout: float = INITIAL["dropout_input"],
    testing: bool = False,
) -> SelfTuned:
    """Train and tune once.

    Args:
        problem: the data.
        seed: of initialisation, order, masks and perturbations.
        settings: `stn_steps`, `stn_lr`, `hyper_lr`, `scale`, `tau` and `train_steps`.
        delta: Delta-STN, or STN.
        initial_dropout: where the three rates start.
        testing: measure on test data, too.

    Raises:
        DivergenceError: if a loss is not finite.
    """
    own = strengths(initial_dropout)
    bilevel = self_tuned_problem(seed, own)
    steps = int(settings["stn_steps"])
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        tuner = SelfTuner(
            bilevel,
            partial(torch.optim.SGD, lr=float(settings["stn_lr"]), momentum=MOMENTUM, fused=True),
            partial(torch.optim.RMSprop, lr=float(settings["hyper_lr"])),
            scale=float(settings["scale"]),
            tau=float(settings["tau"]),
            train_steps=int(settings["train_steps"]),
            warmup_steps=steps // WARMUP_SHARE,
            delta=delta,
            seed=seed,
        )
        data = [
            EndlessBatches(TensorLoader(x, y, batch_size=BATCH, shuffle=True, seed=seed + shift), name)
            for x, y, shift, name in (
                (problem.train, problem.labels, 0, "train"),
                (problem.validation, problem.validation_labels, 5000, "validation"),
            )
        ]
        found = SelfTuned(curves={"validation": [], "units": [], **{name: [] for name in NAMES}})
        for step in range(1, steps + 1):
            tuner.checked_step(data[0], data[1])
            if step % EVALUATE_EVERY == 0 or step == steps:
                cost = (DELTA_STEP if delta else STN_STEP) * step + VALIDATION_STEP * data[1].taken
                _evaluate(tuner, problem, found, cost, own, testing)
    found.units = found.curves["units"][-1]
    found.schedule = Schedule(
        tuner.schedule.steps,
        [as_numbers({key: v[name] for key, name in _paths(bilevel, own).items()}) for v in tuner.schedule.values],
        tuner.schedule.total,
    )
    return found


def stn_units(settings: Mapping[str, Any]) -> int:
    """Compute of an STN run in plain steps: the budget of the searches that it is compared with.

    Example:
        >>> stn_units({"stn_steps": 1500, "train_steps": 5}), stn_units({"stn_steps": 1500, "train_steps": 2})
        (3540, 4350)
    """
    steps = int(settings["stn_steps"])
    validation = (steps - steps // WARMUP_SHARE) // int(settings["train_steps"])
    return round(STN_STEP * steps + VALIDATION_STEP * validation)


def _paths(bilevel: BilevelProblem, own: Mapping[str, Hyperparameter]) -> dict[str, str]:
    """How the problem calls each strength."""
    names = {id(h): name for name, h in bilevel.hypers.items()}
    return {key: names[id(h)] for key, h in own.items()}


def _evaluate(
    tuner: SelfTuner,
    problem: RegularizedDigits,
    found: SelfTuned,
    units: float,
    own: Mapping[str, Hyperparameter],
    testing: bool,
) -> None:
    model = tuner.problem.model
    loss = float(F.cross_entropy(logits_of(model, problem.validation), problem.validation_labels))
    if not math.isfinite(loss):
        raise DivergenceError(f"stn: the validation loss of step {tuner.trained} is {loss}")
    better = loss < found.validation
    found.validation = min(loss, found.validation)
    if testing:
        logits = logits_of(model, problem.test)
        found.last_test = float(F.cross_entropy(logits, problem.test_labels))
        if better:
            found.test, found.accuracy = found.last_test, accuracy(logits, problem.test_labels)
    found.curves["validation"].append(found.validation)
    found.curves["units"].append(units)
    for name, value in as_numbers({key: h.value for key, h in own.items()}).items():
        found.curves[name].append(value)
