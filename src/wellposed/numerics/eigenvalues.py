"""Extreme eigenvalues of a symmetric operator from a few products: Lanczos and power iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Lanczos(NamedTuple):
    """``V' A V = T``: T has ``diagonal`` and ``off_diagonal``, V is ``basis`` with orthonormal columns.

    ``k`` is the number of steps taken: fewer than asked for when the basis spans an invariant subspace.
    """

    diagonal: Float[Tensor, " k"]
    off_diagonal: Float[Tensor, " k_minus_1"]
    basis: Float[Tensor, "dim k"]

    def ritz(self) -> tuple[Float[Tensor, " k"], Float[Tensor, "dim k"]]:
        """Ritz values (ascending) and Ritz vectors (columns): approximate eigenpairs, extreme ones first to converge."""
        tridiagonal = torch.diag(self.diagonal) + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values, self.basis @ vectors


class PowerIteration(NamedTuple):
    """What :func:`power_iteration` found.

    Attributes:
        eigenvalue: Rayleigh quotient of ``eigenvector`` (0-d). For a symmetric operator some eigenvalue lies within
            ``residual`` of it.
        eigenvector: unit vector ``(dim,)``.
        residual: ``|A v - eigenvalue v|``.
        iterations: products taken.
        converged: whether ``residual <= tol * |eigenvalue|``.
    """

    eigenvalue: Float[Tensor, ""]
    eigenvector: Float[Tensor, " dim"]
    residual: float
    iterations: int
    converged: bool


@torch.no_grad()
def lanczos(
    matvec: Callable[[Tensor], Tensor],
    dim: int,
    steps: int,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = True,
    *,
    start: Float[Tensor, " dim"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Lanczos:
    """Run ``steps`` Lanczos steps on the symmetric operator ``matvec: v -> A v`` of size ``dim``.

    Without re-orthogonalisation the basis loses orthogonality as soon as a Ritz value converges, and copies of it
    ("ghosts") appear; ``reorthogonalize=True`` removes all earlier directions twice in each step ("twice is
    enough", Parlett 1998, section 6.9), at ``4 * dim * k`` operations in step k.

    Args:
        matvec: the operator, for vectors of shape ``(dim,)``.
        steps: number of products, at most ``dim``.
        generator: for the Gaussian start vector, drawn on the generator's device.
        start: first direction instead of a random one; need not be of unit length, sets dtype and device.
        dtype, device: of a random start.

    Raises:
        ValueError: if ``steps`` is not in [1, dim], or ``start`` is zero or of another shape.

    Example:
        >>> eigenvalues = torch.tensor([1.0, 2.0, 5.0])
        >>> result = lanczos(lambda v: eigenvalues * v, dim=3, steps=3, generator=torch.Generator().manual_seed(0))
        >>> result.ritz()[0]
        tensor([1.0000, 2.0000, 5.0000])
    """
    if not 1 <= steps <= dim:
        raise ValueError(f"lanczos: steps must lie in [1, dim = {dim}], got {steps}")
    v = _start_vector("lanczos", dim, generator, start, dtype, device)
    columns = torch.zeros(steps, dim, dtype=v.dtype, device=v.device)  # rows in memory: each is written as a whole
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    scale = torch.zeros((), dtype=v.dtype, device=v.device)
    for k in range(steps):
        columns[k] = v
        w = matvec(v)
        diagonal.append(v @ w)
        scale = torch.maximum(scale, torch.linalg.vector_norm(w))
        w = w - diagonal[-1] * v
        if k > 0:
            w = w - off_diagonal[-1] * columns[k - 1]
        if reorthogonalize:
            for _ in range(2):
                w = w - columns[: k + 1].T @ (columns[: k + 1] @ w)
        length = torch.linalg.vector_norm(w)
        # What is left of an invariant subspace is rounding error; its direction would be noise.
        if k + 1 == steps or length <= 10 * torch.finfo(v.dtype).eps * scale:
            break
        off_diagonal.append(length)
        v = w / length
    taken = len(diagonal)
    off = torch.stack(off_diagonal) if off_diagonal else v.new_zeros(0)
    return Lanczos(torch.stack(diagonal), off, columns[:taken].T)


@torch.no_grad()
def power_iteration(
    matvec: Callable[[Tensor], Tensor],
    dim: int,
    generator: torch.Generator | None = None,
    *,
    tol: float = 1e-3,
    max_iterations: int = 100,
    start: Float[Tensor, " dim"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> PowerIteration:
    """Iterate ``v <- A v / |A v|`` for a symmetric operator of size ``dim``.

    The estimate approaches the largest magnitude from below, slowly when the two largest are close: for a
    sharper one at the same price take :func:`lanczos`. Eigenvalues ``c`` and ``-c`` of equal largest magnitude
    never converge. Warm-starting with the last ``eigenvector`` is what makes one product a training step enough
    (spectral normalisation).

    Raises:
        ValueError: for ``tol < 0``, ``max_iterations < 1``, or a start that is zero or of another shape.

    Example:
        >>> eigenvalues = torch.tensor([1.0, -4.0, 2.0])
        >>> result = power_iteration(lambda v: eigenvalues * v, 3, torch.Generator().manual_seed(0))
        >>> round(float(result.eigenvalue), 3), result.converged
        (-4.0, True)
    """
    if not tol >= 0:
        raise ValueError(f"power_iteration: tol must be >= 0, got {tol}")
    if max_iterations < 1:
        raise ValueError(f"power_iteration: max_iterations must be >= 1, got {max_iterations}")
    v = _start_vector("power_iteration", dim, generator, start, dtype, device)
    iterations = 0
    while True:
        image = matvec(v)
        iterations += 1
        eigenvalue = v @ image
        residual = float(torch.linalg.vector_norm(image - eigenvalue * v))
        converged = residual <= tol * abs(float(eigenvalue))
        if converged or iterations == max_iterations:
            return PowerIteration(eigenvalue, v, residual, iterations, converged)
        v = image / torch.linalg.vector_norm(image)  # not zero: a zero image has residual 0 and has converged


def _start_vector(
    caller: str,
    dim: int,
    generator: torch.Generator | None,
    start: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Float[Tensor, " dim"]:
    """A unit vector: ``start`` scaled, or a Gaussian one, uniform on the sphere; errors name ``caller``."""
    if start is None:
        where = device if generator is None else generator.device
        start = torch.randn(dim, generator=generator, dtype=dtype, device=where).to(device=device)
    if start.shape != (dim,):
        raise ValueError(f"{caller}: start must have shape ({dim},), got {tuple(start.shape)}")
    length = torch.linalg.vector_norm(start)
    if not length > 0:
        raise ValueError(f"{caller}: start must not be zero or NaN")
    unit: Tensor = start / length
    return unit
