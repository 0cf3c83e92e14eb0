"""Implicit differentiation for stochastic and deep problems: train a while, then one linear solve for the hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..bilevel import BilevelProblem
from ..numerics import conjugate_gradient, flatten, unflatten
from ..step import DivergenceError
from ..tuner import StepInfo
from .oracle_tuner import OracleTuner
from .oracles import Oracles, check_positive
from .outer_optimizer import OuterOptimizer


class ImplicitDifferentiation(OracleTuner):
    """Approximate implicit differentiation by conjugate gradients (Pedregosa 2016, arXiv 1602.02355; Lorraine et al. 2020).

    A step trains for `inner_steps` steps, then solves, on `batches` training batches that stay fixed for the solve,

        (H + damping I) z = grad_w f        by at most `cg_steps` conjugate-gradient steps from the last z,

    and moves the hyperparameters along grad_u f - grad_u <grad_w g, z>. It forgets how the parameters came about: the
    hypergradient is right near a minimum of the training loss, however many steps led there. The Hessian of a deep
    network is often indefinite; the solve then ends at the first direction of negative curvature, and `damping` moves
    it away. Where the training loss is strongly convex and the batch is all data, `HOAG` and `MAID` control the error.

    Args:
        problem: both losses; inner must have a derivative in the hyperparameters.
        inner_lr: step size of the parameters, > 0.
        outer_lr: step size of the hyperparameters' unconstrained values, > 0.
        inner_steps: training steps in each step, >= 1.
        cg_steps: most conjugate-gradient steps, >= 1.
        tol: the solve ends at a residual of `tol` times that of z = 0; shrinks as 1 / sqrt(step), as the sum of errors
            must stay bounded for convergence.
        damping: added to the Hessian's eigenvalues, >= 0.
        batches: training batches of the linear system, >= 1.
        inner_optimizer: makes the optimizer of the parameters from tensors and `lr`; SGD with momentum 0.9 by default.
        outer_optimizer: of the hyperparameters; Adam by default.
        clip: largest norm of the hypergradient, or None.

    Raises:
        ValueError: for an argument out of range.
        DivergenceError: from a step whose hypergradient is not finite.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> decay = Hyperparameter(1.0, chart="exp")
        >>> inner = lambda w, v, b: (w["weight"] - 1).square().sum() + v["decay"] * w["weight"].square().sum()
        >>> outer = lambda w, v, b: (w["weight"] - 0.25).square().sum()
        >>> problem = BilevelProblem(model, inner, outer, hypers={"decay": decay})
        >>> history = ImplicitDifferentiation(problem, inner_lr=0.05, outer_lr=0.1).run([0], [0], steps=60)
        >>> abs(float(decay()) - 3.0) < 0.3
        True
    """

    def __init__(
        self,
        problem: BilevelProblem,
        inner_lr: float,
        outer_lr: float,
        inner_steps: int = 10,
        cg_steps: int = 10,
        tol: float = 1e-2,
        damping: float = 0.0,
        batches: int = 1,
        inner_optimizer: Callable[..., Optimizer] | None = None,
        outer_optimizer: Callable[..., Optimizer] | None = None,
        clip: float | None = None,
    ) -> None:
        owner = "ImplicitDifferentiation"
        check_positive(owner, "inner_lr", inner_lr)
        for name, count in (("inner_steps", inner_steps), ("cg_steps", cg_steps), ("batches", batches)):
            if count < 1:
                raise ValueError(f"{owner}: {name} must be >= 1, got {count}")
        if not tol >= 0 or not damping >= 0:
            raise ValueError(f"{owner}: tol and damping must be >= 0, got {tol} and {damping}")
        super().__init__(problem)
        self.inner_steps, self.cg_steps, self.tol, self.damping = inner_steps, cg_steps, tol, damping
        self.inner: Optimizer = (
            SGD(self.params, lr=inner_lr, momentum=0.9)
            if inner_optimizer is None
            else inner_optimizer(self.params, lr=inner_lr)
        )
        self.outer = OuterOptimizer(problem, outer_lr, outer_optimizer, clip, owner)
        self.system = Oracles(problem, batches)
        self.z = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.params]
        self.number = 0

    @torch.no_grad()
    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        inner_loss = 0.0
        for _ in range(self.inner_steps):
            value, gradients = self.oracles.inner(train)
            inner_loss = float(value)
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = g
            self.inner.step()
            self.inner.zero_grad()
            self.problem.on_step()
        outer_loss, by_params, by_raw = self.oracles.outer(validation)
        fixed = [next(train) for _ in range(self.system.accumulate)]
        relative = self._solve(fixed, by_params)
        mixed = self.system.mixed(self.z, iter(fixed))
        norm = self.outer.step(list(torch._foreach_sub(by_raw, mixed)))
        self.number += 1
        extra = {"hypergrad_norm": norm, "z_residual": relative}
        return StepInfo(inner_loss, float(outer_loss), self.small_values(), extra)

    def _solve(self, fixed: Iterable[Any], right_side: list[Tensor]) -> float:
        """Move z towards the solution on fixed batches; the residual that is left, relative to the right side."""
        batches = list(fixed)

        def matvec(v: Tensor) -> Tensor:
            found = self.system.hvp(unflatten(v, self.z), iter(batches))
            return flatten(found).to(v.dtype) + self.damping * v

        right = flatten([b.to(z.dtype) for b, z in zip(right_side, self.z, strict=True)])
        tol = self.tol / (1 + self.number) ** 0.5
        result = conjugate_gradient(matvec, right, tol=tol, max_iterations=self.cg_steps, start=flatten(self.z))
        if result.status == "not_finite":
            raise DivergenceError(
                "ImplicitDifferentiation: the hypergradient is not finite: the linear system overflowed at step "
                f"{self.number}; lower inner_lr, or give damping"
            )
        self.z = unflatten(result.solution, self.z)
        return result.residual_norms[-1] / max(float(right.norm()), 1e-30)

    def extra_state(self) -> dict[str, Any]:
        return {
            "z": [z.clone() for z in self.z],
            "number": self.number,
            "inner": self.inner.state_dict(),
            "outer": self.outer.state_dict(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.z, self.number = [z.clone() for z in state["z"]], state["number"]
        self.inner.load_state_dict(state["inner"])
        self.outer.load_state_dict(state["outer"])
