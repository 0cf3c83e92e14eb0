"""MAID: descent on hyperparameters that chooses its accuracies and step sizes by itself (arXiv 2308.10098)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from ..loading import distributed
from .hypergradient import error_of
from .inexact_records import MaidInfo
from .inexact_tuner import InexactTuner, check_positive
from .line_search import Accepted, backtrack, bounds_of, capped

_REFERENCE_WEIGHT = 0.85
"""Weight of the past in the reference value of the accelerated variant (Zhang and Hager 2004)."""


class MAID(InexactTuner):
    r"""Method of Adaptive Inexact Descent (MAID) of Salehi, Mukherjee, Roberts and Ehrhardt (arXiv 2308.10098).

    Neither the inner problem nor the linear system of the hypergradient is solved exactly. Each outer step

    1. solves both to accuracies `eps` and `delta`; if a bound `omega` of the hypergradient's error shows that `-z`
       might not descend (`omega > (1 - eta) |z|`), both are multiplied by `nu` and solved again (algorithm 3.2);
    2. tries step sizes `alpha rho^i` until the loss has CERTAINLY fallen by `armijo alpha |z|^2`, whatever the inexact
       values hide (lemma 3.5); if none does, multiplies the accuracies by `nu`, and goes back to 1;
    3. relaxes: `alpha rho_up`, `eps nu_up`, `delta nu_up`.

    No Lipschitz constant of the hypergradient, and no good guess of accuracy or step size, is needed.

    Args:
        problem: a `CertifiedProblem`, or a deterministic `BilevelProblem` with `mu` (and better `L`, `L_g`).
        eps0, delta0: first accuracies of inner and adjoint solve; "auto" is 2 % of the first residual, over mu.
        alpha0: first step size; "auto" moves the hyperparameters by 1 %.
        rho, rho_up: factors of the step size in backtracking, in (0, 1), and after a step, > 1.
        nu, nu_up: factors of the accuracies after a failure, in (0, 1), and after a step, >= 1.
        eta: share of |z| by which it must exceed its error, in (0, 1).
        armijo: share of `alpha |z|^2` by which the loss must fall (lambda), in (0, 1), below eta with the test on.
        max_bt: trial steps before accuracies are tightened; one more after each failure.
        check_descent: whether step 1 tests omega. "auto": if the inner problem is quadratic (or `L_Hinv` is given) and
            all constants are known; elsewhere omega is so pessimistic that the test costs more than it saves. Without
            it, accepted steps are certified all the same.
        max_step: largest change of an unconstrained hyperparameter in one step.
        on_uncertified: "warn", "raise" or "ignore" where a constant is only estimated.
        accelerate: Barzilai-Borwein step sizes and an averaged reference value instead of the last one; a heuristic of
            the authors' later code without a theorem. Steps are then certified against that average.
        mu, L, L_g: of a plain `BilevelProblem`.
        max_inner, max_cg: limits of one inner and one adjoint solve.

    Attributes:
        u: (p,) present unconstrained hyperparameters.
        z: last hypergradient.
        eps, delta, alpha: present accuracies and step size.
        work: what was computed so far.
        status: "running", or why it stands still: "converged" (tol), "attainable accuracy reached", "budget".

    Raises:
        ValueError: for an argument out of range, a problem without mu, a network with dropout or BatchNorm, a method that
            keeps state, or in one of several processes that train together.

    Example:
        >>> from wellposed import Hyperparameter
        >>> from wellposed.tuning import CertifiedProblem, LowerLevel, UpperLoss
        >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> lower = LowerLevel(
        ...     lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(), 0 * y,
        ...     {"weight": Hyperparameter(1.0, chart="exp")},
        ...     mu=lambda v: 1 + v["weight"], L=lambda v: 1 + v["weight"], quadratic=True, L_J=lambda v: v["weight"])
        >>> upper = UpperLoss(lambda x: 0.5 * (x - 0.8 * y).square().sum(), L_g=1.0, convex=True)
        >>> tuner = MAID(CertifiedProblem(lower, upper))
        >>> history = tuner.run(max_outer=40)
        >>> round(float(tuner.values()["weight"]), 2), tuner.certified   # y / (1 + weight) = 0.8 y
        (0.25, True)
    """

    def __init__(
        self,
        problem: BilevelProblem,
        eps0: float | Literal["auto"] = "auto",
        delta0: float | Literal["auto"] = "auto",
        alpha0: float | Literal["auto"] = "auto",
        rho: float = 0.5,
        rho_up: float = 1.5,
        nu: float = 0.5,
        nu_up: float = 1.1,
        eta: float = 0.5,
        armijo: float = 0.1,
        max_bt: int = 15,
        check_descent: bool | Literal["auto"] = "auto",
        max_step: float = 2.0,
        on_uncertified: Literal["warn", "raise", "ignore"] = "warn",
        accelerate: bool = False,
        **structure: Any,
    ) -> None:
        self.rho, self.rho_up, self.nu, self.nu_up, self.eta, self.armijo = rho, rho_up, nu, nu_up, eta, armijo
        self.max_bt, self.accelerate = max_bt, accelerate
        self._first: dict[str, float | str] = {"eps": eps0, "delta": delta0, "alpha": alpha0}
        self._check(check_descent)
        if distributed():
            raise ValueError(
                "MAID: data parallelism is not supported; its steps are certified for one loss over all of the data, of "
                "which each process would see a share: run it in one process, with the whole batch"
            )
        self._wanted_check = check_descent
        self.eps = self.delta = self.alpha = math.nan
        self._window: tuple[float, float] | None = None  # Q and C of the averaged reference
        self._last: tuple[Tensor, Tensor] | None = None  # u and z before the last step
        super().__init__(problem, max_step=max_step, on_uncertified=on_uncertified, **structure)

    def _check(self, check_descent: Any) -> None:
        for name in ("rho", "nu", "eta", "armijo"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"MAID: {name} must lie in (0, 1), got {getattr(self, name)}")
        if not self.rho_up > 1 or not self.nu_up >= 1:
            raise ValueError(f"MAID: rho_up must be > 1 and nu_up >= 1, got {self.rho_up} and {self.nu_up}")
        if check_descent not in (True, False, "auto"):
            raise ValueError(f"MAID: check_descent must be True, False or 'auto', got {check_descent!r}")
        if check_descent is not False and not self.armijo < self.eta:
            raise ValueError(f"MAID: armijo must be < eta = {self.eta} with the descent test on, got {self.armijo}")
        if not isinstance(self.max_bt, int) or self.max_bt < 1:
            raise ValueError(f"MAID: max_bt must be an integer >= 1, got {self.max_bt!r}")
        check_positive("MAID", **{f"{k}0": v for k, v in self._first.items() if v != "auto"})  # type: ignore[arg-type]

    @property
    def check_descent(self) -> bool:
        """Whether the hypergradient's error is bounded and tested."""
        if self._wanted_check != "auto":
            return bool(self._wanted_check)
        lower = self.lower
        constants = (lower.mu, lower.L, self.upper.L_g, lower.L_J, lower.L_Hinv)
        return all(constant is not None and constant.certified for constant in constants)

    # ── one outer step ────────────────────────────────────────────────────────────────────────────────────────────
    def _advance(self, info: MaidInfo) -> None:
        if math.isnan(self.eps):
            self._choose_accuracies()
        trials = self.max_bt
        while self._inexact_gradient(info):
            assert self.z is not None and self.point is not None
            if math.isnan(self.alpha):
                self._choose_step_size()
            found = self._search(trials)
            if isinstance(found, Accepted):
                info.alpha, info.n_backtrack = found.alpha, info.n_backtrack + found.rejected
                self._move(found)
                return
            info.n_backtrack += found
            if not self._tighten():
                return
            trials += 1

    def _inexact_gradient(self, info: MaidInfo) -> bool:
        """Algorithm 3.2: accuracies tight enough that -z descends. False if there is nothing left to do."""
        while True:
            point = self._point_at_accuracy()
            found = self.hypergradient_at(point, self.delta)
            self.z, z_norm = found.z, float(torch.linalg.vector_norm(found.z))
            info.z_norm, info.eps, info.delta = z_norm, self.eps, self.delta
            omega = 0.0
            if self.check_descent:
                info.omega, norm = error_of(self.lower, self.upper, point.x, point.u, point.slope, point.eps, found)
                self.work.norm += norm.products
                info.certified = info.certified and norm.certified
                omega = info.omega
            # With the test off, z = 0 says nothing: the start may be a point where nothing is coupled yet.
            if z_norm + omega <= self.tol and (self.check_descent or z_norm > 0):
                self.status = "converged"
                return False
            if z_norm > 0 and omega <= (1 - self.eta) * z_norm:
                return True
            if not self._tighten():
                return False

    def _point_at_accuracy(self) -> Any:
        """The present point, solved again where the accuracy that it was delivered with does not do."""
        point = self.point
        if point is None or float(point.eps.max()) > max(self.eps, self.accuracy_floor(point.x, point.kappa)):
            self.point = point = self.solve_at(self.u, self.x, self.eps)
            self.x = point.x
        return point

    def _tighten(self) -> bool:
        """Multiply both accuracies; False, and the tuner stands, where rounding errors end it."""
        assert self.point is not None
        if self.eps <= self.accuracy_floor(self.point.x, self.point.kappa):
            self.status = "attainable accuracy reached"
            return False
        self.eps, self.delta = self.nu * self.eps, self.nu * self.delta
        return True

    def _search(self, trials: int) -> Accepted | int:
        assert self.z is not None and self.point is not None
        alpha = capped(self._start_size() if self.accelerate else self.alpha, self.z, self.max_step)
        reference = self._window[1] if self.accelerate and self._window is not None else None
        return backtrack(
            self, self.point, self.z, alpha, self.eps, trials=trials, shrink=self.rho, armijo=self.armijo,
            reference=reference,
        )  # fmt: skip

    def _move(self, found: Accepted) -> None:
        assert self.z is not None
        if self.accelerate:
            self._average(found)
            self._last = (self.u, self.z)
        self.point, self.u, self.x = found.point, found.point.u, found.point.x
        self.alpha = self.rho_up * found.alpha
        self.eps, self.delta = self.nu_up * self.eps, self.nu_up * self.delta

    # ── first values ──────────────────────────────────────────────────────────────────────────────────────────────
    def _choose_accuracies(self) -> None:
        eps, delta = self._first["eps"], self._first["delta"]
        if eps == "auto":
            mu = self.moduli(self.u)[0]
            with torch.no_grad():
                residual = self.lower.gradient_at(self.lower.values(self.u))(self.x)
            self.work.inner += 1
            self.problem.counts.inner_grad += 1
            distance = 0.02 * float((torch.linalg.vector_norm(residual.flatten(1), dim=1) / mu).max())
            eps = distance if 0 < distance < math.inf else 0.1
        self.eps = float(eps)
        self.delta = self.eps if delta == "auto" else float(delta)

    def _choose_step_size(self) -> None:
        assert self.z is not None
        alpha = self._first["alpha"]
        if alpha == "auto":
            # Of a vector near zero, one per cent would be no step at all: unconstrained values are of order one.
            size = max(float(torch.linalg.vector_norm(self.u)), math.sqrt(len(self.u)))
            alpha = 0.01 * size / float(torch.linalg.vector_norm(self.z))
        self.alpha = float(alpha)

    # ── acceleration ──────────────────────────────────────────────────────────────────────────────────────────────
    def _start_size(self) -> float:
        """Barzilai-Borwein step size, within a factor of ten of what the search would start with."""
        if self._last is None or self.z is None:
            return self.alpha
        s, y = self.u - self._last[0], self.z - self._last[1]
        curvature = float(s @ y)
        if not curvature > 0:
            return self.alpha
        return min(max(float(s @ s) / curvature, 0.1 * self.alpha), 10 * self.alpha)

    def _average(self, found: Accepted) -> None:
        assert self.point is not None
        if self._window is None:
            self._window = (1.0, bounds_of(self, self.point)[0])
        weight, value = self._window
        grown = _REFERENCE_WEIGHT * weight + 1.0
        new = bounds_of(self, found.point)[0]
        self._window = (grown, (_REFERENCE_WEIGHT * weight * value + new) / grown)

    def extra_state(self) -> dict[str, Any]:
        own = {"eps": self.eps, "delta": self.delta, "alpha": self.alpha, "window": self._window, "last": self._last}
        return {**super().extra_state(), **own}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.eps, self.delta, self.alpha = state["eps"], state["delta"], state["alpha"]
        self._window, self._last = state["window"], state["last"]
