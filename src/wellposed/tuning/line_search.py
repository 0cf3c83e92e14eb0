"""Backtracking along the inexact hypergradient, with accepted steps that certainly lower the exact upper loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .constants import Number
from .inexact_records import Point
from .inexact_tuner import InexactTuner
from .strongly_convex import InnerSolverError, Watch
from .sufficient_decrease import certified_change, lower_value, upper_value


@dataclass(frozen=True)
class Accepted:
    """The step that a line search took.

    Attributes:
        point: the new point.
        alpha: step size.
        rejected: trial steps before it.
    """

    point: Point
    alpha: float
    rejected: int


def bounds_of(tuner: InexactTuner, point: Point) -> tuple[float, float]:
    """Lower and upper bound of the exact upper loss at a point's hyperparameters."""
    upper = tuner.upper
    constant = upper.L_g.upper()
    low = lower_value(point.loss, point.slope_norm, point.eps, constant, upper.convex).mean()
    high = upper_value(point.loss, point.slope_norm, point.eps, constant).mean()
    return float(low) + point.penalty, float(high) + point.penalty


def capped(alpha: float, z: Tensor, max_step: float) -> float:
    """The step size, made smaller where a hyperparameter would move by more than `max_step` (in chart units).

    With log-weights a huge first trial makes mu vanish or L overflow; the inner solve at that hopeless point would eat
    the whole budget before backtracking could reject it.

    Example:
        >>> capped(1.0, torch.tensor([4.0]), max_step=2.0)
        0.5
    """
    largest = float(z.abs().max())
    return min(alpha, max_step / largest) if largest > 0 else alpha


def backtrack(
    tuner: InexactTuner,
    point: Point,
    z: Tensor,
    alpha: float,
    eps: float,
    *,
    trials: int,
    shrink: float,
    armijo: float,
    reference: float | None = None,
) -> Accepted | int:
    """Try step sizes `alpha * shrink^i`, each with an inner solve to `eps`, until one certainly decreases enough.

    A trial whose inner solve fails is rejected; one that leaves the inner solution where it is ends the search; one is cut short as soon as any inner iterate proves that it would be
    rejected, since every iterate bounds the exact loss there from below.

    Args:
        tuner: solves and counts.
        point: where the search starts.
        z: hypergradient there.
        alpha: largest step size.
        eps: accuracy of the trial solves.
        trials: how many step sizes.
        shrink: factor between them.
        armijo: share of `alpha |z|^2` by which the loss must fall.
        reference: value to fall below; the lower bound of the loss at `point` by default.

    Returns:
        The accepted step, or the number of rejected trials.

    Raises:
        BudgetExhausted: if the budget ends.
    """
    z_norm = float(torch.linalg.vector_norm(z))
    floor = bounds_of(tuner, point)[0]
    goal = floor if reference is None else max(floor, reference)
    rejected = 0
    for _ in range(trials):
        u = torch.sub(point.u, z, alpha=alpha)
        try:
            trial = tuner.solve_at(u, point.x, eps, partial(_hopeless, tuner, u, goal - armijo * alpha * z_norm**2))
        except InnerSolverError:
            trial = None
        if trial is not None:
            if certified_change(bounds_of(tuner, trial)[1], goal, alpha, z_norm, armijo) <= 0:
                return Accepted(trial, alpha, rejected)
            if torch.equal(trial.x, point.x):
                # The accuracy is too coarse to see the step at all: the old inner solution does for the new
                # hyperparameters, and does all the more for those of a shorter step. None can be certified.
                return rejected + 1
        rejected += 1
        alpha *= shrink
    return rejected


def _hopeless(tuner: InexactTuner, u: Tensor, goal: float, mu: Number) -> Watch:
    """Ends a trial solve that can only be rejected."""
    penalty = tuner.upper.direct(tuner.lower, tuner.x, u)[0]

    def watch(x: Tensor, norms: Tensor, iterations: int) -> bool:
        loss, slope = tuner.upper_gradient(x, u)
        slopes = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        least = lower_value(loss, slopes, norms / mu, tuner.upper.L_g.upper(), tuner.upper.convex).mean()
        return float(least) + penalty > goal

    return watch
