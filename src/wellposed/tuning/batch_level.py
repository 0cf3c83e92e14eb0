"""Two checks on hyperparameters that differ within a batch: who reads them must treat examples one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from ..hyperparameter import Hyperparameter, substituted
from ..training_objective import TrainingObjective


class OnlyPerExample(Tensor):
    """Stands for the value of a hyperparameter that differs within the batch, where a hook acts on the whole batch.

    Raises:
        ValueError: on any use.
    """

    message: str

    @classmethod
    def of(cls, name: str, hook: str) -> OnlyPerExample:
        """For a hyperparameter and a hook, by name."""
        found = Tensor._make_subclass(cls, torch.empty(0))
        found.__dict__["message"] = (
            f"SelfTuner: the hyperparameter {name!r} has per_example=True, but {hook} reads it for the whole batch; "
            "create it with per_example=False"
        )
        return found

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any function of torch that is given one."""
        found = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        raise ValueError(found.__dict__["message"])


def for_the_batch(raw: Mapping[str, Tensor], hypers: Mapping[str, Hyperparameter], hook: str) -> dict[Any, Any]:
    """What `substituted` takes while a hook acts on the whole batch: values of each example raise when read."""
    return {h: OnlyPerExample.of(name, hook) if h.per_example else raw[name] for name, h in hypers.items()}


@torch.no_grad()
def check_penalties(problem: BilevelProblem, raw: Mapping[str, Tensor]) -> None:
    """Refuse a penalty of the whole batch, times a strength of each example.

    Such a product has one number an example and looks like a term of each, but no example's penalty depends on its own
    strength then, and the response would learn nothing from it. It shows by being a scalar under a scalar strength.

    Args:
        problem: just evaluated under `raw`.
        raw: unconstrained values by name, (batch, *shape) where each example has its own.

    Raises:
        ValueError: naming the hyperparameter.
    """
    objective = problem.objective
    if objective is None or objective.last is None:
        return
    before = _term_dimensions(objective, problem, raw)
    for name, h in problem.hypers.items():
        if h.per_example and before != (after := _term_dimensions(objective, problem, {**raw, name: h.raw})):
            if any(many > one == 0 for many, one in zip(before, after, strict=True)):
                raise ValueError(
                    f"SelfTuner: the hyperparameter {name!r} has per_example=True, but it multiplies a penalty of the "
                    "whole batch; create it with per_example=False"
                )


def _term_dimensions(objective: TrainingObjective, problem: BilevelProblem, raw: Mapping[str, Tensor]) -> list[int]:
    with substituted({h: raw[name] for name, h in problem.hypers.items()}):
        penalty = objective.regularizer.penalty(objective.last)  # type: ignore[arg-type]
    terms = [] if penalty is None else penalty if isinstance(penalty, list) else [penalty]
    return [term.ndim for term in terms]
