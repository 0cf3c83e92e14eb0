"""HOAG: hyperparameter optimization with approximate gradients, and accuracies decided beforehand."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from ..bilevel import BilevelProblem
from .inexact_records import MaidInfo
from .inexact_tuner import InexactTuner, check_positive
from .line_search import capped

Schedule = Literal["geometric", "quadratic", "cubic"]
SLACK = 0.25
"""C of the test that lets the step size grow; the value of the author's code."""


def scheduled_accuracy(eps0: float, iteration: int, schedule: Schedule, factor: float = 0.9) -> float:
    """`eps0 factor^k`, `eps0 / (k + 1)^2` or `eps0 / (k + 1)^3` for k = 0, 1, ...

    Example:
        >>> [round(scheduled_accuracy(1.0, 1, s), 3) for s in ("geometric", "quadratic", "cubic")]
        [0.9, 0.25, 0.125]
    """
    if schedule == "geometric":
        return eps0 * factor**iteration
    return eps0 / float(iteration + 1) ** (2 if schedule == "quadratic" else 3)


class HOAG(InexactTuner):
    """Hyperparameter optimization with approximate gradient (HOAG) of Pedregosa 2016 (arXiv 1602.02355).

    The accuracies follow a summable sequence that is chosen beforehand. The step size 1/L adapts by a heuristic: L falls
    by 5 % where the loss behaves as a quadratic bound says, and where it grows by a fifth the step is taken back, L
    doubled and the accuracy halved.

    Against the author's code: a rejected step returns to the point before it (the code stays at the worse one), and
    the quadratic bound is that of the step that was just taken.

    Args:
        problem: as `MAID` takes it.
        eps0: first accuracy of inner solves and residual of adjoint solves.
        schedule: "geometric" (factor 0.9), "quadratic" or "cubic".
        step_scale: the first step size in multiples of `sqrt(p) / |z_0|`, p hyperparameters.
        factor: of the geometric schedule, in (0, 1).
        structure: further arguments of `InexactTuner`.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> from wellposed import Hyperparameter
        >>> from wellposed.tuning import CertifiedProblem, LowerLevel, UpperLoss
        >>> y = torch.ones(2, dtype=torch.float64)
        >>> lower = LowerLevel(
        ...     lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(), 0 * y,
        ...     {"weight": Hyperparameter(1.0, chart="exp")}, mu=lambda v: 1 + v["weight"], L=lambda v: 1 + v["weight"])
        >>> upper = UpperLoss(lambda x: 0.5 * (x - 0.8).square().sum(), L_g=1.0, convex=True)
        >>> tuner = HOAG(CertifiedProblem(lower, upper), eps0=0.1, schedule="cubic")
        >>> tuner.run(max_outer=50)[-1].f_upper < 1e-3
        True
    """

    def __init__(
        self,
        problem: BilevelProblem,
        eps0: float = 0.1,
        schedule: Schedule = "geometric",
        step_scale: float = 1.0,
        factor: float = 0.9,
        **structure: Any,
    ) -> None:
        check_positive("HOAG", eps0=eps0, step_scale=step_scale)
        if schedule not in ("geometric", "quadratic", "cubic"):
            raise ValueError(f"HOAG: schedule must be 'geometric', 'quadratic' or 'cubic', got {schedule!r}")
        if not 0 < factor < 1:
            raise ValueError(f"HOAG: factor must lie in (0, 1), got {factor}")
        self.eps0, self.schedule, self.step_scale, self.factor = float(eps0), schedule, step_scale, factor
        self.iteration, self.eps = 0, float(eps0)
        self.inverse_step = math.nan
        self._again = False
        super().__init__(problem, **structure)

    def _advance(self, info: MaidInfo) -> None:
        if self.point is None or self._again:  # the start, or a point to be solved again after a rejection
            self.point = self.solve_at(self.u, self.x, self.eps)
            self.x, self._again = self.point.x, False
        point = self.point
        self.z = self.hypergradient_at(point, self.eps).z
        z_norm = float(torch.linalg.vector_norm(self.z))
        info.z_norm, info.eps, info.delta = z_norm, self.eps, self.eps
        before, self.iteration = self.eps, self.iteration + 1
        self.eps = self._next_accuracy()
        if z_norm == 0:  # nothing is coupled at this accuracy yet: only the next one can tell
            self._again = True
            return
        if math.isnan(self.inverse_step):
            # Below 1e-3 a first gradient says nothing of scale (the author's guard).
            natural = z_norm / math.sqrt(len(self.z)) if z_norm > 1e-3 else 1.0
            self.inverse_step = natural / self.step_scale
        alpha = capped(1.0 / self.inverse_step, self.z, self.max_step)
        u = torch.sub(point.u, self.z, alpha=alpha)
        moved = self.solve_at(u, point.x, self.eps)
        change = alpha * z_norm
        bound = SLACK * self.eps + before * (SLACK + 1.0) * change - self.inverse_step * change**2
        if moved.upper >= 1.2 * point.upper:
            self.inverse_step *= 2.0
            self.eps *= 0.5
            self._again, info.n_backtrack = True, 1
            return
        if moved.upper <= point.upper + bound:
            self.inverse_step *= 0.95
        self.point, self.u, self.x, info.alpha = moved, u, moved.x, alpha

    def _next_accuracy(self) -> float:
        # The geometric sequence continues from where rejections have left it, as in the author's code.
        if self.schedule == "geometric":
            return self.factor * self.eps
        return scheduled_accuracy(self.eps0, self.iteration, self.schedule)

    def extra_state(self) -> dict[str, Any]:
        own = {"iteration": self.iteration, "eps": self.eps, "inverse_step": self.inverse_step, "again": self._again}
        return {**super().extra_state(), **own}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.iteration, self.eps, self.inverse_step = state["iteration"], state["eps"], state["inverse_step"]
        self._again = state["again"]
