"""The oracles of a bilevel problem as lists of tensors, averaged over micro-batches and over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from .bilevel_updates import averaged_over_ranks


class Oracles:
    """What a single-loop method asks of a problem; lists in the order of `problem.params` and `problem.hypers`.

    Args:
        problem: both losses.
        accumulate: batches over which each answer is averaged.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> loss = lambda w, v, batch: batch * v["h"] * w["weight"].square().sum()
        >>> problem = BilevelProblem(model, loss, loss, hypers={"h": Hyperparameter(1.0)})
        >>> Oracles(problem, accumulate=2).hvp([torch.ones(1, 1)], iter([1.0, 3.0]))
        [tensor([[4.]])]
    """

    def __init__(self, problem: BilevelProblem, accumulate: int = 1) -> None:
        self.problem, self.accumulate = problem, accumulate

    def inner(self, batches: Iterator[Any]) -> tuple[Tensor, list[Tensor]]:
        """Training loss and its gradient in the parameters; the method writes its state."""

        def oracle(batch: Any) -> list[Tensor]:
            value, gradients = self.problem.inner_value_and_grad(batch)
            self.problem.write_state()
            return [value, *gradients.values()]

        value, *gradients = self._averaged(oracle, batches)
        return value, gradients

    def outer(self, batches: Iterator[Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Validation loss, its gradient in the parameters, and the direct one in the unconstrained values."""

        def oracle(batch: Any) -> list[Tensor]:
            value, by_params, by_raw = self.problem.outer_grads(batch)
            return [value, *by_params.values(), *by_raw.values()]

        value, *gradients = self._averaged(oracle, batches)
        count = len(self.problem.params)
        return value, gradients[:count], gradients[count:]

    def hvp(self, vector: list[Tensor], batches: Iterator[Any]) -> list[Tensor]:
        """Hessian of the training loss, times `vector`."""
        named = self._named(vector)
        return self._averaged(lambda batch: list(self.problem.hvp(named, batch).values()), batches)

    def mixed(self, vector: list[Tensor], batches: Iterator[Any]) -> list[Tensor]:
        """`vector` times the mixed second derivative of the training loss."""
        named = self._named(vector)
        return self._averaged(lambda batch: list(self.problem.mixed_vjp(named, batch).values()), batches)

    def both(self, vector: list[Tensor], batches: Iterator[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """`hvp` and `mixed` on one batch, from one graph."""
        named = self._named(vector)

        def oracle(batch: Any) -> list[Tensor]:
            hvp, mixed = self.problem.second_derivatives(named, batch)
            return [*hvp.values(), *mixed.values()]

        found = self._averaged(oracle, batches)
        count = len(self.problem.params)
        return found[:count], found[count:]

    def _named(self, vector: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.problem.params, vector, strict=True))

    def _averaged(self, oracle: Callable[[Any], list[Tensor]], batches: Iterator[Any]) -> list[Tensor]:
        total = oracle(next(batches))
        for _ in range(self.accumulate - 1):
            total = list(torch._foreach_add(total, oracle(next(batches))))
        if self.accumulate > 1:
            torch._foreach_div_(total, float(self.accumulate))
        return averaged_over_ranks(total)


def check_positive(owner: str, name: str, value: float | Tensor | None) -> None:
    """Raise unless a step size, threshold or radius is > 0 and finite; None passes.

    Raises:
        ValueError: naming owner, argument and value.

    Example:
        >>> check_positive("BOREP", "z_lr", 0.0)
        Traceback (most recent call last):
        ValueError: BOREP: z_lr must be > 0 and finite, got 0.0
    """
    if value is None:
        return
    tensor = torch.as_tensor(value)
    if not bool(((tensor > 0) & torch.isfinite(tensor)).all()):
        raise ValueError(f"{owner}: {name} must be > 0 and finite, got {value}")


def check_disjoint(problem: BilevelProblem, owner: str) -> None:
    """Raise if a parameter shares its memory with a hyperparameter: both levels would move it.

    Raises:
        ValueError: naming both.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, b: (v["h"] * w["w"]).sum()
        >>> problem = BilevelProblem(None, loss, loss, {"w": torch.ones(1)}, {"h": Hyperparameter(1.0)})
        >>> check_disjoint(problem, "BOREP")
    """
    upper = {h.raw.untyped_storage().data_ptr(): name for name, h in problem.hypers.items() if h.raw.numel()}
    for name, tensor in problem.params.items():
        other = upper.get(tensor.untyped_storage().data_ptr())
        if other is not None:
            raise ValueError(
                f"{owner}: the parameter {name!r} is the hyperparameter {other!r} as well; leave it out of params"
            )
