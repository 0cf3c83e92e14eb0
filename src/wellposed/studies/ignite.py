"""Surrogate sharpness (IGNITE): does the constraint find better designs than the same search, tuned as well, without it?

Problem: offline optimization of five families of functions, a network fitted to the worse half of the designs, gradient
ascent on its prediction. Epochs are tuned in every arm, because stopping early alone helps as much on some of them. One
setting serves all five; it is chosen by true scores, on functions and data that the evaluation never sees.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compose import Compose
from ..features import Dropout
from ..gradients import (
    ConservativeObjective,
    SharpnessAwareMinimization,
    SurrogateEnsemble,
    SurrogateSharpness,
    best_designs,
    evolution_search,
    offline_optimize,
    percentile_report,
    surrogate_sharpness,
)
from ..lab.study import Condition, Seed, Study
from ..lab.trial import Trial, TrialResult
from ..regularizer import Regularizer
from ..step import DivergenceError, mode
from .problems.offline_surrogates import (
    WIDTH,
    GaussianProcess,
    InputGradientPenalty,
    StandardizedTask,
    leaky_network,
    train_surrogate,
)
from .problems.offline_tasks import TASKS, offline_task
from .problems.surrogate_sharpness_cases import gradient_cases

if TYPE_CHECKING:
    from ..lab.study import Figure

RHO = 0.05
DESIGNS, STARTS = 128, 16
HEADROOM, FLOOR, ON_TASKS = 0.05, 2.0, 4


def constrained(settings: Mapping[str, Any]) -> Regularizer:
    """IGNITE with the tuned limit and growth of the multiplier, or with the automatic ones."""
    ratio = settings["eps_ratio"]
    return SurrogateSharpness(RHO, "half" if ratio == "half" else RHO * ratio, lam_target=settings["lam_target"])


METHODS: Mapping[str, Callable[[Mapping[str, Any]], Regularizer | None]] = {
    "base": lambda s: None,
    "dropout": lambda s: Dropout(s["p"]),
    "sam": lambda s: SharpnessAwareMinimization(s["sam_rho"]),
    "input_gradient": lambda s: InputGradientPenalty(s["strength"]),
    "ignite": constrained,
    "ignite2": lambda s: SurrogateSharpness(RHO, lam=s["lam_rho"] / RHO, mode="penalty"),
}


def run(trial: Trial) -> TrialResult:
    """Train, search and score one arm on all five tasks of one seed."""
    evaluating = trial.phase == "evaluate"
    settings: dict[str, Any] = dict(trial.settings)
    if settings.get("recipe") == "own":  # IGNITE's, beside which the settings hold the base's
        settings |= {n.removeprefix("ignite_"): v for n, v in trial.settings.items() if n.startswith("ignite_")}
    metrics: dict[str, float] = {}
    for number, name in enumerate(TASKS):
        task = StandardizedTask.of(offline_task(name, trial.seed), settings.get("points"))
        try:
            found = run_task(task, settings, 10 * trial.seed + number, evaluating)
        except DivergenceError:
            found = {"s100": 0.0, "s50": 0.0, "diverged": 1.0}
        best = task.task.best_score()
        if best is not None:
            found["headroom"] = best - found["s100"]
        metrics |= {f"{metric}_{name}": value for metric, value in found.items()}
    for metric in ("s100", "s50"):
        metrics[metric] = sum(metrics[f"{metric}_{name}"] for name in TASKS) / len(TASKS)
    score = {"score": metrics["s100"]}
    return TrialResult(metrics | score if evaluating else score)


def run_task(task: StandardizedTask, settings: Mapping[str, Any], seed: int, evaluating: bool) -> dict[str, float]:
    """One surrogate, one search: percentiles of the scores, and the sharpness that is left.

    Raises:
        DivergenceError: if training or the search leaves the finite numbers.
    """
    surrogate = fitted_surrogate(task, settings, seed)
    found = searched(surrogate, task, settings, seed)
    if not bool(torch.isfinite(found).all()):
        raise DivergenceError(f"ignite: the search on {task.task.name!r} left the finite numbers")
    designs = task.designs(found)
    scores = task.task.score(designs)
    report = percentile_report(scores, (50, 100))
    metrics = {"s100": report[100], "s50": report[50], "diverged": 0.0}
    if evaluating:
        metrics |= measured(surrogate, task, designs, scores)
    return metrics


def fitted_surrogate(task: StandardizedTask, settings: Mapping[str, Any], seed: int) -> nn.Module:
    """The arm's surrogate, trained under its method."""
    if settings["surrogate"] == "gp":
        return GaussianProcess(task.x, task.y, int(settings.get("fitted_on", 300)), seed)
    width, d = int(settings.get("width", WIDTH)), task.x.shape[1]
    network: nn.Module = leaky_network(d, seed, width)
    if settings["surrogate"] == "ensemble":
        network = SurrogateEnsemble([leaky_network(d, 1_000_000 * member + seed, width) for member in range(3)])
    method = METHODS[settings["method"]](settings)
    conservative = ConservativeObjective(steps=10) if settings["surrogate"] == "coms" else None
    parts = [part for part in (conservative, method) if part is not None]
    with warnings.catch_warnings():
        # A loose limit that never acts is one of the settings that tuning tries.
        warnings.filterwarnings("ignore", "SurrogateSharpness: the constraint was inactive")
        return train_surrogate(network, task.x, task.y, settings, seed, Compose(*parts)).model


def searched(surrogate: nn.Module, task: StandardizedTask, settings: Mapping[str, Any], seed: int) -> Tensor:
    """The last designs of the arm's search, in standardised coordinates."""
    if settings["search"] == "cma":
        start = best_designs(task.x, task.y, STARTS).mean(0)
        return evolution_search(
            surrogate, start, generations=int(settings.get("generations", 60)), keep=DESIGNS, seed=seed
        )
    return offline_optimize(surrogate, best_designs(task.x, task.y, DESIGNS), steps=int(settings.get("steps", 200)))


def measured(surrogate: nn.Module, task: StandardizedTask, designs: Tensor, scores: Tensor) -> dict[str, float]:
    """The norm of the mean prediction's gradient on training data and on the designs found, and overestimation."""
    where = task.coordinates(designs)
    with torch.no_grad(), mode(surrogate, False):
        predicted = surrogate(where).reshape(-1)
    promised = task.task.normalize(task.values(predicted))
    metrics = {"overestimation": float((promised - scores).mean())}
    members = list(surrogate.members) if isinstance(surrogate, SurrogateEnsemble) else [surrogate]
    if any(p.requires_grad for p in surrogate.parameters()):
        for name, inputs in (("train", task.x), ("designs", where)):
            norms = [float(surrogate_sharpness(member, inputs, rho=1.0)) for member in members]
            metrics[f"norm_{name}"] = sum(norms) / len(norms)
    return metrics


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _lead(metric: str, own: str, rivals: Sequence[str]) -> Callable[[Seed], dict[str, float] | float]:
    """Difference of a mean score: one number against one rival, else one a rival."""

    def lead(seed: Seed) -> dict[str, float] | float:
        found = {rival: seed[own][metric] - seed[rival][metric] for rival in rivals}
        return found if len(rivals) > 1 else found[rivals[0]]

    return lead


def model_agnostic(seed: Seed) -> dict[str, float]:
    """Gain in the best design from adding IGNITE to each of the other optimizers."""
    return {base: seed[f"{base}_ignite"]["s100"] - seed[base]["s100"] for base in ("ensemble", "coms", "cma")}


def sharpness_transfers(seed: Seed) -> float:
    """Mean over tasks of log s(base) - log s(IGNITE at the base's settings) on the final designs.

    A run that diverged counts as one with the base's sharpness: its task adds 0.
    """
    own, base = seed["ignite_at_base"], seed["base"]
    logs = [
        0.0
        if own[f"diverged_{task}"] or base[f"diverged_{task}"]
        else math.log(base[f"norm_designs_{task}"] / own[f"norm_designs_{task}"])
        for task in TASKS
    ]
    return sum(logs) / len(logs)


def _mean(seeds: Sequence[Seed], metric: str) -> float:
    return sum(seed["base"][metric] for seed in seeds) / len(seeds)


def headroom(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime r1: the base leaves something to gain. Of `diabetes` no optimum is known; it counts as such a task."""
    count = sum(task == "diabetes" or _mean(seeds, f"headroom_{task}") >= HEADROOM for task in TASKS)
    text = "tasks of 5 on which the base's best design scores >= 0.05 below the optimum: at least 4"
    return [Condition(text, float(count), count >= ON_TASKS)]


def something_to_constrain(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime r2: without the constraint the norm ends well above the floor of 1 that an output bias sets."""
    ended = [
        [seed["base"][f"norm_train_{task}"] for seed in seeds if not seed["base"][f"diverged_{task}"]] for task in TASKS
    ]
    count = sum(bool(values) and sum(values) / len(values) >= FLOOR for values in ended)
    text = "tasks of 5 on which the base's gradient norm on the training data ends at >= 2: at least 4"
    return [Condition(text, float(count), count >= ON_TASKS)]


def both(seeds: Sequence[Seed]) -> list[Condition]:
    """Regimes r1 and r2."""
    return [*headroom(seeds), *something_to_constrain(seeds)]


def figures(run_: Any) -> list[Figure]:
    """Task by task: scores, and the norm on data and on designs."""
    from .problems.offline_figures import drawn

    return drawn(run_)


STUDY = Study(
    slug="ignite",
    run=run,
    estimands={
        "better-designs": _lead("s100", "ignite", ["base"]),
        "better-than-generic": _lead("s100", "ignite", ["sam", "dropout", "input_gradient"]),
        "sharpness-transfers": sharpness_transfers,
        "model-agnostic": model_agnostic,
        "whole-distribution": _lead("s50", "ignite", ["base"]),
        "fixed-penalty": _lead("s100", "ignite2", ["base"]),
    },
    regimes={
        "better-designs": both,
        "better-than-generic": headroom,
        "sharpness-transfers": something_to_constrain,
        "model-agnostic": headroom,
        "whole-distribution": headroom,
        "fixed-penalty": headroom,
    },
    exact={"gradient-exact": gradient_cases},
    headline=("s100", "best design's score, mean of 5 tasks"),
    figures=figures,
)
