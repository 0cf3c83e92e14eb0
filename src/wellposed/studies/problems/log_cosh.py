"""A curved bilevel problem all of whose Lipschitz constants are known: the error bound's hard case."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...hyperparameter import Hyperparameter
from ...tuning import CertifiedProblem, LowerLevel, UpperLoss
from ...tuning.lower_level import Values

STEEPEST = 4 / (3 * math.sqrt(3))
"""Largest slope of sech^2: its Lipschitz constant."""


class LogCosh:
    """`h = sum_i log cosh(A x + M theta - b)_i + ridge |x|^2 / 2`, `g = |x - target|^2 / 2`.

    Args:
        seed: re-draws everything.
        rows, size, hypers: numbers of residuals, unknowns and hyperparameters.
        ridge: modulus of strong convexity.

    Example:
        >>> problem = LogCosh(seed=0)
        >>> theta = torch.zeros(3, dtype=torch.float64)
        >>> bool(problem.slope(problem.minimiser(theta), theta).norm() < 1e-12)
        True
    """

    def __init__(self, seed: int, rows: int = 12, size: int = 5, hypers: int = 3, ridge: float = 0.5) -> None:
        g = torch.Generator().manual_seed(seed)
        self.A, self.M = (
            torch.randn(rows, n, generator=g, dtype=torch.float64) / math.sqrt(rows) for n in (size, hypers)
        )
        self.b = torch.randn(rows, generator=g, dtype=torch.float64)
        self.target = torch.randn(size, generator=g, dtype=torch.float64)
        self.ridge, self.hypers = ridge, hypers

    def slope(self, x: Tensor, theta: Tensor) -> Tensor:
        """Gradient of h in x."""
        return self.A.T @ torch.tanh(self.A @ x + self.M @ theta - self.b) + self.ridge * x

    def second(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Hessian in x and mixed derivative, dense."""
        s = 1 - torch.tanh(self.A @ x + self.M @ theta - self.b).square()
        eye = torch.eye(self.A.shape[1], dtype=torch.float64)
        return (self.A.T * s) @ self.A + self.ridge * eye, (self.A.T * s) @ self.M

    def minimiser(self, theta: Tensor) -> Tensor:
        """The inner solution by Newton's method, to rounding errors."""
        x = torch.zeros_like(self.target)
        for _ in range(60):
            slope = self.slope(x, theta)
            if float(slope.norm()) < 1e-14:
                break
            step = torch.linalg.solve(self.second(x, theta)[0], slope)
            # Far out, where tanh is flat, a full step may overshoot.
            while self.slope(x - step, theta).norm() > slope.norm() and step.norm() > 1e-15:
                step = 0.5 * step
            x = x - step
        return x

    def f(self, theta: Tensor) -> Tensor:
        """The exact upper loss."""
        return 0.5 * (self.minimiser(theta) - self.target).square().sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """The exact hypergradient."""
        x = self.minimiser(theta)
        H, J = self.second(x, theta)
        return -J.T @ torch.linalg.solve(H, x - self.target)

    def levels(self) -> CertifiedProblem:
        """The problem for tuners, with every constant known; starts at theta = 0."""
        norm_a, norm_m = (float(torch.linalg.matrix_norm(matrix, 2)) for matrix in (self.A, self.M))
        row = float(self.A.norm(dim=1).max())
        theta = Hyperparameter(0.0, -math.inf, math.inf, shape=(self.hypers,)).double()
        lower = LowerLevel(
            self._objective, torch.zeros_like(self.target), {"theta": theta}, self.ridge, norm_a**2 + self.ridge,
            L_J=STEEPEST * row * norm_a * norm_m, L_Hinv=STEEPEST * row * norm_a**2 / self.ridge**2,
        )  # fmt: skip
        return CertifiedProblem(lower, UpperLoss(lambda x: 0.5 * (x - self.target).square().sum(), 1.0, convex=True))

    def _objective(self, x: Tensor, values: Values) -> Tensor:
        t = self.A @ x + self.M @ values["theta"] - self.b
        # cosh itself overflows at 710.
        smooth = torch.logaddexp(t, -t) - math.log(2.0)
        return smooth.sum() + 0.5 * self.ridge * x.square().sum()
