"""`Tuner`: the protocol of methods that learn hyperparameters, and what they may require of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bilevel import BilevelProblem
from .loading import EndlessBatches
from .regularizer import leaves
from .step import DivergenceError

TUNER_REQUIREMENTS = frozenset(
    {"double_backward", "strongly_convex", "deterministic", "response_layers", "inner_derivative"}
)
STATE_HOOKS = ("on_batch", "on_backward", "on_gradients", "on_step", "on_epoch")
"""Hooks of a Regularizer that a tuner must drive: without them the method would silently be another one."""


@dataclass
class StepInfo:
    """What one step of a tuner saw.

    Attributes:
        inner_loss, outer_loss: the two losses; None where the step did not evaluate one.
        values: constrained values by name, after the step; empty where they did not move.
        extra: what else the tuner measured.
    """

    inner_loss: float | None = None
    outer_loss: float | None = None
    values: dict[str, float | Tensor] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


class Tuner(ABC):
    """A method that learns hyperparameters; it owns the alternation of the two levels.

    Class attributes:
        requires: subset of `TUNER_REQUIREMENTS` that the problem must meet.
        drives: hooks of a Regularizer that this tuner runs; a method that overrides another one is refused.
        owns_epochs: whether the tuner runs the method's `on_epoch` itself, because it trains more than once; the loop
            then leaves that hook alone.

    Raises:
        ValueError: naming the part of the model, or the method, that does not meet a requirement.
    """

    requires: frozenset[str] = frozenset()
    drives: frozenset[str] = frozenset({"on_batch", "on_backward", "on_step", "on_epoch"})
    owns_epochs: bool = False

    def __init__(self, problem: BilevelProblem) -> None:
        check_tunable(problem, self.requires, type(self).__name__)
        check_drivable(problem, self.drives, type(self).__name__)
        self.problem = problem
        self.history: list[StepInfo] = []

    @abstractmethod
    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        """One step: takes as many batches from either iterator as it needs, and moves what it moves."""

    def extra_state(self) -> dict[str, Any]:
        """What an exact continuation needs beside parameters, hyperparameters, buffers and the method's state."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state`."""
        if state:
            raise ValueError(f"{type(self).__name__}: the state holds {sorted(state)}, which this tuner does not know")

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs: parameters, buffers, hyperparameters, method and optimizers."""
        problem = self.problem
        return {
            "params": {n: p.detach().clone() for n, p in problem.params.items()},
            "buffers": {n: b.clone() for n, b in problem.model.named_buffers()},
            "hypers": {n: h.raw.clone() for n, h in problem.hypers.items()},
            "objective": None if problem.objective is None else problem.objective.run_state(),
            "tuner": self.extra_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        problem = self.problem
        for name, value in state["params"].items():
            problem.params[name].copy_(value)
        buffers = dict(problem.model.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        for name, value in state["hypers"].items():
            problem.hypers[name].raw.copy_(value)
        if problem.objective is not None:
            problem.objective.load_run_state(state["objective"])
        self.load_extra_state(state["tuner"])

    def values(self) -> dict[str, Tensor]:
        """The current constrained values by name."""
        return {name: h().detach() for name, h in self.problem.hypers.items()}

    def recorded_values(self) -> dict[str, float | Tensor]:
        """The current values as a history keeps them: numbers, or copies of tensors on the CPU."""
        return {n: float(v) if v.ndim == 0 else v.cpu().clone() for n, v in self.values().items()}

    def export(self) -> nn.Module:
        """The trained network, plain."""
        return self.problem.model

    def checked_step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        """`step`, refusing losses that are not finite.

        Raises:
            DivergenceError: with the current values.
        """
        info = self.step(train, validation)
        for name, loss in (("inner", info.inner_loss), ("outer", info.outer_loss)):
            if loss is not None and not loss - loss == 0.0:
                raise DivergenceError(f"{type(self).__name__}: the {name} loss is {loss} at {_shown(self.values())}")
        return info

    def run(self, train: Iterable[Any], validation: Iterable[Any], steps: int) -> list[StepInfo]:
        """Take `steps` steps over endlessly repeated loaders; returns (and extends) the history.

        Raises:
            DivergenceError: if a loss is not finite, with the current values.
            ValueError: if steps < 1, or a loader yields no batch.
        """
        if steps < 1:
            raise ValueError(f"{type(self).__name__}.run: steps must be >= 1, got {steps}")
        batches = EndlessBatches(train, "train"), EndlessBatches(validation, "validation")
        clock = self.problem.clock
        clock.total = max(clock.total, clock.number + steps)
        for _ in range(steps):
            self.history.append(self.checked_step(*batches))
            clock.number += 1
        return self.history


def check_tunable(problem: BilevelProblem, requires: Iterable[str], owner: str) -> None:
    """Raise unless a problem meets a tuner's requirements.

    Raises:
        ValueError: naming owner, requirement and the offending module.
    """
    for need in sorted(requires):
        if need not in TUNER_REQUIREMENTS:
            raise ValueError(f"{owner}.requires: unknown {need!r}; allowed: {sorted(TUNER_REQUIREMENTS)}")
        found = _offence(problem, need)
        if found is not None:
            raise ValueError(f"{owner} requires {need!r}, but {found}")


def check_drivable(problem: BilevelProblem, drives: Iterable[str], owner: str) -> None:
    """Raise if the problem's method acts in a hook that a tuner does not run.

    Raises:
        ValueError: naming owner, method and hook.
    """
    if problem.regularizer is None:
        return
    for method in leaves([problem.regularizer]):
        for hook in STATE_HOOKS:
            if hook in method.acts_in and hook not in drives:
                raise ValueError(
                    f"{owner} cannot train under {type(method).__name__}, which acts in {hook!r}; {owner} drives "
                    f"{['loss', 'penalty', *sorted(drives)]}. wellposed.tuning.SelfTuner drives all hooks"
                )


def _offence(problem: BilevelProblem, need: str) -> str | None:
    if need == "strongly_convex" and not (problem.strong_convexity or 0) > 0:
        return "the problem states no strong_convexity > 0"
    if need == "inner_derivative":
        for name, h in problem.hypers.items():
            if h.discrete:
                return f"the hyperparameter {name!r} is discrete, so that the training loss has no derivative in it"
    for name, module in problem.model.named_modules():
        kind = type(module).__name__
        if need == "deterministic" and module.training and getattr(module, "p", 0) and "Dropout" in kind:
            return f"the module {name!r} ({kind}) draws random numbers in training mode"
        if need == "deterministic" and module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"the module {name!r} ({kind}) changes its running statistics in training mode; call model.eval()"
        if need == "double_backward" and isinstance(module, nn.RNNBase):
            if torch.backends.cudnn.enabled and any(p.is_cuda for p in module.parameters()):
                return (
                    f"the module {name!r} ({kind}) runs on cuDNN, which has no second derivative; train it inside "
                    "torch.backends.cudnn.flags(enabled=False)"
                )
    if need == "response_layers" and not any(hasattr(m, "response") for m in problem.model.modules()):
        return "the model has no response layer; convert it first"
    return None


def _shown(values: dict[str, Tensor]) -> dict[str, Any]:
    """Values for a message: numbers, and the range of what is long."""
    return {
        n: v.tolist() if v.numel() <= 16 else f"{v.numel()} values in [{float(v.min()):.4g}, {float(v.max()):.4g}]"
        for n, v in values.items()
    }
