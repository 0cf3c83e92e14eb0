"""StocBiO: the double loop, with a truncated Neumann series for the inverse of the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from ..step import DivergenceError
from ..tuner import StepInfo
from .bilevel_updates import Schedule
from .normalized_momentum import apply_step, joint_norm
from .oracle_tuner import ScheduledTuner
from .oracles import check_positive


class StocBiO(ScheduledTuner):
    """StocBiO (Ji, Yang and Liang 2021, arXiv 2010.07962): `inner_steps` lower steps, then one upper step.

        v = lr_n sum_{q = 0..Q} (I - lr_n H_q) ... (I - lr_n H_1) grad_y f,       x = x - outer_lr (grad_x f - J v)

    with H_q the training Hessian of a fresh batch each, J v the mixed product. Nothing is carried over between steps
    but the parameters. A step costs inner_steps gradients, Q Hessian products, one mixed product, one outer gradient.

    Args:
        problem: both losses; inner must have a derivative in the hyperparameters.
        outer_lr: step size of the hyperparameters (a tensor for several independent problems).
        inner_lr: step size of the parameters.
        neumann_lr: lr_n, of the series; it converges below 2 / (largest eigenvalue of H).
        inner_steps: lower steps in each step, >= 1.
        neumann_steps: Q, >= 0.
        schedule: of `outer_lr`; see `BOREP`.
        total_steps: length of the cosine; `run` and `fit` know it.
        independent: see `BOREP`.

    Raises:
        ValueError: for an argument out of range.
        DivergenceError: from a step whose gradients are not finite.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> decay = Hyperparameter(1.0, chart="exp")
        >>> inner = lambda w, v, b: (w["weight"] - 1).square().sum() + v["decay"] * w["weight"].square().sum()
        >>> outer = lambda w, v, b: (w["weight"] - 0.25).square().sum()
        >>> problem = BilevelProblem(model, inner, outer, hypers={"decay": decay})
        >>> history = StocBiO(problem, outer_lr=3.0, inner_lr=0.1, neumann_lr=0.1).run([0], [0], steps=100)
        >>> abs(float(decay()) - 3.0) < 0.1
        True
    """

    def __init__(
        self,
        problem: BilevelProblem,
        outer_lr: float | Tensor,
        inner_lr: float,
        neumann_lr: float,
        inner_steps: int = 10,
        neumann_steps: int = 10,
        schedule: Schedule = None,
        *,
        total_steps: int | None = None,
        independent: int = 0,
    ) -> None:
        for name, value in (("outer_lr", outer_lr), ("inner_lr", inner_lr), ("neumann_lr", neumann_lr)):
            check_positive("StocBiO", name, value)
        if inner_steps < 1 or neumann_steps < 0:
            raise ValueError(
                f"StocBiO: inner_steps must be >= 1 and neumann_steps >= 0, got {inner_steps} and {neumann_steps}"
            )
        super().__init__(problem, outer_lr, schedule, total_steps)
        self.inner_lr, self.neumann_lr, self.independent = inner_lr, neumann_lr, independent
        self.inner_steps, self.neumann_steps = inner_steps, neumann_steps

    @torch.no_grad()
    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        inner_loss = 0.0
        for _ in range(self.inner_steps):
            value, gradients = self.oracles.inner(train)
            torch._foreach_add_(self.params, gradients, alpha=-self.inner_lr)
            self.problem.on_step()
            inner_loss = float(value)
        outer_loss, by_params, by_raw = self.oracles.outer(validation)
        mixed = self.oracles.mixed(self.inverse_product(by_params, train), train)
        hypergradient = list(torch._foreach_sub(by_raw, mixed))
        norm = joint_norm(hypergradient, self.independent)
        if not bool(torch.isfinite(norm).any()):
            raise DivergenceError(
                f"StocBiO: the hypergradient is not finite at step {self.number}; lower inner_lr ({self.inner_lr}), "
                f"neumann_lr ({self.neumann_lr}) or outer_lr ({self.outer_lr})"
            )
        apply_step([h.raw for h in self.problem.hypers.values()], hypergradient, self.scheduled_lr())
        self.number += 1
        values = {n: float(h()) for n, h in self.problem.hypers.items() if h.raw.ndim == 0}
        return StepInfo(inner_loss, float(outer_loss), {**values}, {"hypergrad_norm": float(norm.mean())})

    def inverse_product(self, vector: list[Tensor], train: Iterator[Any]) -> list[Tensor]:
        """The truncated Neumann series of the inverse Hessian, times `vector`; each product on a fresh batch."""
        term, total = vector, vector
        for _ in range(self.neumann_steps):
            product = self.oracles.hvp(term, train)
            term = list(torch._foreach_add(term, product, alpha=-self.neumann_lr))
            total = list(torch._foreach_add(total, term))
        return list(torch._foreach_mul(total, self.neumann_lr))

    def extra_state(self) -> dict[str, Any]:
        return {"number": self.number, "total_steps": self.total_steps}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.number, self.total_steps = state["number"], state["total_steps"]
