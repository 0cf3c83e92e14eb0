"""Descent on hyperparameters with one accuracy for ever: what most code does, and the rivals that MAID is measured by."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..bilevel import BilevelProblem
from .inexact_records import MaidInfo
from .inexact_tuner import InexactTuner, check_positive
from .line_search import Accepted, backtrack, capped


class FixedStep(InexactTuner):
    """Gradient descent on hyperparameters with implicit gradients of one accuracy, and one step size.

    Args:
        problem: as `MAID` takes it.
        eps: accuracy of inner solves; the adjoint system is solved to the same residual, or to `delta`.
        alpha: step size.
        delta: residual of the adjoint solves.
        structure: further arguments of `InexactTuner`: `max_step`, `mu`, `on_uncertified`, ...

    Raises:
        ValueError: for a number that is not > 0, and as `InexactTuner`.

    Example:
        >>> from wellposed import Hyperparameter
        >>> from wellposed.tuning import CertifiedProblem, LowerLevel, UpperLoss
        >>> y = torch.ones(2, dtype=torch.float64)
        >>> lower = LowerLevel(
        ...     lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(), 0 * y,
        ...     {"weight": Hyperparameter(1.0, chart="exp")}, mu=lambda v: 1 + v["weight"], L=lambda v: 1 + v["weight"])
        >>> upper = UpperLoss(lambda x: 0.5 * (x - 0.8).square().sum(), L_g=1.0, convex=True)
        >>> tuner = FixedStep(CertifiedProblem(lower, upper), eps=1e-4, alpha=10.0)
        >>> tuner.run(max_outer=50)[-1].f_upper < 1e-6
        True
    """

    def __init__(
        self, problem: BilevelProblem, eps: float, alpha: float, delta: float | None = None, **structure: Any
    ) -> None:
        check_positive(type(self).__name__, eps=eps, alpha=alpha, delta=delta)
        self.eps, self.alpha, self.delta = float(eps), float(alpha), float(eps if delta is None else delta)
        super().__init__(problem, **structure)

    def _advance(self, info: MaidInfo) -> None:
        self._look_along(info)
        assert self.point is not None and self.z is not None
        alpha = capped(self.alpha, self.z, self.max_step)
        u = torch.sub(self.point.u, self.z, alpha=alpha)
        self.point = self.solve_at(u, self.point.x, self.eps)
        self.u, self.x, info.alpha = u, self.point.x, alpha

    def _look_along(self, info: MaidInfo) -> None:
        """The hypergradient at the present point."""
        if self.point is None:
            self.point = self.solve_at(self.u, self.x, self.eps)
            self.x = self.point.x
        self.z = self.hypergradient_at(self.point, self.delta).z
        info.z_norm, info.eps, info.delta = float(torch.linalg.vector_norm(self.z)), self.eps, self.delta
        if info.z_norm <= self.tol and info.z_norm > 0:
            self.status = "converged"

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "alpha": self.alpha}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.alpha = state["alpha"]


class FixedArmijo(FixedStep):
    """Descent with one accuracy and MAID's certified line search: the strongest of the simple rivals.

    Where no step size can be certified at this accuracy it has stalled, for good.

    Args:
        problem, eps, delta, structure: as of `FixedStep`.
        alpha: first step size.
        rho, rho_up: factors of the step size in backtracking and after a step.
        armijo: share of `alpha |z|^2` by which the loss must fall.
        max_bt: trial steps.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        eps: float,
        alpha: float,
        delta: float | None = None,
        rho: float = 0.5,
        rho_up: float = 1.5,
        armijo: float = 0.1,
        max_bt: int = 15,
        **structure: Any,
    ) -> None:
        if not 0 < rho < 1 or not 0 < armijo < 1 or not rho_up > 1:
            raise ValueError(
                f"FixedArmijo: rho and armijo must lie in (0, 1) and rho_up be > 1, got {rho}, {armijo} and {rho_up}"
            )
        if not isinstance(max_bt, int) or max_bt < 1:
            raise ValueError(f"FixedArmijo: max_bt must be an integer >= 1, got {max_bt!r}")
        self.rho, self.rho_up, self.armijo, self.max_bt = rho, rho_up, armijo, max_bt
        super().__init__(problem, eps, alpha, delta, **structure)

    def _advance(self, info: MaidInfo) -> None:
        self._look_along(info)
        if self.status != "running":
            return
        assert self.point is not None and self.z is not None
        if not 0 < info.z_norm < math.inf:
            self.status = "stalled"
            return
        alpha = capped(self.alpha, self.z, self.max_step)
        found = backtrack(
            self, self.point, self.z, alpha, self.eps, trials=self.max_bt, shrink=self.rho, armijo=self.armijo
        )
        if not isinstance(found, Accepted):
            info.n_backtrack, self.status = found, "stalled"
            return
        info.alpha, info.n_backtrack = found.alpha, found.rejected
        self.point, self.u, self.x = found.point, found.point.u, found.point.x
        self.alpha = self.rho_up * found.alpha
