"""The implicit hypergradient from inexact solves, and how far it may be from the exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..numerics.eigenvalues import lanczos
from .conjugate_gradient import batched_conjugate_gradient
from .constants import Number
from .derivative_check import check_second_derivatives
from .lower_level import LowerLevel, SecondDerivatives, UpperLoss

EXACT_NORM_UP_TO = 16
"""Hyperparameters for which the norm of the mixed derivative is computed from its whole Gram matrix."""


def hypergradient_error_bound(
    eps: Number,
    delta: Number,
    mu: Number,
    slope_norm: Number,
    J_norm: Number,
    L_g: Number,
    L_J: Number = 0.0,
    L_Hinv: Number = 0.0,
) -> Number:
    r"""How far the inexact hypergradient of one sample may be from the exact one.

    .. math:: \omega = c\,\varepsilon + \frac{\|J\|}{\mu}\,\delta + \frac{L_J L_g}{\mu}\,\varepsilon^2, \qquad
        c = \frac{L_g \|J\|}{\mu} + L_{H^{-1}} \|\nabla g\| \|J\| + \frac{L_J \|\nabla g\|}{\mu}

    Source: arXiv 2308.10098, theorem 2.1. It bounds the four ways in which `J'q` at the inexact point differs from the
    exact one: the linear solve, the Hessian's inverse, J, and the upper gradient.

    Args:
        eps: distance to the inner minimiser.
        delta: residual norm of the linear system.
        mu: modulus of strong convexity.
        slope_norm: norm of the upper gradient at the inexact point.
        J_norm: spectral norm of the mixed derivative there.
        L_g: Lipschitz constant of the upper gradient.
        L_J, L_Hinv: Lipschitz constants in x of the mixed derivative and of the Hessian's inverse.

    Example:
        >>> hypergradient_error_bound(eps=0.5, delta=0.25, mu=1.0, slope_norm=2.0, J_norm=3.0, L_g=1.0)
        2.25
    """
    rate = L_g * J_norm / mu + L_Hinv * slope_norm * J_norm + L_J * slope_norm / mu
    return rate * eps + J_norm / mu * delta + L_J * L_g / mu * eps * eps


@dataclass(frozen=True)
class Adjoint:
    """The solution of `H q = grad g` and what it gives.

    Attributes:
        z: (p,) the inexact hypergradient, `grad r - mean_i J_i' q_i`.
        q: (samples, *shape), to start the next solve from.
        delta: (samples,), certified residual norms.
        products: Hessian products taken.
        curvature: second derivatives at the point.
    """

    z: Float[Tensor, " p"]
    q: Tensor
    delta: Float[Tensor, " samples"]
    products: int
    curvature: SecondDerivatives


def adjoint_hypergradient(
    lower: LowerLevel,
    x: Tensor,
    u: Tensor,
    slope: Tensor,
    direct: Tensor | None,
    delta: float,
    *,
    start: Tensor | None = None,
    kappa: float | None = None,
    max_iterations: int = 10_000,
) -> Adjoint:
    """Solve the adjoint system by conjugate gradients to residual delta, and take one product with J.

    Raises:
        LinearSolverError: if the Hessian is not positive definite, or the limit is reached.
        ValueError: if the second derivatives contradict the gradient; compared once for each problem.
    """
    curvature = lower.curvature(x, u)
    if not lower.checked:
        check_second_derivatives(lower, x, u, curvature)
        lower.checked = True
    found = batched_conjugate_gradient(
        curvature.hvp, slope, delta, start=start, kappa=kappa, max_iterations=max_iterations
    )
    z = curvature.mixed_vjp(found.solution) / -len(x)
    if direct is not None:
        z = z + direct
    return Adjoint(z, found.solution, found.residual_norms, found.products, curvature)


@dataclass(frozen=True)
class JacobianNorm:
    """Spectral norm of the mixed derivative: one number a sample, or one for all.

    Attributes:
        value: the norm, or an upper bound.
        certified: False where it comes from a few Lanczos steps.
        products: products with J or its transpose.
    """

    value: Number
    certified: bool
    products: int


def jacobian_norm(lower: LowerLevel, x: Tensor, u: Tensor, curvature: SecondDerivatives) -> JacobianNorm:
    """The norm of J that the bound needs: the user's, or for few hyperparameters exact, or 1.1 times Lanczos'.

    The Jacobians of all samples stacked have a norm at least as large as each: with several samples the stacked one is
    used, which keeps the bound valid.
    """
    if lower.J_norm is not None:
        value = lower.J_norm.upper(x if lower.per_sample else x[0], lower.values(u))
        return JacobianNorm(value, lower.J_norm.certified, 0)
    count = len(u)
    # J v as the derivative of the product with J' in its (dummy) argument: reverse mode twice.
    with torch.enable_grad():
        leaf, dummy = u.detach().requires_grad_(), x.detach().requires_grad_()
        value_of = lower._total(dummy, lower.values(leaf))
        gradient = torch.autograd.grad(value_of, dummy, create_graph=True)[0]
        probe = torch.zeros_like(gradient, requires_grad=True)
        pulled = torch.autograd.grad(
            gradient, leaf, probe, create_graph=True, materialize_grads=True, allow_unused=True
        )[0]

    def product(v: Tensor) -> Tensor:
        """J'J v."""
        if not pulled.requires_grad:
            return torch.zeros_like(v)
        pushed = torch.autograd.grad(pulled, probe, v, retain_graph=True)[0]
        return torch.autograd.grad(
            gradient, leaf, pushed, retain_graph=True, materialize_grads=True, allow_unused=True
        )[0]

    if count <= EXACT_NORM_UP_TO:
        gram = torch.stack([product(row) for row in torch.eye(count, dtype=u.dtype, device=u.device)])
        return JacobianNorm(float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()), True, count)
    steps = min(12, count)
    generator = torch.Generator(u.device).manual_seed(0)
    start = torch.randn(count, generator=generator, dtype=u.dtype, device=u.device)
    largest = float(lanczos(product, count, steps, start=start).ritz()[0][-1])
    return JacobianNorm(1.1 * max(0.0, largest) ** 0.5, False, steps)


def implicit_hypergradient(
    lower: LowerLevel, upper: UpperLoss, x: Tensor, u: Tensor | None = None, *, eps: float, delta: float
) -> tuple[Float[Tensor, " p"], float]:
    """The hypergradient at an inexact inner solution, with a bound of its error: `(z, omega)`.

    Args:
        lower, upper: the problem.
        x: inner point, within `eps` of the minimiser at u (as `solve_strongly_convex` certifies).
        u: unconstrained hyperparameters, (p,); the present ones by default.
        eps: that distance, >= 0.
        delta: residual to which the adjoint system is solved, > 0.

    Returns:
        z, (p,), and omega with `|z - grad f(u)| <= omega`; infinite where L_J or L_Hinv are not known.

    Raises:
        LinearSolverError: if the Hessian is not positive definite.
        ValueError: for eps < 0, delta <= 0.

    Example:
        >>> from wellposed import Hyperparameter
        >>> y = torch.ones(1, dtype=torch.float64)
        >>> lower = LowerLevel(lambda x, v: 0.5 * (x - v["c"] * y).square().sum(), 0 * y,
        ...                    {"c": Hyperparameter(2.0, low=-9, high=9, chart="sigmoid").double()}, 1.0, 1.0,
        ...                    quadratic=True, L_J=0.0)
        >>> loss = UpperLoss(lambda x: 0.5 * x.square().sum(), L_g=1.0, convex=True)
        >>> z, omega = implicit_hypergradient(lower, loss, 2 * y, eps=0.0, delta=1e-9)
        >>> bool(omega < 1e-8)
        True
    """
    if not eps >= 0 or not delta > 0:
        raise ValueError(f"implicit_hypergradient: eps must be >= 0 and delta > 0, got {eps} and {delta}")
    point = x if lower.per_sample else x[None]
    theta = lower.u0 if u is None else u
    _, slope = upper.value_and_gradient(point, lower.per_sample)
    direct = upper.direct(lower, point, theta)[1]
    found = adjoint_hypergradient(lower, point, theta, slope, direct, delta)
    return found.z, error_of(lower, upper, point, theta, slope, torch.full((len(point),), eps).to(point), found)[0]


def error_of(
    lower: LowerLevel, upper: UpperLoss, x: Tensor, u: Tensor, slope: Tensor, eps: Tensor, found: Adjoint
) -> tuple[float, JacobianNorm]:
    """The bound, averaged over samples; infinite where a constant is missing."""
    norm = jacobian_norm(lower, x, u, found.curvature)
    if lower.L_J is None or lower.L_Hinv is None:
        return float("inf"), norm
    values = lower.values(u)
    slopes = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    bound = hypergradient_error_bound(
        eps, found.delta, lower.mu.lower(values), slopes, norm.value,
        upper.L_g.upper(), lower.L_J.upper(values), lower.L_Hinv.upper(values),
    )  # fmt: skip
    return float(torch.as_tensor(bound).mean()), norm
