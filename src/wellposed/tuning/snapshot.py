"""`Snapshot`: everything that a training changes, to go back to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batching import unwrap
from ..bilevel import BilevelProblem
from ..parameters import trainable_names


@dataclass(frozen=True)
class Snapshot:
    """Copies of parameters, buffers, hyperparameters and the method's state at one moment of a training.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, batch: v["h"] * w["w"].square().sum()
        >>> weight = torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(None, loss, loss, {"w": weight}, {"h": Hyperparameter(1.0)})
        >>> before = Snapshot.take(problem)
        >>> with torch.no_grad():
        ...     _ = weight.fill_(5.0)
        >>> before.restore(problem)
        >>> weight.item()
        1.0
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    hypers: dict[str, Tensor]
    objective: Any
    trainable: list[str]

    @classmethod
    def take(cls, problem: BilevelProblem) -> Snapshot:
        """Copy the present state."""
        model, objective = problem.model, problem.objective
        return cls(
            {n: p.detach().clone() for n, p in {**dict(unwrap(model).named_parameters()), **problem.params}.items()},
            {n: b.detach().clone() for n, b in model.named_buffers()},
            {n: h.raw.detach().clone() for n, h in problem.hypers.items()},
            None if objective is None else copy.deepcopy(objective.run_state()),
            trainable_names(model),
        )

    @torch.no_grad()
    def restore(self, problem: BilevelProblem) -> None:
        """Go back to it, in place."""
        model, objective = problem.model, problem.objective
        named = dict(unwrap(model).named_parameters())
        for name, parameter in {**named, **problem.params}.items():
            parameter.copy_(self.params[name])
        for name, parameter in named.items():
            parameter.requires_grad_(name in self.trainable)
        for name, buffer in model.named_buffers():
            buffer.copy_(self.buffers[name])
        if objective is not None:
            # A copy: what the method keeps and changes must not be the snapshot's own.
            objective.load_run_state(copy.deepcopy(self.objective))
        # Last: a hyperparameter inside the model is one of its buffers, one of the method part of its state.
        for name, h in problem.hypers.items():
            h.raw.copy_(self.hypers[name])
