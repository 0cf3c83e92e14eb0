"""MAID on the paper's problems (arXiv 2308.10098): total variation, a field of experts, and 1440 weights on MNIST.

Sizes and starts are those of the authors' scripts; moduli are the true ones (the scripts use others). The scripts
validate on MNIST's test set: here 10,000 training images validate, and the test set is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...hyperparameter import Hyperparameter
from ...inverse import field_of_experts_prior, field_of_experts_smoothness
from ...lab.protocol import Protocol
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...tuning import CertifiedProblem, LowerLevel, UpperLoss
from ...tuning.lower_level import Values
from ..maid import advance, last_accepted, make_tuner
from ..problems.bilevel_reference import first_step_size
from ..problems.published_bilevel import kodak, kodak_files, mnist_at_twelve, mnist_files
from ..problems.variational_denoising import VariationalDenoising
from ..problems.weighted_logistic import CLASSES, WeightedLogistic

NOISE = 0.1
FILTER_SIZE = 7


def run(trial: Trial) -> TrialResult:
    """One method on one problem."""
    settings = trial.settings
    problem, measure = {"tv": _tv, "foe": _foe, "mnist": _mnist}[str(settings["problem"])](settings, trial.seed)
    natural = first_step_size(problem)
    tuner = make_tuner(str(settings["method"]), problem, float(settings["eps"]), float(settings["step"]), natural)
    before = float(tuner.upper.value_and_gradient(tuner.x, tuner.lower.per_sample)[0].mean())
    advance(tuner, float(settings["budget"]))
    u, x = last_accepted(tuner)
    end = float(tuner.upper.value_and_gradient(x, tuner.lower.per_sample)[0].mean())
    metrics = {"loss_ratio": end / before, "loss": end, "units": float(tuner.work.units)}
    metrics |= {"hyperparameters": float(len(u)), **measure(x)}
    return TrialResult(metrics, {"loss": [float(i.outer_loss or math.nan) for i in tuner.history]})


def _noisy(clean: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return clean + NOISE * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)


def _psnr(clean: Tensor) -> Any:
    return lambda x: {"psnr": float(-10 * (x - clean).square().mean((1, 2)).log10().mean())}


def _tv(settings: Mapping[str, Any], seed: int) -> tuple[CertifiedProblem, Any]:
    clean = kodak(int(settings["images"]), int(settings["size"]))
    noisy = _noisy(clean, seed)
    return VariationalDenoising(clean, noisy, clean, noisy).levels(), _psnr(clean)


def _foe(settings: Mapping[str, Any], seed: int) -> tuple[CertifiedProblem, Any]:
    """Filters normal of Xavier's variance minus their means, weights e^-3, smoothings e^-3.5, strength e^-3."""
    clean = kodak(int(settings["images"]), int(settings["size"]))
    noisy, experts = _noisy(clean, seed), int(settings["experts"])
    generator = torch.Generator().manual_seed(seed + 1)
    # Glorot's variance for one channel in and `experts` out.
    spread = math.sqrt(2.0 / (FILTER_SIZE**2 * (1 + experts)))
    filters = spread * torch.randn(experts, FILTER_SIZE, FILTER_SIZE, generator=generator, dtype=clean.dtype)
    hypers = {
        "strength": Hyperparameter(math.exp(-3.0), chart="exp").double(),
        "weights": Hyperparameter(math.exp(-3.0), chart="exp", shape=(experts,)).double(),
        "smoothings": Hyperparameter(math.exp(-3.5), chart="exp", shape=(experts,)).double(),
        "filters": Hyperparameter(filters - filters.mean((1, 2), keepdim=True), -math.inf, math.inf).double(),
    }

    def objective(x: Tensor, v: Values) -> Tensor:
        prior = field_of_experts_prior(x, v["filters"], v["weights"], v["smoothings"], v["strength"])
        return 0.5 * (x - noisy).square().sum((1, 2)) + prior

    def smoothness(v: Values) -> float:
        return 1.0 + field_of_experts_smoothness(v["filters"], v["weights"], v["smoothings"], v["strength"])

    lower = LowerLevel(objective, noisy, hypers, 1.0, smoothness, per_sample=True)
    upper = UpperLoss(lambda x: 0.5 * (x - clean).square().sum((1, 2)), 1.0, convex=True)
    return CertifiedProblem(lower, upper), _psnr(clean)


class MnistLogistic(WeightedLogistic):
    """1440 log-weights: 144 pixels, ten classes, no bias.

    Args:
        seed: re-draws which training images validate.
        held_out: how many.
    """

    def __init__(self, seed: int, held_out: int) -> None:
        images, labels, self.test, self.test_labels = mnist_at_twelve()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        validation, train = order[:held_out], order[held_out:]
        self.inputs, self.labels = images[train], labels[train]
        self.validation, self.validation_labels = images[validation], labels[validation]
        self._columns, self._validation_columns = self.inputs.T.contiguous(), self.validation.T.contiguous()
        self._targets, self._validation_targets = (
            torch.nn.functional.one_hot(y, CLASSES).T.double().contiguous()
            for y in (self.labels, self.validation_labels)
        )
        self.L_data, self.L_g = (
            float(torch.linalg.eigvalsh(x.T @ x)[-1]) / (2 * len(x)) for x in (self.inputs, self.validation)
        )


def _mnist(settings: Mapping[str, Any], seed: int) -> tuple[CertifiedProblem, Any]:
    problem = MnistLogistic(seed, int(settings["held_out"]))
    return problem.levels(), lambda x: problem.test_metrics(x[0])


def prepare(protocol: Protocol) -> None:
    """Look for the data of all arms before anything runs."""
    for arm in protocol.arms.values():
        if arm.fixed["problem"] == "mnist":
            mnist_files()
        else:
            kodak_files(int(arm.fixed["images"]))


STUDY = Study(
    slug="maid", run=run, estimands={}, headline=("loss_ratio", "upper loss, relative to its start"), prepare=prepare
)
