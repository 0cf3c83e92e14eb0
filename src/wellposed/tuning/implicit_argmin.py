"""`argmin`: the minimiser of a strongly convex function as a differentiable function of what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .conjugate_gradient import batched_conjugate_gradient
from .strongly_convex import check_problem, solve_strongly_convex

Objective = Callable[[Tensor, Tensor], Tensor]


class _ArgMin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, objective: Objective, x0: Tensor, mu: float, L: float, options: dict[str, Any]
    ) -> Tensor:
        fixed = theta.detach()
        found = solve_strongly_convex(
            lambda x: objective(x, fixed), x0, mu, L, options["eps"], max_iterations=options["max_iterations"]
        )
        ctx.objective, ctx.options, ctx.kappa = objective, options, L / mu
        ctx.save_for_backward(found.x, fixed)
        return found.x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, theta = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            slope = torch.autograd.grad(ctx.objective(x, theta), x, create_graph=True)[0]

        def pulled(vector: Tensor, of: Tensor) -> Tensor:
            if not slope.requires_grad:
                return torch.zeros_like(of)
            return torch.autograd.grad(slope, of, vector, retain_graph=True, allow_unused=True, materialize_grads=True)[
                0
            ]

        q = batched_conjugate_gradient(
            lambda v: pulled(v[0], x)[None], cotangent[None], ctx.options["delta"], kappa=ctx.kappa
        ).solution[0]
        return -pulled(q, theta), None, None, None, None, None


def argmin(
    objective: Objective,
    theta: Tensor,
    x0: Tensor,
    mu: float,
    L: float,
    *,
    eps: float = 1e-6,
    delta: float = 1e-6,
    max_iterations: int = 100_000,
) -> Tensor:
    """`argmin over x of objective(x, theta)`, to a certified accuracy, differentiable once in theta.

    The backward pass solves one linear system with the Hessian by conjugate gradients (the implicit function theorem),
    so that memory does not depend on how many iterations the forward pass took.

    Args:
        objective: `(x, theta) -> scalar`, twice differentiable, mu-strongly convex and L-smooth in x.
        theta: what the minimiser is differentiated in, of any shape.
        x0: start.
        mu, L: the moduli at this theta.
        eps: distance to the minimiser, > 0.
        delta: residual of the linear system, > 0, in units of the incoming gradient.
        max_iterations: limit of the forward pass.

    Raises:
        InnerSolverError: if the minimiser is not reached.
        LinearSolverError: in the backward pass, if the Hessian is not positive definite.
        ValueError: for moduli or accuracies out of range.

    Example:
        >>> theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> ridge = lambda x, t: 0.5 * (x - 3.0).square().sum() + 0.5 * t * x.square().sum()
        >>> x = argmin(ridge, theta, torch.zeros(1, dtype=torch.float64), mu=3.0, L=3.0)   # 3 / (1 + theta)
        >>> x.sum().backward()
        >>> x.item(), round(theta.grad.item(), 6)
        (1.0, -0.333333)
    """
    check_problem("argmin", x0, mu, L, eps)
    if not delta > 0:
        raise ValueError(f"argmin: delta must be > 0, got {delta}")
    options = {"eps": eps, "delta": delta, "max_iterations": max_iterations}
    found: Tensor = _ArgMin.apply(theta, objective, x0.detach(), float(mu), float(L), options)  # type: ignore[no-untyped-call]
    return found
