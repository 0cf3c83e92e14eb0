"""MAID's exact claims: every certificate of a run held against closed forms."""

from __future__ import annotations

import math
from functools import lru_cache

from ...lab.study import Case
from ...lab.trial import Trial
from ...tuning import MAID
from .bilevel_reference import first_step_size
from .decoupled_quadratic import DecoupledQuadratic
from .log_cosh import LogCosh
from .maid_grid import GRID, grid_of

CONDITIONS = (10.0, 30.0, 100.0)
EXACT_STEPS = 4
"""Outer steps of each run that is held against closed forms."""


class Certificates:
    """What a run on a problem with closed forms showed.

    Attributes:
        steps: accepted steps.
        descent: largest excess of the exact loss over the certified decrease, in its units.
        bound: largest excess of the true error of z over omega, relative to omega.
        slope: largest shortfall of `<z, grad f>` below `eta |z|^2`, relative to |z|^2.
        f_start: exact loss at the start.
    """

    def __init__(self, f_start: float) -> None:
        self.steps, self.descent, self.bound, self.slope, self.f_start = 0, 0.0, 0.0, 0.0, f_start


def certificates(
    problem: DecoupledQuadratic | LogCosh, eps: float, alpha: float, checked: bool, steps: int = EXACT_STEPS
) -> Certificates:
    """Run MAID for some steps, and hold every certificate against the closed forms."""
    tuner = MAID(problem.levels(), eps, eps, alpha, check_descent=checked)
    before = tuner.u
    f_before = float(problem.f(before))
    found = Certificates(f_before)
    for _ in range(steps):
        info = tuner.step()
        if tuner.z is not None and checked and not math.isnan(info.omega):
            true = problem.gradient(before)
            error = float((tuner.z - true).norm())
            found.bound = max(found.bound, (error - info.omega) / max(info.omega, 1e-300))
            if info.alpha > 0:
                found.slope = max(found.slope, tuner.eta - float(tuner.z @ true) / info.z_norm**2)
        if info.alpha > 0:
            f_after = float(problem.f(tuner.u))
            found.steps += 1
            found.descent = max(found.descent, f_after - f_before + tuner.armijo * info.alpha * info.z_norm**2)
            before, f_before = tuner.u, f_after
        if tuner.status != "running":
            break
    return found


def all_certificates(trial: Trial) -> dict[str, float]:
    """The exact claims in the full product: conditions x settings x both test modes; the cases are a part of it."""
    steps, worst, bound = 0, 0.0, 0.0
    for condition in CONDITIONS:
        problem = DecoupledQuadratic(trial.seed, condition)
        natural = first_step_size(problem.levels())
        for _, eps, size in grid_of(trial):
            for checked in (True, False):
                found = certificates(problem, eps, size * natural, checked)
                steps += found.steps
                worst, bound = max(worst, found.descent / found.f_start), max(bound, found.bound)
    return {"certified_steps": float(steps), "descent_excess": worst, "bound_excess": bound}


@lru_cache(maxsize=1)
def exact_runs() -> list[tuple[str, Certificates, bool]]:
    """Every condition, setting and mode once, on one of the twelve evaluation seeds in turn; then the curved problem."""
    runs = []
    number = 0
    for condition in CONDITIONS:
        problems = {seed: DecoupledQuadratic(seed, condition) for seed in range(1000, 1012)}
        naturals = {seed: first_step_size(problem.levels()) for seed, problem in problems.items()}
        for eps, size in GRID:
            for checked in (True, False):
                seed = 1000 + number % 12
                number += 1
                name = f"quadratic, condition {condition:g}, eps {eps:g}, step {size:g}, test {'on' if checked else 'off'}, seed {seed}"
                runs.append((name, certificates(problems[seed], eps, size * naturals[seed], checked), checked))
    for seed in range(1000, 1012):
        runs.append((f"log cosh, seed {seed}", certificates(LogCosh(seed), 0.1, 1.0, True), True))
    return runs


def descent_cases() -> list[Case]:
    """Every accepted step lowers the exact loss by at least armijo alpha |z|^2."""
    return [
        Case(name, max(0.0, found.descent), 1e-12 * found.f_start)
        for name, found, _ in exact_runs()
        if name.startswith("quadratic")
    ]


def bound_cases() -> list[Case]:
    """The error of the hypergradient never exceeds omega; after the test the direction descends."""
    cases = []
    for name, found, checked in exact_runs():
        if checked:
            cases.append(Case(f"{name}: error over omega", max(0.0, found.bound), 1e-10))
            cases.append(Case(f"{name}: eta minus slope over |z|^2", max(0.0, found.slope), 1e-10))
    return cases
