"""Minimisation of strongly convex functions to a certified distance, many independent ones at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .constants import Number

Gradient = Callable[[Tensor], Tensor]
Watch = Callable[[Tensor, Tensor, int], bool]
"""`watch(points, gradient norms, iterations) -> whether to stop`."""


FIRST_LOOK = 16
"""Iteration after which a solver asks its watch for the first time."""


def next_look(look: int) -> int:
    """The iteration of the next question: half as many again.

    Example:
        >>> next_look(FIRST_LOOK)
        24
    """
    return look + look // 2


class InnerSolverError(ArithmeticError):
    """An inner problem was not solved to the accuracy asked for.

    Attributes:
        theta: unconstrained hyperparameters at which it happened, or None.
        kappa: condition number L / mu.
        residual: largest gradient norm reached.
    """

    def __init__(self, message: str, theta: Tensor | None = None, kappa: float = math.nan, residual: float = math.nan):
        super().__init__(message)
        self.theta, self.kappa, self.residual = theta, kappa, residual


@dataclass(frozen=True)
class InnerSolution:
    """What a solver of the inner problem returns.

    Attributes:
        x: (samples, *shape), one point a sample.
        gradient_norms: (samples,), the norm of the gradient AT these points.
        iterations: gradients computed.
        status: "converged", "stopped" (by the watch), "limit" or "not_finite".
    """

    x: Tensor
    gradient_norms: Float[Tensor, " samples"]
    iterations: int
    status: Literal["converged", "stopped", "limit", "not_finite"]


@torch.no_grad()
def accelerated_gradient(
    gradient: Gradient,
    x0: Float[Tensor, " samples *shape"],
    mu: Number,
    L: Number,
    eps: float,
    *,
    max_iterations: int,
    watch: Watch | None = None,
) -> InnerSolution:
    r"""Nesterov's accelerated gradient with the constant momentum of strongly convex functions, on many samples at once.

    .. math:: z_t = x_t + \tfrac{\sqrt\kappa - 1}{\sqrt\kappa + 1}(x_t - x_{t-1}), \qquad
        x_{t+1} = z_t - \nabla h(z_t) / L, \qquad \kappa = L / \mu

    until ``|grad h(z_t)| <= eps * mu`` for every sample; a sample keeps its first point that passes. The gradient is
    tested at z_t and z_t is returned: the certificate belongs to the point that is handed out, at one gradient an
    iteration (Nesterov 2004, section 2.2.1, scheme III).

    Args:
        gradient: of all samples, ``(samples, *shape) -> (samples, *shape)``.
        x0: starting points.
        mu, L: moduli of strong convexity and smoothness, numbers or ``(samples,)``.
        eps: distance to the minimiser that is asked for.
        max_iterations: limit of gradients.
        watch: asked after iterations 16, 24, 36, ... (it costs about a gradient); ends the solve when it says so.

    Example:
        >>> found = accelerated_gradient(lambda x: x - 3.0, torch.zeros(1, 2), 1.0, 2.0, 1e-3, max_iterations=100)
        >>> bool((found.x - 3.0).norm() <= 1e-3), found.status
        (True, 'converged')
    """
    if isinstance(mu, float) and isinstance(L, float):
        momentum: Number = _momentum(L / mu)
        step: Number = 1.0 / L
    else:
        wide = (-1, *(1,) * (x0.ndim - 1))
        mu, L = torch.as_tensor(mu).to(x0), torch.as_tensor(L).to(x0)
        root = (L / mu).sqrt()
        momentum = ((root - 1) / (root + 1)).reshape(wide) if root.ndim else (root - 1) / (root + 1)
        step = (1.0 / L).reshape(wide) if L.ndim else 1.0 / L
    target = eps * mu
    x = z = x0
    kept: Tensor | None = None  # points of samples that have passed while others have not
    kept_norms = passed = x0.new_zeros(0)
    look = FIRST_LOOK
    for iteration in range(1, max_iterations + 1):
        slope = gradient(z)
        norms = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        now = norms <= target
        if kept is not None:
            fresh = now & ~passed
            kept[fresh], kept_norms[fresh] = z[fresh], norms[fresh]
            passed = passed | fresh
            if bool(passed.all()):
                return InnerSolution(kept, kept_norms, iteration, "converged")
        elif bool(now.all()):
            return InnerSolution(z, norms, iteration, "converged")
        elif len(norms) > 1 and bool(now.any()):
            kept, kept_norms, passed = z.clone(), norms.clone(), now
        if iteration == look:
            look = next_look(look)
            if not bool(torch.isfinite(norms).all()):
                return InnerSolution(z, norms, iteration, "not_finite")
            if watch is not None and watch(z, norms, iteration):
                return InnerSolution(z, norms, iteration, "stopped")
        before, x = x, torch.sub(z, slope, alpha=step) if isinstance(step, float) else z - step * slope
        z = torch.add(x, x - before, alpha=momentum) if isinstance(momentum, float) else x + momentum * (x - before)
    finite = bool(torch.isfinite(norms).all())
    if kept is not None:
        kept[~passed], kept_norms[~passed] = z[~passed], norms[~passed]
    return InnerSolution(
        z if kept is None else kept,
        norms if kept is None else kept_norms,
        max_iterations,
        "limit" if finite else "not_finite",
    )


def _momentum(kappa: float) -> float:
    root = math.sqrt(max(1.0, kappa))
    return (root - 1.0) / (root + 1.0)


@dataclass(frozen=True)
class StronglyConvexSolution:
    """A point with its certificate.

    Attributes:
        x: the point, of the start's shape.
        eps: certified distance to the minimiser, |gradient| / mu; one number a sample where there are several.
        iterations: gradients computed.
    """

    x: Tensor
    eps: Tensor
    iterations: int


def solve_strongly_convex(
    objective: Callable[[Tensor], Tensor],
    x0: Tensor,
    mu: Number,
    L: Number,
    eps: float,
    *,
    per_sample: bool = False,
    max_iterations: int = 100_000,
) -> StronglyConvexSolution:
    """Minimise a strongly convex, smooth function until the minimiser is certainly within `eps`.

    Strong convexity turns the gradient into a certificate: `|x - argmin| <= |gradient(x)| / mu`.

    Args:
        objective: differentiable function of a tensor of x0's shape; returns a scalar, or with `per_sample` one number
            a sample, each depending on its own sample only.
        x0: start, of floating dtype; with `per_sample` its first axis counts the samples.
        mu, L: moduli of strong convexity and smoothness (mu <= L); with `per_sample` also one a sample.
        eps: distance asked for, > 0.
        per_sample: solve many independent problems at once; each stops by itself.
        max_iterations: limit of gradients.

    Raises:
        ValueError: for mu <= 0, L < mu, eps <= 0 or a dtype that is not floating.
        InnerSolverError: if the limit is reached, or a gradient is not finite; carries kappa and the residual.

    Example:
        >>> b = torch.tensor([1.0, 2.0])
        >>> found = solve_strongly_convex(lambda x: 0.5 * (x - b).square().sum() + x[0] ** 2, torch.zeros(2), 1, 3, 1e-6)
        >>> found.x, bool(found.eps <= 1e-6)
        (tensor([0.3333, 2.0000]), True)
    """
    check_problem("solve_strongly_convex", x0, mu, L, eps)

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def gradient(x: Tensor) -> Tensor:
        leaf = (x if per_sample else x[0]).detach().requires_grad_()
        value = objective(leaf)
        if value.shape != (x.shape[:1] if per_sample else ()):
            wanted = f"({len(x)},), one a sample" if per_sample else "()"
            raise ValueError(f"solve_strongly_convex: objective must return shape {wanted}, got {tuple(value.shape)}")
        found = torch.autograd.grad(value.sum(), leaf)[0]
        return found if per_sample else found[None]

    start = x0.detach() if per_sample else x0.detach()[None]
    moduli = (mu if isinstance(mu, Tensor) else float(mu)), (L if isinstance(L, Tensor) else float(L))
    found = accelerated_gradient(gradient, start, *moduli, eps, max_iterations=max_iterations)
    if found.status != "converged":
        raise unsolved("solve_strongly_convex", found, *moduli, eps)
    distance = found.gradient_norms / torch.as_tensor(mu).to(found.gradient_norms)
    return StronglyConvexSolution(
        found.x if per_sample else found.x[0], distance if per_sample else distance[0], found.iterations
    )


def check_problem(owner: str, x0: Tensor, mu: Any, L: Any, eps: float) -> None:
    """Raise unless moduli, accuracy and dtype make sense.

    Raises:
        ValueError: naming owner, argument and value.
    """
    if not x0.is_floating_point():
        raise ValueError(f"{owner}: x0 must be of a floating dtype, got {x0.dtype}")
    low, high = torch.as_tensor(mu, dtype=torch.float64), torch.as_tensor(L, dtype=torch.float64)
    if not bool((low > 0).all() & torch.isfinite(low).all()):
        raise ValueError(f"{owner}: mu must be > 0 and finite (the inner problem must be strongly convex), got {mu}")
    if not bool((high >= low).all() & torch.isfinite(high).all()):
        raise ValueError(f"{owner}: L must be >= mu and finite, got L = {L} with mu = {mu}")
    if not eps > 0:
        raise ValueError(f"{owner}: eps must be > 0, got {eps}")


def unsolved(
    owner: str, found: InnerSolution, mu: Number, L: Number, eps: float, theta: Tensor | None = None
) -> InnerSolverError:
    """The error that says where and how far an inner solve failed."""
    kappa = float((torch.as_tensor(L) / torch.as_tensor(mu)).max())
    residual = float(found.gradient_norms.max())
    where = "" if theta is None else f" at theta = {shown(theta)}"
    reason = "a gradient is not finite" if found.status == "not_finite" else "the limit of iterations is reached"
    return InnerSolverError(
        f"{owner}: the inner problem was not solved{where}: {reason} after {found.iterations} gradients; kappa = "
        f"{kappa:.3g}, |gradient| = {residual:.3g}, asked for {float((eps * torch.as_tensor(mu)).min()):.3g}. Raise the "
        "limit or the accuracy's floor, or check that mu and L are true moduli",
        theta, kappa, residual,
    )  # fmt: skip


def shown(theta: Tensor) -> str:
    """A vector for a message: its numbers, or size and range of a long one."""
    values = theta.detach().reshape(-1)
    if len(values) <= 8:
        return "[" + ", ".join(f"{float(v):.4g}" for v in values) + "]"
    return f"{len(values)} numbers in [{float(values.min()):.4g}, {float(values.max()):.4g}]"
