"""A quadratic bilevel problem whose inner and upper condition numbers are set apart, with everything known exactly."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...hyperparameter import Hyperparameter
from ...tuning import CertifiedProblem, Known, LowerLevel, UpperLoss
from ...tuning.constants import Number
from ...tuning.lower_level import Values
from ...tuning.strongly_convex import FIRST_LOOK, InnerSolution, Watch, next_look

ROWS, SIZE = 80, 4
UPPER_SPECTRUM = (1.0, 1.67, 2.33, 3.0)
_TABLE = 40
"""Iterations of the inner solver that are tabulated, times the root of the condition number: exp(-40) is nothing."""


class DecoupledQuadratic:
    """`h = |A2 x + A3 theta - b2|^2 / 2`, `g = |A1 x - b1|^2 / 2` in four unknowns and four hyperparameters.

    A1 is orthonormal, A2 has singular values between 1 and c, A3 = A2 M: the inner Hessian has condition c^2, the upper
    one, M'M, condition 9, whatever c. All closed forms are exact.

    Args:
        seed: re-draws matrices, planted values and noise.
        condition: c >= 1, the condition number of A2.

    Attributes:
        f_star: least upper loss.
        L_f: largest eigenvalue of the upper Hessian.

    Example:
        >>> problem = DecoupledQuadratic(seed=0, condition=10.0)
        >>> theta = torch.ones(4, dtype=torch.float64)
        >>> bool(problem.f(theta) > problem.f_star), round(problem.L_f, 6)
        (True, 9.0)
    """

    def __init__(self, seed: int, condition: float) -> None:
        if not condition >= 1:
            raise ValueError(f"DecoupledQuadratic: condition must be >= 1, got {condition}")
        g = torch.Generator().manual_seed(seed)

        def orthonormal(rows: int) -> Tensor:
            return torch.linalg.qr(torch.randn(rows, SIZE, generator=g, dtype=torch.float64)).Q

        spectrum = torch.logspace(0, math.log10(condition), SIZE, dtype=torch.float64)
        A1 = orthonormal(ROWS)
        A2 = orthonormal(ROWS) * spectrum @ orthonormal(SIZE).T
        mixing = orthonormal(SIZE) * torch.tensor(UPPER_SPECTRUM, dtype=torch.float64) @ orthonormal(SIZE).T
        x1, x2, planted = torch.rand(3, SIZE, generator=g, dtype=torch.float64)
        noise = 0.01 * torch.randn(2, ROWS, generator=g, dtype=torch.float64)
        b1 = A1 @ x1 + noise[0]
        b2 = A2 @ x2 + A2 @ mixing @ planted + noise[1]
        # Everything below lives in four dimensions: the 80 rows enter through their Gram matrices alone.
        self.H, self.J, self.c = A2.T @ A2, A2.T @ A2 @ mixing, A2.T @ b2
        self.target = A1.T @ b1
        self.f_star = 0.5 * float(b1 @ b1 - self.target @ self.target)
        self.eigenvalues, self.basis = torch.linalg.eigh(self.H)
        self.L_f = float(torch.linalg.eigvalsh(mixing.T @ mixing)[-1])
        self.mixing = mixing
        self.mu, self.L = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        self._polynomials = self._table()
        self._squared = self._polynomials.square()

    # ── closed forms ──────────────────────────────────────────────────────────────────────────────────────────────
    def minimiser(self, theta: Tensor) -> Tensor:
        """The exact inner solution."""
        return torch.linalg.solve(self.H, self.c - self.J @ theta)

    def f(self, theta: Tensor) -> Tensor:
        """The exact upper loss."""
        return 0.5 * (self.minimiser(theta) - self.target).square().sum() + self.f_star

    def gradient(self, theta: Tensor) -> Tensor:
        """The exact hypergradient."""
        return -self.mixing.T @ (self.minimiser(theta) - self.target)

    # ── the problem ───────────────────────────────────────────────────────────────────────────────────────────────
    def levels(self, tabulated: bool = True) -> CertifiedProblem:
        """The problem for tuners, at theta = 1 and x = 0.

        Args:
            tabulated: take the iterates of the accelerated gradient method from a table of its polynomials instead of
                running it: the same points and counts, at a cost that does not grow with the iterations.
        """
        theta = Hyperparameter(1.0, -math.inf, math.inf, shape=(SIZE,)).double()
        zero = torch.zeros(SIZE, dtype=torch.float64)
        lower = LowerLevel(
            self._objective, zero, {"theta": theta}, self.mu, self.L, quadratic=True,
            J_norm=Known(float(torch.linalg.matrix_norm(self.J, 2))), L_J=0.0,
            gradient=lambda x, v: torch.addmv(self.J @ v["theta"] - self.c, self.H, x),
            curvature=lambda x, v: _Curvature(self.H, self.J),
            solver=self._solve if tabulated else None,
        )  # fmt: skip
        upper = UpperLoss(
            lambda x: 0.5 * (x - self.target).square().sum() + self.f_star, 1.0, convex=True, gradient=self._upper
        )
        return CertifiedProblem(lower, upper)

    def _objective(self, x: Tensor, values: Values) -> Tensor:
        return 0.5 * x @ (self.H @ x) + x @ (self.J @ values["theta"] - self.c)

    def _upper(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = x - self.target
        return 0.5 * (slope @ slope) + self.f_star, slope

    # ── the inner solver ──────────────────────────────────────────────────────────────────────────────────────────
    def _table(self) -> Tensor:
        """Row t: by what the error along each eigenvector is multiplied at the t-th point of the accelerated method."""
        root = math.sqrt(self.L / self.mu)
        momentum = (root - 1) / (root + 1)
        shrink = 1 - self.eigenvalues.numpy() / self.L
        rows = np.ones((int(_TABLE * root) + 64, SIZE))
        before = rows[0]
        for t in range(1, len(rows)):
            now = shrink * rows[t - 1]
            rows[t] = (1 + momentum) * now - momentum * before
            before = now
        return torch.from_numpy(rows)

    def _solve(
        self, x0: Tensor, values: Values, mu: Number, L: Number, eps: float, limit: int, watch: Watch | None
    ) -> InnerSolution:
        slope = self.basis.T @ (self.H @ x0[0] + self.J @ values["theta"] - self.c)
        norms = (self._squared @ slope.square()).sqrt()
        passed = norms <= eps * mu
        first = int(passed.to(torch.int8).argmax()) if bool(passed.any()) else len(norms)
        taken = min(first + 1, limit, len(norms))
        error = slope / self.eigenvalues

        def point(t: int) -> Tensor:
            return (x0[0] - self.basis @ ((1 - self._polynomials[t]) * error))[None]

        look = FIRST_LOOK
        while watch is not None and look <= min(taken, first):
            if watch(point(look - 1), norms[look - 1 : look], look):
                return InnerSolution(point(look - 1), norms[look - 1 : look], look, "stopped")
            look = next_look(look)
        status: Literal["converged", "limit"] = "converged" if taken == first + 1 else "limit"
        return InnerSolution(point(taken - 1), norms[taken - 1 : taken], taken, status)


class _Curvature:
    def __init__(self, H: Tensor, J: Tensor) -> None:
        self.H, self.J = H, J

    def hvp(self, vector: Tensor, /) -> Tensor:
        return self.H @ vector

    def mixed_vjp(self, vector: Tensor, /) -> Values:
        return {"theta": vector @ self.J}
