"""BO-REP: stochastic bilevel descent with normalised momentum, for upper levels whose curvature explodes.

The methods that it builds on (SOBA, MA-SOBA) and its rivals (normalisation alone, clipping) are other settings of the
same class; `single_loop` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..bilevel import BilevelProblem
from ..numerics import conjugate_gradient, flatten, unflatten
from ..step import DivergenceError
from ..tuner import StepInfo
from .bilevel_updates import Schedule, linear_system_step, project_to_ball, refinement_step_sizes
from .normalized_momentum import EPS, Mode, apply_step, check_beta, joint_norm, momentum_average, step_factor
from .oracle_tuner import ScheduledTuner
from .oracles import check_positive


class BOREP(ScheduledTuner):
    """BO-REP, bilevel optimization with initialization refinement and periodic updates (arXiv 2401.09587).

    Lower level y (the network's parameters), linear system z, upper level x (the hyperparameters' unconstrained
    values; sample weights and encoders are such, too). At first y is refined by `refine_steps` steps. Then, in step k:

        every `period` steps:  `inner_steps` times  y = y - inner_lr grad_y g(x, y)     (projected, with `radius`)
        z' = z - z_lr (H z - grad_y f)                      H the Hessian of g in y
        m  = beta m + (1 - beta) (grad_x f - grad_x <grad_y g, z>)
        x  = x - outer_lr m / |m|

    f is the outer (validation) loss, g the inner (training) loss, every term on a fresh batch. A step costs one
    gradient of f, one Hessian product and one mixed product of g, and inner_steps / period gradients of g. As x moves
    exactly `outer_lr` a step, y*(x) drifts slowly enough for y to wait between periods, however large gradients are.

    For ONE number the update is sign descent; with several hyperparameters of different kinds the one with the largest
    gradient takes most of the step, so choose charts in which a unit means about the same for all (`chart="exp"`).
    Steps never shrink by themselves: the paper keeps `outer_lr` constant, in practice decay it (`schedule="cosine"`).
    Compare with `clipped_ma_soba`, the obvious remedy, which needs a threshold.

    Args:
        problem: both losses; inner must have a derivative in the hyperparameters.
        outer_lr: eta, length of an upper step in mode "normalized", > 0.
        inner_lr: gamma, of the parameters, > 0; ignored with `inner_optimizer`.
        z_lr: nu, of the linear system, > 0; below 2 / (largest eigenvalue of H). Ignored by "cg".
        beta: share of the old momentum, in [0, 1).
        period: I, steps from one lower update to the next, >= 1.
        inner_steps: N, lower steps in an update, >= 1.
        refine_steps: N_0, lower steps before the first upper one; step sizes halve twice on the way.
        radius: R, lower steps stay within this distance of where their update began; None does not project.
        mode: "normalized", "clipped" (`outer_lr * m * min(1, clip / |m|)`) or "plain".
        order: "gauss_seidel" moves y first, and z and x see the new one; "jacobi" moves all from the old point, as the
            published SOBA and MA-SOBA do.
        linear_solver: "sgd", one step of z as above, or "cg": `cg_steps` conjugate-gradient steps on one batch from
            the last z, for Hessians with small eigenvalues.
        schedule: of `outer_lr`: None, "cosine" to 0, or a function from the step's number to a factor.
        reuse_batch: one training batch, and one graph, for Hessian and mixed product; halves their cost.
        clip: of mode "clipped", > 0.
        cg_steps: of `linear_solver="cg"`.
        accumulate: batches over which every oracle is averaged, before anything is normalised.
        total_steps: length of the cosine; `run` and `fit` know it.
        inner_optimizer: makes another optimizer of the parameters than SGD, e.g. `partial(torch.optim.Adam, lr=1e-3)`.
            The theory is for SGD.
        independent: number of leading dimensions of all tensors that number problems of their own (many seeds side by
            side): norms are then taken for each, and `outer_lr` and `clip` may be tensors of that shape.
        eps: added to norms that are divided by.

    Raises:
        ValueError: for an argument out of range, parameters that are hyperparameters as well, or an inner loss without
            derivative in a hyperparameter (from the first step).
        DivergenceError: from a step, naming the oracle that is not finite.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> decay = Hyperparameter(1.0, chart="exp")
        >>> inner = lambda w, v, b: (w["weight"] - 1).square().sum() + v["decay"] * w["weight"].square().sum()
        >>> outer = lambda w, v, b: (w["weight"] - 0.25).square().sum()
        >>> problem = BilevelProblem(model, inner, outer, hypers={"decay": decay})
        >>> tuner = BOREP(problem, outer_lr=0.1, inner_lr=0.1, z_lr=0.1, schedule="cosine")
        >>> history = tuner.run([0], [0], steps=100)
        >>> abs(float(decay()) - 3.0) < 0.2
        True
    """

    def __init__(
        self,
        problem: BilevelProblem,
        outer_lr: float | Tensor,
        inner_lr: float,
        z_lr: float,
        beta: float = 0.9,
        period: int = 2,
        inner_steps: int = 3,
        refine_steps: int = 50,
        radius: float | None = None,
        mode: Mode = "normalized",
        order: Literal["gauss_seidel", "jacobi"] = "gauss_seidel",
        linear_solver: Literal["sgd", "cg"] = "sgd",
        schedule: Schedule = None,
        reuse_batch: bool = False,
        *,
        clip: float | Tensor = 1.0,
        cg_steps: int = 5,
        accumulate: int = 1,
        total_steps: int | None = None,
        inner_optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        independent: int = 0,
        eps: float = EPS,
    ) -> None:
        owner = type(self).__name__
        for name, value in (("outer_lr", outer_lr), ("inner_lr", inner_lr), ("z_lr", z_lr), ("clip", clip),
                            ("radius", radius), ("eps", eps)):  # fmt: skip
            check_positive(owner, name, value)
        for name, count, least in (("period", period, 1), ("inner_steps", inner_steps, 1), ("cg_steps", cg_steps, 1),
                                   ("refine_steps", refine_steps, 0), ("accumulate", accumulate, 1),
                                   ("independent", independent, 0), ("total_steps", total_steps or 1, 1)):  # fmt: skip
            if count < least:
                raise ValueError(f"{owner}: {name} must be >= {least}, got {count}")
        for name, choice, allowed in (("mode", mode, ("normalized", "clipped", "plain")),
                                      ("order", order, ("gauss_seidel", "jacobi")),
                                      ("linear_solver", linear_solver, ("sgd", "cg"))):  # fmt: skip
            if choice not in allowed:
                raise ValueError(f"{owner}: {name} must be one of {list(allowed)}, got {choice!r}")
        check_beta(owner, beta)
        if not (schedule is None or schedule == "cosine" or callable(schedule)):
            raise ValueError(f"{owner}: schedule must be None, 'cosine' or a function, got {schedule!r}")
        if linear_solver == "cg" and independent:
            raise ValueError(f"{owner}: linear_solver 'cg' solves one problem, got independent={independent}")
        super().__init__(problem, outer_lr, schedule, total_steps, accumulate)
        self.inner_lr, self.z_lr, self.beta = inner_lr, z_lr, beta
        self.period, self.inner_steps, self.refine_steps, self.radius = period, inner_steps, refine_steps, radius
        self.mode: Mode = mode
        self.order, self.linear_solver, self.cg_steps = order, linear_solver, cg_steps
        self.reuse_batch, self.clip, self.eps, self.independent = reuse_batch, clip, eps, independent
        self.inner_optimizer = None if inner_optimizer is None else inner_optimizer(self.params)
        self.z = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.params]
        self.momentum = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in self.upper]
        self.refined = refine_steps == 0

    @property
    def upper(self) -> list[Tensor]:
        """The unconstrained values that the upper level moves, in place."""
        return [h.raw for h in self.problem.hypers.values()]

    @torch.no_grad()
    def refine(self, train: Iterator[Any]) -> float | None:
        """The initial refinement: `refine_steps` lower steps at the initial x. The first `step` does it by itself.

        Returns:
            The last training loss; None where it was done before, or `refine_steps` is 0.
        """
        loss = None
        if not self.refined:
            for lr in refinement_step_sizes(self.inner_lr, self.refine_steps):
                loss = self._inner_step(train, lr)
            self.refined = True
        return loss

    @torch.no_grad()
    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        inner_loss = self.refine(train)
        due = self.number % self.period == 0
        if due and self.order == "gauss_seidel":
            inner_loss = self._move_inner(train)
        outer_loss, by_params, by_raw = self.oracles.outer(validation)
        solution, mixed, product = self._second_order(train, by_params)
        if due and self.order == "jacobi":
            inner_loss = self._move_inner(train)
        hypergradient = list(torch._foreach_sub(by_raw, mixed))
        norm = joint_norm(hypergradient, self.independent)
        residual = joint_norm(list(torch._foreach_sub(product, by_params)), self.independent)
        # One look for all: only when something is wrong is the culprit searched for.
        if not bool((torch.isfinite(norm) & torch.isfinite(residual)).any()):
            self._refuse(outer_loss=[outer_loss], outer_grads=by_params + by_raw, hvp=product, mixed_vjp=mixed)
        self.z = solution
        self.momentum = momentum_average(self.momentum, hypergradient, self.beta)
        self._move_upper()
        self.number += 1
        return StepInfo(
            inner_loss,
            float(outer_loss),
            self.small_values(),
            {
                "hypergrad_norm": float(norm.mean()),
                "z_residual": float(residual.mean()),
                "did_inner_update": float(due),
            },
        )

    def _move_upper(self) -> None:
        norm = joint_norm(self.momentum, self.independent)
        lr = self.scheduled_lr()
        apply_step(self.upper, self.momentum, lr * step_factor(norm, self.mode, self.clip, self.eps))

    def _move_inner(self, train: Iterator[Any]) -> float | None:
        centre = [p.detach().clone() for p in self.params] if self.radius is not None else []
        loss = None
        for _ in range(self.inner_steps):
            loss = self._inner_step(train, self.inner_lr)
            if self.radius is not None:
                project_to_ball(self.params, centre, self.radius, self.independent)
        return loss

    def _inner_step(self, train: Iterator[Any], lr: float) -> float:
        # Gradients are returned, never accumulated in `.grad`: each step moves along its own batch alone.
        value, gradients = self.oracles.inner(train)
        loss = float(value)
        if not math.isfinite(loss) and self.independent == 0:
            self._refuse(inner_loss=[value])
        if self.inner_optimizer is None:
            torch._foreach_add_(self.params, gradients, alpha=-lr)
        else:
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = g
            self.inner_optimizer.step()
            self.inner_optimizer.zero_grad()
        self.problem.on_step()
        return loss

    def _second_order(
        self, train: Iterator[Any], right_side: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The next z, the mixed product with the present one, and the Hessian's product with it."""
        if self.linear_solver == "cg":
            batch = next(train)
            solution, product = self._conjugate_gradients(batch, right_side)
            mixed = self.oracles.mixed(self.z, iter([batch]) if self.reuse_batch else train)
            return solution, mixed, product
        if self.reuse_batch:
            product, mixed = self.oracles.both(self.z, train)
        else:
            product = self.oracles.hvp(self.z, train)
            mixed = self.oracles.mixed(self.z, train)
        return linear_system_step(self.z, product, right_side, self.z_lr), mixed, product

    def _conjugate_gradients(self, batch: Any, right_side: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        products: list[list[Tensor]] = []

        def matvec(v: Tensor) -> Tensor:
            found = self.oracles.hvp(unflatten(v, self.z), iter([batch] * self.oracles.accumulate))
            products.append(found)
            return flatten(found).to(v.dtype)

        right = flatten([b.to(z.dtype) for b, z in zip(right_side, self.z, strict=True)])
        start = flatten(self.z)
        result = conjugate_gradient(matvec, right, tol=0.0, max_iterations=self.cg_steps, start=start)
        if result.status == "not_finite":
            return self.z, products[0]
        return unflatten(result.solution, self.z), products[0]

    def _refuse(self, **oracles: list[Tensor]) -> None:
        owner = type(self).__name__
        if not all(bool(torch.isfinite(p).all()) for p in self.params):
            raise DivergenceError(
                f"{owner}: the parameters are not finite at step {self.number}, after inner_grad moved them; lower "
                f"inner_lr (now {self.inner_lr}) or give a radius"
            )
        if not all(bool(torch.isfinite(z).all()) for z in self.z):
            raise DivergenceError(
                f"{owner}: the linear system diverged at step {self.number}; lower z_lr (now {self.z_lr})"
            )
        for name, tensors in oracles.items():
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                raise DivergenceError(f"{owner}: the oracle {name} is not finite at step {self.number}")
        raise DivergenceError(f"{owner}: norms overflow at step {self.number}")

    def extra_state(self) -> dict[str, Any]:
        optimizer = self.inner_optimizer
        return {
            "z": [z.clone() for z in self.z],
            "momentum": [m.clone() for m in self.momentum],
            "number": self.number,
            "refined": self.refined,
            "total_steps": self.total_steps,
            "inner_optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.z = [z.clone() for z in state["z"]]
        self.momentum = [m.clone() for m in state["momentum"]]
        self.number, self.refined, self.total_steps = state["number"], state["refined"], state["total_steps"]
        if self.inner_optimizer is not None:
            self.inner_optimizer.load_state_dict(state["inner_optimizer"])
