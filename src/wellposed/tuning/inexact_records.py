"""What tuners with inexact inner solves record: work, points with their certificates, and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ..tuner import StepInfo

Status = Literal["running", "converged", "attainable accuracy reached", "stalled", "budget"]


@dataclass
class Work:
    """What was computed, in passes over all data.

    Attributes:
        inner: gradients of the inner objective.
        hvp: Hessian products.
        mixed: products with the mixed derivative.
        upper: gradients of the upper loss.
        norm: products for the norm of the mixed derivative.
    """

    inner: int = 0
    hvp: int = 0
    mixed: int = 0
    upper: int = 0
    norm: int = 0

    @property
    def units(self) -> int:
        """In gradients: a Hessian product counts two, as does one for the norm."""
        return self.inner + 2 * self.hvp + self.mixed + self.upper + 2 * self.norm


class BudgetExhausted(Exception):
    """The budget ended inside a solve; the tuner stands where it stood before."""


@dataclass(frozen=True)
class Point:
    """Hyperparameters, the inner solution there, and what is certain about the upper loss.

    Attributes:
        u: (p,) unconstrained hyperparameters.
        x: (samples, *shape) inner points.
        eps: (samples,) certified distances to the minimisers: |gradient| / mu, as delivered, not as asked for.
        loss: (samples,) upper losses.
        slope: their gradients in x.
        slope_norm: (samples,).
        penalty: r(u).
        direct: (p,) gradient of r, or None.
        kappa: condition number of the inner problem.
    """

    u: Tensor
    x: Tensor
    eps: Float[Tensor, " samples"]
    loss: Float[Tensor, " samples"]
    slope: Tensor
    slope_norm: Float[Tensor, " samples"]
    penalty: float
    direct: Tensor | None
    kappa: float

    @property
    def upper(self) -> float:
        """The upper loss as it looks from here, mean over the samples."""
        return float(self.loss.mean()) + self.penalty


@dataclass
class MaidInfo(StepInfo):
    """What one outer step saw and did.

    Attributes:
        f_upper: upper loss after the step, at the inexact inner solution.
        f_lower: inner objective there, mean over the samples.
        z_norm: norm of the hypergradient.
        omega: bound of its error; NaN where it was not formed.
        eps, delta: accuracies of inner and adjoint solve that the step used.
        alpha: step size that was taken; 0 if none was.
        n_inner, n_hvp: inner gradients and Hessian products of this step.
        n_backtrack: trial steps that were rejected.
        units: work since the start, see `Work`.
        certified: whether every constant behind the bounds is known.
        status: "running", or why the tuner will not move any more.
    """

    f_upper: float = math.nan
    f_lower: float = math.nan
    z_norm: float = math.nan
    omega: float = math.nan
    eps: float = math.nan
    delta: float = math.nan
    alpha: float = 0.0
    n_inner: int = 0
    n_hvp: int = 0
    n_backtrack: int = 0
    units: int = 0
    certified: bool = True
    status: Status = "running"
