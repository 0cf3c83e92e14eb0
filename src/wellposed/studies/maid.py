"""MAID: does choosing accuracies and step sizes online spare their user the choice, and what does it cost?

Three problems. Quadratic: everything is known exactly, so that certificates can be checked. Logistic regression with
650 hyperparameters. Denoising of photographs with two. Every arm runs the same grid of 20 settings (first accuracy x
first step size) to the same budget; no arm is tuned, as the subject is what happens when the setting is not known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from ..lab.study import Condition, Seed, Study
from ..lab.trial import Trial, TrialResult
from ..tuning import HOAG, MAID, CertifiedProblem, FixedArmijo, FixedStep, InnerSolverError, LinearSolverError
from ..tuning.inexact_tuner import InexactTuner
from .problems.bilevel_reference import Reference, denoising_reference, first_step_size, search_by_tpe
from .problems.decoupled_quadratic import DecoupledQuadratic
from .problems.maid_certificates import all_certificates, bound_cases, descent_cases
from .problems.maid_figures import figures
from .problems.maid_grid import finite, grid_of, summary
from .problems.variational_denoising import VariationalDenoising, photographs
from .problems.weighted_logistic import WeightedLogistic

CLAIMED_CONDITION = 30.0
COST_GAP = 5e-3
"""Relative gap that the cost on the quadratic problem is counted to."""
OUTER_STEPS = 400
"""Largest number of outer steps on the quadratic problem, where a coarse accuracy makes them nearly free."""

METHODS = ("maid", "maid_accelerated", "hoag_geometric", "hoag_quadratic", "hoag_cubic", "fixed_step", "fixed_armijo")
RIVALS = ("hoag_geometric", "hoag_quadratic", "hoag_cubic", "fixed_step", "fixed_armijo")


def make_tuner(method: str, problem: CertifiedProblem, eps: float, size: float, natural: float) -> InexactTuner:
    """One arm with one setting.

    Args:
        method: one of `METHODS`.
        problem: the problem.
        eps: first (or only) accuracy of inner and adjoint solves.
        size: first (or only) step size in multiples of `natural`; of HOAG's own for HOAG.
        natural: step size that moves the fastest hyperparameter by one.
    """
    if method.startswith("hoag_"):
        return HOAG(problem, eps, method.removeprefix("hoag_"), step_scale=size)  # type: ignore[arg-type]
    if method.startswith("fixed_"):
        return {"fixed_step": FixedStep, "fixed_armijo": FixedArmijo}[method](problem, eps, size * natural)
    return MAID(problem, eps, eps, size * natural, accelerate=method == "maid_accelerated")


def advance(tuner: InexactTuner, budget: float, max_outer: int | None = None) -> None:
    """Run to the budget; a run that cannot finish a solve keeps its last accepted hyperparameters."""
    try:
        tuner.run(budget=budget, max_outer=max_outer)
    except (InnerSolverError, LinearSolverError, ArithmeticError):
        return


def last_accepted(tuner: InexactTuner) -> tuple[Tensor, Tensor]:
    """Hyperparameters and inner solution of the last point that was solved and accepted; the start if none was."""
    return (tuner.u, tuner.x) if tuner.point is None else (tuner.point.u, tuner.point.x)


def run(trial: Trial) -> TrialResult:
    """One arm on one problem: all settings of the grid."""
    return {"quadratic": _quadratic, "logistic": _logistic, "denoising": _denoising}[str(trial.settings["problem"])](
        trial
    )


# ── denoising ─────────────────────────────────────────────────────────────────────────────────────────────────────
@lru_cache(maxsize=4)
def _denoising_problem(seed: int, size: int) -> tuple[VariationalDenoising, Reference]:
    problem = photographs(seed, size)
    return problem, denoising_reference(problem)


def _denoising(trial: Trial) -> TrialResult:
    settings = trial.settings
    problem, reference = _denoising_problem(trial.seed, int(settings.get("size", 48)))
    base = {"f_start": reference.f_start, "f_star": reference.f_star}
    testing = trial.phase == "evaluate"
    if settings["method"] == "tpe50":
        found = search_by_tpe(problem, trial.seed, int(settings.get("evaluations", 50)))
        metrics = {**base, "f_end": found.f, "units": float(found.units), "gap": reference.gap(found.f)}
        return TrialResult(metrics | ({"psnr": problem.fresh_psnr(found.raw)} if testing else {}))
    losses, psnrs = [], []
    for _, eps, size in grid_of(trial):
        tuner = make_tuner(str(settings["method"]), problem.levels(), eps, size, reference.natural)
        advance(tuner, float(settings["budget"]))
        u, x = last_accepted(tuner)
        losses.append(finite(problem.f(u, start=x), reference.f_start))
        if testing:
            psnrs.append(problem.fresh_psnr(u))
    metrics = {**base, **summary(trial, losses, reference)}
    if psnrs:
        metrics |= {"psnr": statistics.fmean(psnrs), "psnr_worst": min(psnrs), "psnr_best": max(psnrs)}
    return TrialResult(metrics, {"loss": losses, "gap": [reference.gap(f) for f in losses]})


# ── logistic regression ───────────────────────────────────────────────────────────────────────────────────────────
@lru_cache(maxsize=4)
def _logistic_problem(seed: int) -> tuple[WeightedLogistic, float, float]:
    problem = WeightedLogistic(seed)
    start = problem.levels().lower
    return problem, problem.f(start.u0, start.x0)[0], first_step_size(problem.levels())


def _logistic(trial: Trial) -> TrialResult:
    problem, f_start, natural = _logistic_problem(trial.seed)
    losses, tests, accuracies = [], [], []
    for _, eps, size in grid_of(trial):
        tuner = make_tuner(str(trial.settings["method"]), problem.levels(), eps, size, natural)
        advance(tuner, float(trial.settings["budget"]))
        f, w = problem.f(*last_accepted(tuner))
        losses.append(finite(f, f_start))
        if trial.phase == "evaluate":
            found = problem.test_metrics(w)
            tests.append(found["loss"])
            accuracies.append(found["accuracy"])
    metrics = {"f_start": f_start, **summary(trial, losses, None)}
    if tests:
        metrics |= {"test_loss": statistics.fmean(tests), "accuracy": statistics.fmean(accuracies)}
        metrics |= {"accuracy_worst": min(accuracies), "accuracy_best": max(accuracies)}
    return TrialResult(metrics, {"loss": losses})


# ── the quadratic problem ─────────────────────────────────────────────────────────────────────────────────────────
def _quadratic(trial: Trial) -> TrialResult:
    method, budget = str(trial.settings["method"]), float(trial.settings["budget"])
    problem = DecoupledQuadratic(trial.seed, CLAIMED_CONDITION)
    natural = first_step_size(problem.levels())
    costs = [
        cost_to_gap(problem, make_tuner(method, problem.levels(), eps, size, natural), budget)
        for _, eps, size in grid_of(trial)
    ]
    metrics = {"reached": statistics.fmean(cost < budget for cost in costs), "cost_median": statistics.median(costs)}
    metrics |= {"cost_least": min(costs), "cost_most": max(costs)}
    if method == "fixed_step":
        tuner: InexactTuner = FixedStep(problem.levels(), 1e-4, 1.0 / problem.L_f)
        metrics["claimed_cost"] = cost_to_gap(problem, tuner, budget)
    if method == "maid":
        metrics["claimed_cost"] = cost_to_gap(problem, MAID(problem.levels(), 0.1, 0.1, 1.0), budget)
        metrics |= all_certificates(trial)
    return TrialResult(metrics, {"cost": costs})


def cost_to_gap(problem: DecoupledQuadratic, tuner: InexactTuner, budget: float) -> float:
    """Work until the exact upper loss is within the relative gap; the whole budget if it never is."""
    tuner.budget = budget
    start = float(problem.f(tuner.u)) - problem.f_star
    for _ in range(OUTER_STEPS):
        try:
            tuner.step()
        except (InnerSolverError, LinearSolverError):
            return budget
        if float(problem.f(tuner.u)) - problem.f_star <= COST_GAP * start:
            return float(min(tuner.work.units, budget))
        if tuner.status != "running":
            return budget
    return budget


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def robust_to_settings(seed: Seed) -> dict[str, float]:
    """Share of settings that reach the optimum of the denoising problem, MAID's minus each rival's."""
    own = seed["denoising_maid"]["success"]
    return {f"denoising_{rival}": own - seed[f"denoising_{rival}"]["success"] for rival in RIVALS}


def small_spread(seed: Seed) -> float:
    """Spread of HOAG's final losses over the grid minus that of MAID's."""
    return seed["denoising_hoag_geometric"]["spread"] - seed["denoising_maid"]["spread"]


def blind_logistic(seed: Seed) -> dict[str, float]:
    """Mean log-loss over the grid, each rival's minus MAID's."""
    own = seed["logistic_maid"]["mean_log_loss"]
    rivals = ("hoag_geometric", "fixed_step", "fixed_armijo")
    return {f"logistic_{rival}": seed[f"logistic_{rival}"]["mean_log_loss"] - own for rival in rivals}


def cheaper_than_safe(seed: Seed) -> float:
    """Log ratio of the costs to a relative gap of 5e-3: safe accuracy with the ideal step over MAID."""
    return math.log(seed["quadratic_fixed_step"]["claimed_cost"] / seed["quadratic_maid"]["claimed_cost"])


def as_good_as_search(seed: Seed) -> float:
    """Log-loss of the search minus the median of MAID's over the grid."""
    return math.log(seed["denoising_tpe50"]["f_end"]) - seed["denoising_maid"]["median_log_loss"]


def _mean(seeds: Sequence[Seed], arm: str, metric: str) -> float:
    return statistics.fmean(seed[arm][metric] for seed in seeds)


def worth_learning(seeds: Sequence[Seed]) -> list[Condition]:
    """r2: the start of the denoising problem is far from its optimum."""
    ratio = statistics.fmean(s["denoising_fixed_step"]["f_star"] / s["denoising_fixed_step"]["f_start"] for s in seeds)
    return [Condition("the best loss is at most 0.8 of that at the start", ratio, ratio <= 0.8)]


def sensitive_and_solvable(seeds: Sequence[Seed]) -> list[Condition]:
    """r1 and r2: settings matter for a fixed step, and the budget is enough for others."""
    shares = {name: _mean(seeds, f"denoising_{name}", "success") for name in RIVALS}
    wanted = [
        Condition(
            "a fixed step succeeds with at most 3/4 of the settings", shares["fixed_step"], shares["fixed_step"] <= 0.75
        )
    ]
    for name, words in (("hoag_geometric", "HOAG (geometric)"), ("fixed_armijo", "a fixed accuracy with line search")):
        wanted.append(Condition(f"{words} succeeds with at least 1/20", shares[name], shares[name] >= 0.05))
    return wanted + worth_learning(seeds)


def logistic_learnable(seeds: Sequence[Seed]) -> list[Condition]:
    """r3: with its best setting a fixed step lowers the validation loss by 30 %."""
    arm = "logistic_fixed_step"
    ratio = statistics.fmean(seed[arm]["least_loss"] / seed[arm]["f_start"] for seed in seeds)
    return [Condition("a fixed step's best setting ends at most at 0.7 of the start", ratio, ratio <= 0.7)]


STUDY = Study(
    slug="maid",
    run=run,
    estimands={
        "robust-to-settings": robust_to_settings,
        "small-spread": small_spread,
        "blind-logistic": blind_logistic,
        "cheaper-than-safe": cheaper_than_safe,
        "as-good-as-search": as_good_as_search,
    },
    regimes={
        "robust-to-settings": sensitive_and_solvable,
        "small-spread": sensitive_and_solvable,
        "blind-logistic": logistic_learnable,
        "as-good-as-search": worth_learning,
    },
    exact={"certified-descent": descent_cases, "a-posteriori-bound": bound_cases},
    headline=("success", "share of settings that reach the optimum"),
    figures=figures,
)
