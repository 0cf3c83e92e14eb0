"""One unrolled step: differentiate the validation loss through a single training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..bilevel import BilevelProblem
from ..tuner import StepInfo
from .oracle_tuner import OracleTuner
from .oracles import check_positive
from .outer_optimizer import OuterOptimizer


class OneStepUnrolled(OracleTuner):
    """The hypergradient through one SGD step, the usual first try (Luketina et al. 2016, arXiv 1511.06727; DARTS).

        w' = w - inner_lr grad_w g(w, u),     d/du f(w'(u), u) = grad_u f - inner_lr grad_u <grad_w g(w, u), grad_w f(w')>

    f's gradients at w', the mixed product at w on the same training batch. It takes no Hessian product, and is
    short-sighted: what a hyperparameter does to the parameters over many steps is not seen (short-horizon bias, Wu et
    al. 2018, arXiv 1803.02021).

    Args:
        problem: both losses; inner must have a derivative in the hyperparameters.
        inner_lr: step size of the parameters, > 0.
        outer_lr: step size of the hyperparameters' unconstrained values, > 0.
        outer_optimizer: makes their optimizer from tensors and `lr`; Adam by default.
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
        >>> history = OneStepUnrolled(problem, inner_lr=0.1, outer_lr=0.05).run([0], [0], steps=200)
        >>> abs(float(decay()) - 3.0) < 0.3
        True
    """

    def __init__(
        self,
        problem: BilevelProblem,
        inner_lr: float,
        outer_lr: float,
        outer_optimizer: Callable[..., Optimizer] | None = None,
        clip: float | None = None,
    ) -> None:
        check_positive("OneStepUnrolled", "inner_lr", inner_lr)
        super().__init__(problem)
        self.inner_lr = inner_lr
        self.outer = OuterOptimizer(problem, outer_lr, outer_optimizer, clip, "OneStepUnrolled")

    @torch.no_grad()
    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        batch = next(train)
        inner_loss, gradients = self.oracles.inner(iter([batch]))
        before = [p.detach().clone() for p in self.params]
        torch._foreach_add_(self.params, gradients, alpha=-self.inner_lr)
        outer_loss, by_params, by_raw = self.oracles.outer(validation)
        moved = [p.detach().clone() for p in self.params]
        self._put(before)
        mixed = self.oracles.mixed(by_params, iter([batch]))
        self._put(moved)
        self.problem.on_step()
        hypergradient = list(torch._foreach_add(by_raw, mixed, alpha=-self.inner_lr))
        norm = self.outer.step(hypergradient)
        return StepInfo(float(inner_loss), float(outer_loss), self.small_values(), {"hypergrad_norm": norm})

    def _put(self, values: Iterable[Tensor]) -> None:
        torch._foreach_copy_(self.params, list(values))

    def extra_state(self) -> dict[str, Any]:
        return {"outer": self.outer.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.outer.load_state_dict(state["outer"])
