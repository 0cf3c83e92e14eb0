"""Conjugate gradients for a symmetric positive definite operator that is known by its products only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .tree import inner_product

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ConjugateGradient:
    """What :func:`conjugate_gradient` found.

    Attributes:
        solution: the last iterate, of the right-hand side's shape.
        residual_norms: ``|b - A x|`` of the start and after each iteration, ``iterations + 1`` numbers. By the
            recurrence; the last one of a converged run is the true residual.
        iterations: how many steps were taken.
        status: ``"converged"``, ``"max_iterations"``, ``"indefinite"`` (a direction with ``p' A p <= 0``: the
            operator is not positive definite, the solution is the iterate before it) or ``"not_finite"``.
    """

    solution: Tensor
    residual_norms: tuple[float, ...]
    iterations: int
    status: Literal["converged", "max_iterations", "indefinite", "not_finite"]

    @property
    def converged(self) -> bool:
        """Whether the true residual is within the tolerance."""
        return self.status == "converged"


@torch.no_grad()
def conjugate_gradient(
    matvec: Operator,
    b: Float[Tensor, "*shape"],
    *,
    tol: float = 1e-5,
    absolute_tol: float = 0.0,
    max_iterations: int | None = None,
    preconditioner: Operator | None = None,
    start: Float[Tensor, "*shape"] | None = None,
) -> ConjugateGradient:
    """Solve ``A x = b`` until ``|b - A x| <= max(tol * |b|, absolute_tol)`` (Hestenes and Stiefel 1952).

    The residual that the recurrence carries drifts from the true one in floating point. So when the recurrence
    says "done", the true residual is computed (one product more) and decides; if it is still too large, the
    iteration restarts from it. For a certified hypergradient only the true residual means anything.

    Args:
        matvec: ``v -> A v``, symmetric positive definite, for tensors of ``b``'s shape.
        b: right-hand side, of any shape; the inner product is over all entries.
        tol: relative tolerance.
        absolute_tol: absolute tolerance.
        max_iterations: default 10 times the number of unknowns, as in SciPy.
        preconditioner: ``r -> M r``, symmetric positive definite, near ``A``'s inverse.
        start: first iterate; default 0, which saves one product.

    Raises:
        ValueError: for a negative tolerance or ``max_iterations``, or a start of another shape.

    Note:
        One number a step is read back from the device to decide whether to stop.

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> result = conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0]))
        >>> result.solution, result.iterations, result.converged
        (tensor([0.0909, 0.6364]), 2, True)
    """
    _check(b, tol, absolute_tol, max_iterations, start)
    limit = 10 * b.numel() if max_iterations is None else max_iterations
    target = max(tol * _norm(b), absolute_tol)
    x = torch.zeros_like(b) if start is None else start.clone()
    residual = b.clone() if start is None else b - matvec(x)
    norms = [_norm(residual)]
    checked = True  # the residual at hand is a true one
    direction: Tensor | None = None
    energy = torch.zeros(())
    while True:
        if not norms[-1] < float("inf"):
            return ConjugateGradient(x, tuple(norms), len(norms) - 1, "not_finite")
        if norms[-1] <= target and not checked:
            residual = b - matvec(x)
            norms[-1], checked, direction = _norm(residual), True, None
        if norms[-1] <= target:
            return ConjugateGradient(x, tuple(norms), len(norms) - 1, "converged")
        if len(norms) > limit:
            return ConjugateGradient(x, tuple(norms), len(norms) - 1, "max_iterations")
        scaled = residual if preconditioner is None else preconditioner(residual)
        previous, energy = energy, inner_product([residual], [scaled])
        direction = scaled.clone() if direction is None else scaled + (energy / previous).to(b) * direction
        image = matvec(direction)
        curvature = inner_product([direction], [image])
        if curvature <= 0:
            return ConjugateGradient(x, tuple(norms), len(norms) - 1, "indefinite")
        step_size = (energy / curvature).to(b)
        x = x + step_size * direction
        residual = residual - step_size * image
        norms.append(_norm(residual))
        checked = False


def _norm(tensor: Tensor) -> float:
    return float(inner_product([tensor], [tensor]).sqrt())


def _check(b: Tensor, tol: float, absolute_tol: float, max_iterations: int | None, start: Tensor | None) -> None:
    if not tol >= 0 or not absolute_tol >= 0:
        raise ValueError(f"conjugate_gradient: tol and absolute_tol must be >= 0, got {tol} and {absolute_tol}")
    if max_iterations is not None and max_iterations < 0:
        raise ValueError(f"conjugate_gradient: max_iterations must be >= 0, got {max_iterations}")
    if start is not None and start.shape != b.shape:
        raise ValueError(f"conjugate_gradient: start must have b's shape {tuple(b.shape)}, got {tuple(start.shape)}")
