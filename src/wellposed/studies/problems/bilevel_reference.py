"""What bilevel methods are measured by: the best loss that is known, the scale of a first step, and a search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ...tuning import CertifiedProblem, FixedStep
from .variational_denoising import LOG_SMOOTHING, LOG_WEIGHT, VariationalDenoising

LOG_WEIGHTS = tuple(range(-6, 2))
LOG_SMOOTHINGS = (-8.0, -6.5, -5.0, -3.5, -2.0, -0.5)
"""The grid on which the search for the optimum starts, and the box of the random search."""


@dataclass(frozen=True)
class Reference:
    """Where a problem starts, and how low it can go.

    Attributes:
        f_start, f_star: upper losses at the start and at the best point known.
        natural: first step size that moves the fastest hyperparameter by one.
    """

    f_start: float
    f_star: float
    natural: float

    def gap(self, f: float) -> float:
        """0 at the best loss known, 1 at the start.

        Example:
            >>> Reference(10.0, 2.0, 1.0).gap(3.0)
            0.125
        """
        return (f - self.f_star) / (self.f_start - self.f_star)


def first_step_size(problem: CertifiedProblem) -> float:
    """`1 / |z_0|_inf` for the hypergradient at the start, computed to 1e-6."""
    probe = FixedStep(problem, eps=1e-6, alpha=1e-300)
    probe.run(max_outer=1)
    assert probe.z is not None
    return 1.0 / float(probe.z.abs().max())


def denoising_reference(problem: VariationalDenoising) -> Reference:
    """The best of a two-dimensional grid, improved by Nelder and Mead's simplex.

    Every evaluation starts from the image of the one before: the grid is walked in a snake.
    """
    last = problem.noisy

    def loss(raw: np.ndarray, eps: float = 1e-3) -> float:
        nonlocal last
        # Outside of the box nothing is gained, and the inner problem becomes ever stiffer.
        if not (-8.0 <= raw[0] <= 2.0 and -10.0 <= raw[1] <= 1.0):
            return math.inf
        last, _ = problem.denoised(torch.tensor(raw, dtype=torch.float64), eps, start=last)
        return 0.5 * float((last - problem.clean).square().sum()) / len(last)

    walk = [(w, s) for i, w in enumerate(LOG_WEIGHTS) for s in (LOG_SMOOTHINGS if i % 2 else LOG_SMOOTHINGS[::-1])]
    best = min(walk, key=lambda raw: loss(np.array(raw), 3e-2))
    found = minimize(loss, np.array(best), method="Nelder-Mead", options={"xatol": 1e-2, "fatol": 1e-4})
    start = torch.tensor([LOG_WEIGHT, LOG_SMOOTHING], dtype=torch.float64)
    return Reference(problem.f(start), float(found.fun), first_step_size(problem.levels()))


@dataclass(frozen=True)
class Found:
    """The best point of a search.

    Attributes:
        raw: (2,) unconstrained hyperparameters.
        f: upper loss there.
        units: gradients that all evaluations took.
    """

    raw: Tensor
    f: float
    units: int


def search_by_tpe(problem: VariationalDenoising, seed: int, evaluations: int, eps: float = 1e-3) -> Found:
    """Optuna's TPE in the box of the grid, starting where the other arms start; warm inner solves."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({"log_weight": LOG_WEIGHT, "log_smoothing": LOG_SMOOTHING})
    last, units = problem.noisy, 0
    for _ in range(evaluations):
        proposal = study.ask()
        raw = torch.tensor(
            [
                proposal.suggest_float("log_weight", LOG_WEIGHTS[0], LOG_WEIGHTS[-1]),
                proposal.suggest_float("log_smoothing", LOG_SMOOTHINGS[0], LOG_SMOOTHINGS[-1]),
            ],
            dtype=torch.float64,
        )
        last, taken = problem.denoised(raw, eps, start=last)
        units += taken + 1
        study.tell(proposal, 0.5 * float((last - problem.clean).square().sum()) / len(last))
    best = torch.tensor([study.best_params["log_weight"], study.best_params["log_smoothing"]], dtype=torch.float64)
    return Found(best, problem.f(best), units)
