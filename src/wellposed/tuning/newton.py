"""Newton's method with conjugate gradients as inner solver: few, dearer iterations, for stiff problems of moderate size."""

from __future__ import annotations

import torch
from torch import Tensor

from .conjugate_gradient import batched_conjugate_gradient
from .constants import Number
from .lower_level import LowerLevel, Solver, Values
from .strongly_convex import InnerSolution, Watch

SUFFICIENT = 1e-4
"""Share of the predicted decrease that a step must reach (Armijo)."""


def newton_solver(lower: LowerLevel) -> Solver:
    """An inner solver for `lower.solver`: Newton steps whose systems are solved as accurately as they deserve.

    The residual of each system is at most `min(0.5, sqrt|gradient|) |gradient|` (Eisenstat and Walker 1996): superlinear
    near the solution, cheap far away. Steps are halved until the objective falls enough. The certificate is the same as
    that of every solver: the norm of the gradient at the point that is returned.

    Args:
        lower: the inner problem; all its samples take one step size together.

    Returns:
        A function with the arguments of `accelerated_gradient`'s caller. Iterations are counted in gradients: a Hessian
        product counts two, as does an objective with its gradient.

    Example:
        >>> from wellposed import Hyperparameter
        >>> y = torch.tensor([3.0], dtype=torch.float64)
        >>> lower = LowerLevel(lambda x, v: torch.logaddexp(x - y, y - x).sum() + v["ridge"] * x.square().sum(), 0 * y,
        ...                    {"ridge": Hyperparameter(0.01, chart="exp").double()}, lambda v: 2 * v["ridge"],
        ...                    lambda v: 1 + 2 * v["ridge"])
        >>> values = lower.values(lower.u0)
        >>> found = newton_solver(lower)(lower.x0, values, 0.02, 1.02, 1e-8, 1000, None)
        >>> found.status, bool(found.gradient_norms <= 0.02 * 1e-8)
        ('converged', True)
    """

    @torch.no_grad()
    def solve(
        x0: Tensor, values: Values, mu: Number, L: Number, eps: float, limit: int, watch: Watch | None
    ) -> InnerSolution:
        gradient = lower.gradient_at(values)
        kappa = float((torch.as_tensor(L) / torch.as_tensor(mu)).max())
        target = torch.as_tensor(eps * mu)
        x, work = x0, 0
        value = lower.total(x, values)
        while True:
            slope = gradient(x)
            work += 1
            norms = torch.linalg.vector_norm(slope.flatten(1), dim=1)
            if bool((norms <= target).all()):
                return InnerSolution(x, norms, work, "converged")
            if not bool(torch.isfinite(norms).all()):
                return InnerSolution(x, norms, work, "not_finite")
            if work >= limit:
                return InnerSolution(x, norms, work, "limit")
            if watch is not None and work > 1 and watch(x, norms, work):
                return InnerSolution(x, norms, work, "stopped")
            size = float(norms.max())
            wanted = max(min(0.5, size**0.5) * size, 0.3 * float(target.min()))
            found = batched_conjugate_gradient(lower.hessian_at(x, values), slope, wanted, kappa=kappa)
            work += 2 * found.products
            descent = float((slope * found.solution).sum())
            step = 1.0
            while True:
                trial = torch.sub(x, found.solution, alpha=step)
                fresh = lower.total(trial, values)
                work += 1
                # Near the solution the objective no longer resolves the decrease: rounding must not stop a good step.
                slack = 1e-14 * abs(value)
                if fresh <= value - SUFFICIENT * step * descent + slack or step < 1e-8:
                    x, value = trial, fresh
                    break
                step *= 0.5

    return solve
