"""What tuners share that solve the inner problem to a chosen accuracy: points with certificates, counts, budgets."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from ..loading import EndlessBatches
from ..tuner import StepInfo, Tuner
from .certified_problem import CertifiedProblem, FlatLower, FlatUpper, WholeBatch, refuse_randomness
from .conjugate_gradient import LinearSolverError
from .constants import Constant, Number, Rule
from .hypergradient import Adjoint, adjoint_hypergradient
from .inexact_records import BudgetExhausted, MaidInfo, Point, Status, Work
from .lower_level import LowerLevel, UpperLoss
from .strongly_convex import InnerSolution, InnerSolverError, Watch, accelerated_gradient, unsolved


class InexactTuner(Tuner):
    """Base of the tuners with certified inner solves; subclasses implement `_advance`.

    Args:
        problem: a `CertifiedProblem`, or any deterministic `BilevelProblem` together with its moduli.
        mu, L, L_g: of a plain `BilevelProblem`: see `LowerLevel` and `UpperLoss`. mu defaults to the problem's
            `strong_convexity`; L and L_g are estimated where they are missing.
        max_inner, max_cg: limits of gradients in one inner solve and of steps in one adjoint solve.
        max_step: largest change of any unconstrained hyperparameter in one step.
        on_uncertified: "warn" or "raise" where a constant is only estimated; "ignore" says nothing.
    """

    requires = frozenset({"deterministic", "double_backward", "inner_derivative", "strongly_convex"})
    drives: frozenset[str] = frozenset()

    def __init__(
        self,
        problem: BilevelProblem,
        *,
        mu: Constant | Rule | None = None,
        L: Constant | Rule | None = None,
        L_g: Constant | Rule | None = None,
        max_inner: int = 100_000,
        max_cg: int = 10_000,
        max_step: float = 2.0,
        on_uncertified: Literal["warn", "raise", "ignore"] = "warn",
    ) -> None:
        owner = type(self).__name__
        check_positive(owner, max_inner=max_inner, max_cg=max_cg, max_step=max_step)
        if on_uncertified not in ("warn", "raise", "ignore"):
            raise ValueError(f"{owner}: on_uncertified must be 'warn', 'raise' or 'ignore', got {on_uncertified!r}")
        refuse_randomness(problem, owner)
        self._structure = (mu, L, L_g)
        if not isinstance(problem, CertifiedProblem):
            self._require_modulus(problem, mu, owner)
        elif any(value is not None for value in self._structure):
            raise ValueError(f"{owner}: mu, L and L_g belong to a plain BilevelProblem; a CertifiedProblem has them")
        super().__init__(problem)
        self.max_inner, self.max_cg, self.max_step = int(max_inner), int(max_cg), float(max_step)
        self.on_uncertified = on_uncertified
        self.work = Work()
        self.budget: float = math.inf
        self.status: Status = "running"
        self.point: Point | None = None
        self.z: Tensor | None = None
        self._adjoint: Tensor | None = None
        self._batches = WholeBatch(owner, "train"), WholeBatch(owner, "validation")
        self._levels: tuple[LowerLevel, UpperLoss] | None = None
        self._resumed: tuple[Tensor, Tensor] | None = None
        if isinstance(problem, CertifiedProblem):
            self._begin(problem.lower, problem.upper)

    # ── the problem ───────────────────────────────────────────────────────────────────────────────────────────────
    @staticmethod
    def _require_modulus(problem: BilevelProblem, mu: Any, owner: str) -> None:
        if mu is None and not (problem.strong_convexity or 0) > 0:
            raise ValueError(
                f"{owner}: mu is missing: give the modulus of strong convexity of the inner problem (e.g. twice the "
                "smallest weight of a squared penalty) as mu=, or strong_convexity= to the problem"
            )
        if problem.strong_convexity is None:
            values = {n: h().detach() for n, h in problem.hypers.items()}
            found = getattr(mu, "value", mu)
            problem.strong_convexity = float(torch.as_tensor(found(values) if callable(found) else found).min())

    def _begin(self, lower: LowerLevel, upper: UpperLoss) -> None:
        self._levels = (lower, upper)
        if self._resumed is None:
            self.u, self.x = lower.u0, lower.x0.clone()
        else:  # a state was loaded before the first step
            (self.u, self.x), self._resumed = self._resumed, None
        if self.x.dtype == torch.float32:
            warnings.warn(
                f"{type(self).__name__}: float32 inner problems are solved to about 1e-5 of |x| at best; use float64 "
                "where accuracy matters"
            )
        if not self.certified and self.on_uncertified != "ignore":
            message = (
                f"{type(self).__name__}: {', '.join(self._estimated())} only estimated: accepted steps are likely, not "
                "certain, to lower the exact upper loss"
            )
            if self.on_uncertified == "raise":
                raise ValueError(message)
            warnings.warn(message)

    @property
    def lower(self) -> LowerLevel:
        """The inner problem; of a plain `BilevelProblem`, known from the first step on."""
        return self._both()[0]

    @property
    def upper(self) -> UpperLoss:
        """The upper loss."""
        return self._both()[1]

    def _both(self) -> tuple[LowerLevel, UpperLoss]:
        if self._levels is None:
            raise RuntimeError(
                f"{type(self).__name__}: the levels are known from the first step on, which has the data"
            )
        return self._levels

    def _estimated(self) -> list[str]:
        lower, upper = self._both()
        named = {"mu": lower.mu, "L": lower.L, "L_g": upper.L_g}
        return [name for name, constant in named.items() if not constant.certified]

    @property
    def certified(self) -> bool:
        """Whether every constant behind the accepted steps is known, not estimated."""
        return not self._estimated()

    def _take(self, train: Any, validation: Any) -> None:
        if isinstance(self.problem, CertifiedProblem):
            for batches in (train, validation):
                if batches is not None:  # loops count the batches that were taken
                    next(batches)
            return
        if train is None or validation is None:
            raise ValueError(f"{type(self).__name__}.step: a plain BilevelProblem needs iterators of its batches")
        data, held_out = self._batches[0].take(train), self._batches[1].take(validation)
        if self._levels is None:
            mu, L, L_g = self._structure
            problem = self.problem
            strength = problem.strong_convexity if mu is None else mu
            assert strength is not None
            lower = FlatLower(problem, data, strength, L)
            self._begin(lower, FlatUpper(lower, held_out, L_g))

    # ── work ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def moduli(self, u: Tensor) -> tuple[Number, Number, float]:
        """mu, L and kappa at u; raises where they are no moduli (a weight that underflowed)."""
        lower = self.lower
        if isinstance(lower, FlatLower):
            lower.at = self.x
        with torch.no_grad():
            values = lower.values(u)
            mu, L = lower.mu.lower(values), lower.L.upper(values)
        if isinstance(lower, FlatLower):
            self.work.hvp, lower.products = self.work.hvp + lower.products, 0
        if isinstance(mu, float) and isinstance(L, float):
            good, kappa = 0.0 < mu <= L < math.inf, L / mu if mu > 0 else math.inf
        else:
            low, high = torch.as_tensor(mu).to(u), torch.as_tensor(L).to(u)
            good = bool(((low > 0) & (high >= low) & torch.isfinite(high)).all())
            kappa = float((high / low).max())
        if not good:
            raise InnerSolverError(
                f"{type(self).__name__}: no moduli 0 < mu <= L < inf at theta: mu = {mu}, L = {L}", u, kappa
            )
        return mu, L, kappa

    def accuracy_floor(self, x: Tensor, kappa: float) -> float:
        """Distance to a minimiser below which rounding errors of the gradient hide it."""
        size = max(1.0, float(torch.linalg.vector_norm(x.flatten(1), dim=1).max()))
        floor = 8 * torch.finfo(x.dtype).eps * kappa * size
        return max(floor, 1e-5 * size) if x.dtype == torch.float32 else floor

    def solve_at(self, u: Tensor, start: Tensor, eps: float, watch: Callable[[Number], Watch] | None = None) -> Point:
        """Solve the inner problem at u to `eps` and look at the upper loss there.

        Raises:
            InnerSolverError: if it cannot be solved, or the watch ended it.
            BudgetExhausted: if the budget ends first.
        """
        mu, L, kappa = self.moduli(u)
        lower = self.lower
        eps = max(eps, self.accuracy_floor(start, kappa))
        with torch.no_grad():
            values = lower.values(u)
        limit = self._affordable(self.max_inner, 1)
        stop = None if watch is None else watch(mu)
        solve = lower.solver or self._accelerated
        found = solve(start, values, mu, L, eps, limit, stop)
        self.work.inner += found.iterations
        self.problem.counts.inner_grad += found.iterations
        if found.status != "converged":
            if found.status == "limit" and limit < self.max_inner:
                raise BudgetExhausted
            raise unsolved(type(self).__name__, found, mu, L, eps, u)
        return self._look(u, found.x, found.gradient_norms / mu, kappa)

    def _accelerated(
        self, x0: Tensor, values: dict[str, Tensor], mu: Number, L: Number, eps: float, limit: int, watch: Watch | None
    ) -> InnerSolution:
        gradient = self.lower.gradient_at(values)
        return accelerated_gradient(gradient, x0, mu, L, eps, max_iterations=limit, watch=watch)

    def _look(self, u: Tensor, x: Tensor, eps: Tensor, kappa: float) -> Point:
        self._affordable(1, 1)
        loss, slope = self.upper_gradient(x, u)
        penalty, direct = self.upper.direct(self.lower, x, u)
        norms = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        return Point(u, x, eps, loss, slope, norms, penalty, direct, kappa)

    def upper_gradient(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        self.work.upper += 1
        self.problem.counts.outer_grads += 1
        return self.upper.value_and_gradient(x, self.lower.per_sample, u)

    def hypergradient_at(self, point: Point, delta: float) -> Adjoint:
        limit = self._affordable(self.max_cg, 2)
        scale = max(1.0, float(point.slope_norm.max()))
        floor = 50 * torch.finfo(point.x.dtype).eps * scale * math.sqrt(point.kappa)
        try:
            found = adjoint_hypergradient(
                self.lower, point.x, point.u, point.slope, point.direct, max(delta, floor),
                start=self._adjoint, kappa=point.kappa, max_iterations=limit,
            )  # fmt: skip
        except LinearSolverError:
            if limit < self.max_cg:
                self.work.hvp += limit
                raise BudgetExhausted from None
            raise
        self.work.hvp += found.products
        self.work.mixed += 1
        self.problem.counts.hvp += found.products
        self.problem.counts.mixed_vjp += 1
        self._adjoint = found.q
        return found

    def _affordable(self, limit: int, price: int) -> int:
        """As many as the budget still pays for, at most `limit`."""
        if math.isinf(self.budget):
            return limit
        left = int((self.budget - self.work.units) // price)
        if left < 1:
            raise BudgetExhausted
        return min(limit, left)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def step(self, train: Iterator[Any] | None = None, validation: Iterator[Any] | None = None) -> MaidInfo:
        """One outer step; a `CertifiedProblem` holds its data, others take one batch from each iterator.

        Raises:
            InnerSolverError: if the inner problem at the present hyperparameters cannot be solved.
            LinearSolverError: if the adjoint system cannot.
            ValueError: if a plain problem's batches are missing, or change.
        """
        self._take(train, validation)
        before = Work(**asdict(self.work))
        info = MaidInfo(status=self.status)
        if self.status == "running":
            try:
                self._advance(info)
            except BudgetExhausted:
                self.status = "budget"
        self._store()
        point = self.point
        if point is not None:
            info.f_upper, info.f_lower = point.upper, self.lower.inner_loss(point.x, point.u)
            info.inner_loss, info.outer_loss = info.f_lower, info.f_upper
        info.n_inner, info.n_hvp = self.work.inner - before.inner, self.work.hvp - before.hvp
        info.units, info.status = self.work.units, self.status
        info.certified = info.certified and self.certified
        info.values = self.recorded_values()
        return info

    def _advance(self, info: MaidInfo) -> None:
        """Move once: set `u`, `x`, `point`, and what `info` says of the step."""
        raise NotImplementedError

    @torch.no_grad()
    def _store(self) -> None:
        """Write hyperparameters and inner solution where the problem holds them."""
        self.lower.write(self.u)
        if isinstance(self.problem, CertifiedProblem):
            self.problem.params["x"].copy_(self.reconstruction)
        else:
            assert isinstance(self.lower, FlatLower)
            for name, part in self.lower.params(self.x[0]).items():
                self.problem.params[name].copy_(part)

    @property
    def reconstruction(self) -> Tensor:
        """The present inner solution, of the shape of the x0 that was given."""
        return self.x if self.lower.per_sample else self.x[0]

    def run(  # type: ignore[override]
        self,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        steps: int | None = None,
        *,
        max_outer: int | None = None,
        budget: float | None = None,
        tol: float | None = None,
    ) -> list[StepInfo]:
        """Step until one of the limits is reached; returns (and extends) the history.

        Args:
            train, validation: loaders of ONE batch each; a `CertifiedProblem` needs none.
            steps, max_outer: the same: largest number of outer steps.
            budget: work in units (see `Work.units`), counted from the tuner's start.
            tol: ends when norm of the hypergradient plus bound of its error is at most this.

        Raises:
            ValueError: without any limit, or for one out of range.
        """
        owner = type(self).__name__
        limit = max_outer if steps is None else steps
        if limit is None and budget is None and tol is None:
            raise ValueError(f"{owner}.run: give max_outer, budget or tol; nothing else would end it")
        check_positive(f"{owner}.run", max_outer=limit, budget=budget, tol=tol)
        self.tol = 0.0 if tol is None else tol
        self.budget = math.inf if budget is None else budget
        if self.status == "budget":
            self.status = "running"
        batches = [
            # A certified problem holds its data: there is nothing to take.
            itertools.repeat(None) if loader is None else EndlessBatches(loader, name)
            for loader, name in ((train, "train"), (validation, "validation"))
        ]
        if not isinstance(self.problem, CertifiedProblem) and (train is None or validation is None):
            raise ValueError(f"{owner}.run: a plain BilevelProblem needs loaders of its batches")
        taken = 0
        while self.status == "running" and (limit is None or taken < limit):
            self.history.append(self.checked_step(*batches))
            taken += 1
        return self.history

    tol: float = 0.0

    def extra_state(self) -> dict[str, Any]:
        levels = self._levels is not None
        return {
            "u": self.u.clone() if levels else None,
            "x": self.x.clone() if levels else None,
            "point": None if self.point is None else {f.name: getattr(self.point, f.name) for f in fields(Point)},
            "adjoint": self._adjoint,
            "z": self.z,
            "work": asdict(self.work),
            "status": self.status,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if state["u"] is not None:
            self._resumed = (state["u"].clone(), state["x"].clone())
        if self._levels is not None and self._resumed is not None:
            (self.u, self.x), self._resumed = self._resumed, None
        self.point = None if state["point"] is None else Point(**state["point"])
        self._adjoint, self.z = state["adjoint"], state["z"]
        self.work, self.status = Work(**state["work"]), state["status"]


def check_positive(owner: str, **numbers: float | None) -> None:
    """Raise unless every number that is given is > 0.

    Raises:
        ValueError: naming owner, argument and value.

    Example:
        >>> check_positive("MAID", max_step=0.0)
        Traceback (most recent call last):
        ValueError: MAID: max_step must be > 0, got 0.0
    """
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{owner}: {name} must be > 0, got {value}")
