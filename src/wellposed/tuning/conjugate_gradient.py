"""Conjugate gradients on many independent systems at once, each to its own absolute tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class LinearSolverError(ArithmeticError):
    """A linear system was not solved: the operator is not positive definite, or the limit was reached."""


@dataclass(frozen=True)
class BatchedSolution:
    """What `batched_conjugate_gradient` found.

    Attributes:
        solution: (samples, *shape).
        residual_norms: (samples,), certified: drift of the recurrence included, or recomputed.
        products: how often the operator was applied (to all samples together).
    """

    solution: Tensor
    residual_norms: Float[Tensor, " samples"]
    products: int


@torch.no_grad()
def batched_conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Float[Tensor, " samples *shape"],
    tol: float,
    *,
    start: Float[Tensor, " samples *shape"] | None = None,
    kappa: float | None = None,
    max_iterations: int = 10_000,
) -> BatchedSolution:
    """Solve `A_i q_i = b_i` until `|b_i - A_i q_i| <= tol` for every sample i (Hestenes and Stiefel 1952).

    The residual of the recurrence drifts from the true one, by at most about `10 eps k kappa |b|` after k steps in
    floating point (Greenbaum 1997). Where that could matter for `tol`, the true residual is computed once more and
    decides; else the drift is added to the norm that is returned.

    Args:
        matvec: applies all operators, symmetric positive definite: `(samples, *shape) -> (samples, *shape)`.
        b: right-hand sides.
        tol: absolute tolerance, > 0.
        start: first iterates, at the price of one product; zero by default.
        kappa: bound of the condition numbers; None always recomputes the residual.
        max_iterations: limit of steps.

    Raises:
        LinearSolverError: for a direction of curvature <= 0, a product that is not finite, or if the limit is reached.
        ValueError: for tol <= 0.

    Example:
        >>> scale = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
        >>> batched_conjugate_gradient(lambda v: scale * v, torch.ones(2, 2), tol=1e-6).solution
        tensor([[1.0000, 0.5000],
                [0.2500, 0.2000]])
    """
    if not tol > 0:
        raise ValueError(f"batched_conjugate_gradient: tol must be > 0, got {tol}")
    products = 0
    q = torch.zeros_like(b)
    residual = b
    if start is not None and bool(start.any()):
        q, residual, products = start, b - matvec(start), 1
    drift_rate = None if kappa is None else 10 * torch.finfo(b.dtype).eps * kappa * float(_norms(b).max())
    checked, steps = True, 0  # the residual at hand is a true one
    energy = _inner(residual, residual)
    direction = residual
    while True:
        norms = energy.sqrt()
        open_ = norms > tol
        if not bool(open_.any()):
            drift = None if drift_rate is None else drift_rate * (steps + 1)
            if checked or (drift is not None and drift <= 0.01 * tol):
                return BatchedSolution(q, norms if checked else norms + (drift or 0.0), products)
            residual, products, checked = b - matvec(q), products + 1, True
            energy = _inner(residual, residual)
            direction = residual
            continue
        if steps >= max_iterations:
            raise LinearSolverError(
                f"conjugate gradients: residual {float(norms.max()):.3g} after {steps} iterations, asked for {tol:.3g}"
            )
        image = matvec(direction)
        products, steps, checked = products + 1, steps + 1, False
        curvature = _inner(direction, image)
        if not bool(torch.isfinite(curvature).all()):
            raise LinearSolverError(
                "conjugate gradients: a Hessian product is not finite; is the inner objective twice differentiable?"
            )
        if bool((open_ & (curvature <= 0)).any()):
            raise LinearSolverError(
                f"conjugate gradients: a direction of curvature {float(curvature[open_].min()):.3g}; the Hessian must "
                "be positive definite"
            )
        # A system that is solved stands still: its direction may be zero, and 0 / 0 must not spread.
        step = torch.where(open_, energy / curvature, 0.0)
        q = q + _wide(step, b) * direction
        residual = residual - _wide(step, b) * image
        before, energy = energy, _inner(residual, residual)
        direction = residual + _wide(torch.where(open_, energy / before, 0.0), b) * direction


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).flatten(1).sum(1)


def _norms(b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(b.flatten(1), dim=1)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))
