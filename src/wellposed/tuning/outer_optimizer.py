"""Any torch optimizer on the unconstrained values of hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from ..bilevel import BilevelProblem
from ..numerics import global_norm
from ..step import DivergenceError
from .oracles import check_positive


class OuterOptimizer:
    """Moves `h.raw` of every hyperparameter, in place, by an optimizer that is handed the hypergradient.

    Args:
        problem: whose hyperparameters.
        lr: step size, > 0.
        make: makes the optimizer from tensors and `lr`; Adam with beta_1 = 0.9, beta_2 = 0.99 by default.
        clip: largest norm of the hypergradient, or None.
        owner: named in errors.

    Raises:
        ValueError: for an argument out of range.
        DivergenceError: from a step whose hypergradient is not finite.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> h, loss = Hyperparameter(1.0, chart="exp"), lambda w, v, b: w["w"].sum()
        >>> problem = BilevelProblem(None, loss, loss, {"w": torch.ones(1)}, {"h": h})
        >>> outer = OuterOptimizer(problem, 0.5, torch.optim.SGD)
        >>> outer.step([torch.tensor(2.0)]), h.raw
        (2.0, tensor(-1.))
    """

    def __init__(
        self,
        problem: BilevelProblem,
        lr: float,
        make: Callable[..., Optimizer] | None = None,
        clip: float | None = None,
        owner: str = "OuterOptimizer",
    ) -> None:
        check_positive(owner, "outer_lr", lr)
        check_positive(owner, "clip", clip)
        self.clip, self.owner = clip, owner
        self.raws = [h.raw for h in problem.hypers.values()]
        self.optimizer = Adam(self.raws, lr=lr, betas=(0.9, 0.99)) if make is None else make(self.raws, lr=lr)

    @torch.no_grad()
    def step(self, hypergradient: list[Tensor]) -> float:
        """Move the hyperparameters once; returns the norm of the hypergradient, before clipping."""
        norm = float(global_norm(hypergradient))
        if not norm - norm == 0.0:
            raise DivergenceError(f"{self.owner}: the hypergradient is not finite")
        scale = 1.0 if self.clip is None else min(1.0, self.clip / max(norm, 1e-30))
        for raw, gradient in zip(self.raws, hypergradient, strict=True):
            raw.grad = (scale * gradient).to(raw.dtype)
        self.optimizer.step()
        for raw in self.raws:
            raw.grad = None  # a buffer with a gradient would surprise whoever copies the module
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.optimizer.load_state_dict(state)
