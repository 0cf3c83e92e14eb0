"""One ordinary training step of a bilevel problem's parameters, with every hook of its method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..bilevel import BilevelProblem
from ..parameters import apply_lr_factors, clip_gradients, parameter_groups

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


def training_step(problem: BilevelProblem, optimizer: Optimizer, batch: Any, clip_norm: float | None = None) -> Tensor:
    """Forward, backward, `on_backward`, `on_gradients` (with its closure), clipping, the optimizer's step, `on_step`.

    The step that `wellposed.fit` takes, at the hyperparameters' present values, which get no gradient.

    Args:
        problem: whose parameters move.
        optimizer: of these parameters.
        batch: one training batch.
        clip_norm: largest global norm of the gradient.

    Returns:
        The training loss before the step, a detached scalar.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> model, strength = torch.nn.Linear(1, 1, bias=False), Hyperparameter(1.0)
        >>> loss = lambda w, v, batch: v["h"] * w["weight"].square().sum()
        >>> problem = BilevelProblem(model, loss, loss, hypers={"h": strength})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> before = training_step(problem, optimizer, None)
        >>> model.weight.item()  # the minimum, in one step
        0.0
    """
    optimizer.zero_grad(set_to_none=True)
    fixed = {name: h.raw.detach() for name, h in problem.hypers.items()}

    def evaluate() -> Tensor:
        return problem.evaluate(problem.inner_loss, problem.params, fixed, batch)

    problem.counts.inner_grad += 1
    problem.begin()
    with torch.enable_grad():
        # `backward`, not the oracle `inner_grad`: a parameter that a method froze, or that the loss does not read,
        # must have no gradient instead of one of zeros, which decay and momentum would follow.
        value = evaluate()
        value.backward()  # type: ignore[no-untyped-call]
    problem.write_state()
    problem.on_gradients(evaluate)
    if clip_norm is not None:
        if problem.objective is None:
            torch.nn.utils.clip_grad_norm_(list(problem.params.values()), clip_norm)
        else:
            clip_gradients(problem.model, clip_norm)
    optimizer.step()
    problem.on_step()
    return value.detach()


def build_optimizer(problem: BilevelProblem, make: OptimizerFactory | None = None) -> Optimizer:
    """An optimizer of a problem's parameters, with the wishes of its method carried out; AdamW by default.

    It is lent to the method's hooks, as `fit` lends its own.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, batch: v["h"] * w["w"].square().sum()
        >>> weight = torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(None, loss, loss, {"w": weight}, {"h": Hyperparameter(1.0)})
        >>> type(build_optimizer(problem)).__name__
        'AdamW'
    """
    make = make or torch.optim.AdamW
    if problem.objective is None:
        return make([{"params": list(problem.params.values()), "names": list(problem.params)}])
    wishes = problem.objective.regularizer.parameter_groups(problem.model)
    optimizer = make(parameter_groups(problem.model, wishes))
    apply_lr_factors(optimizer)
    problem.objective.optimizer = optimizer
    return optimizer
