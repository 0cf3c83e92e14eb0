"""The bilevel problem: two losses over the same parameters, and the counted oracles that bilevel methods need.

    min over u of  L_outer(w*(u), u)   with   w*(u) = argmin over w of L_inner(w, u)

w are the network's parameters, u the unconstrained values of the hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .hyperparameter import Hyperparameter, named_hyperparameters, substituted
from .numerics.tree import global_norm
from .objective import Criterion
from .regularizer import Regularizer
from .step import copied_buffers
from .training_objective import Clock, TrainingObjective, bare

Values = dict[str, Tensor]
Loss = Callable[[Values, Values, Any], Tensor]
"""`loss(params, hypers, batch) -> scalar`; `hypers` are constrained values by name."""

_NO_DOUBLE_BACKWARD = ("not implemented", "once_differentiable", "double backward", "does not support")


@dataclass
class Counts:
    """How often each oracle was called."""

    inner_grad: int = 0
    hvp: int = 0
    mixed_vjp: int = 0
    outer_grads: int = 0


class BilevelProblem:
    """Two losses over the same parameters, and the derivatives that bilevel methods need.

    The losses run with the hyperparameters substituted, so that a Regularizer which reads them (`h()`) is
    differentiable in them, with the chain rule through the chart included. Only `inner_value_and_grad` is a training
    evaluation: the others leave buffers (running statistics) as they are.

    Args:
        model: the network; its parameters are updated in place by tuners. None for a problem of plain tensors.
        inner_loss: training loss, penalties included.
        outer_loss: validation loss, without penalties.
        params: tensors to train by name; the model's trainable parameters by default.
        hypers: hyperparameters by name; those of the model with `tune=True` by default.
        strong_convexity: lower bound of the inner Hessian's eigenvalues, where one is known.
        derivatives: second derivatives by a second backward pass ("exact"), or by central differences of two plain
            gradients ("differences"): the price of two training steps and their memory, to about four digits.

    Attributes:
        counts: how often each oracle was called.
        fallback: why Hessian products are finite differences, or None while they are exact.
        objective: the method's side of the training loss, or None for a problem of plain losses.

    Raises:
        ValueError: without parameters or hyperparameters, or if a hyperparameter is among the parameters.

    Example:
        >>> model, h = nn.Linear(1, 1, bias=False), Hyperparameter(1.0)
        >>> inner = lambda w, v, b: (w["weight"] - 1).square().sum() + v["h"] * w["weight"].square().sum()
        >>> outer = lambda w, v, b: (w["weight"] - 0.25).square().sum()
        >>> problem = BilevelProblem(model, inner, outer, hypers={"h": h})
        >>> problem.hvp({"weight": torch.ones(1, 1)}, None)["weight"]
        tensor([[4.]])
    """

    def __init__(
        self,
        model: nn.Module | None,
        inner_loss: Loss,
        outer_loss: Loss,
        params: Mapping[str, Tensor] | None = None,
        hypers: Mapping[str, Hyperparameter] | None = None,
        strong_convexity: float | None = None,
        derivatives: Literal["exact", "differences"] = "exact",
    ) -> None:
        self.model = nn.Module() if model is None else model
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        self.params: Values = dict(bare(self.model) if params is None else params)
        self.hypers = dict(named_hyperparameters(self.model) if hypers is None else hypers)
        self.strong_convexity = strong_convexity
        self.counts = Counts()
        if derivatives not in ("exact", "differences"):
            raise ValueError(f"BilevelProblem: derivatives must be 'exact' or 'differences', got {derivatives!r}")
        self.fallback: str | None = None if derivatives == "exact" else "finite differences, as asked for"
        self.objective: TrainingObjective | None = None
        self._looked = False
        if not self.params:
            raise ValueError("BilevelProblem: params is empty; the model has no parameter that trains")
        if not self.hypers:
            raise ValueError("BilevelProblem: hypers is empty; give a strength as a Hyperparameter")
        raws = {id(h.raw): name for name, h in self.hypers.items()}
        for name, tensor in self.params.items():
            if id(tensor) in raws:
                raise ValueError(f"BilevelProblem: {name!r} is a parameter and the hyperparameter {raws[id(tensor)]!r}")
            if not tensor.is_floating_point():
                raise ValueError(f"BilevelProblem: the parameter {name!r} must be floating, got {tensor.dtype}")

    @classmethod
    def from_regularizer(
        cls, model: nn.Module, regularizer: Regularizer, criterion: Criterion, seed: int = 0, **options: Any
    ) -> BilevelProblem:
        """The problem of training `model` under `regularizer`.

        Inner: its `on_batch`, `loss` and `penalty`, in training mode. Outer: the plain task loss, in evaluation mode.
        Hooks that write state run when the tuner says so (`write_state`, `on_step`, ...).

        Args:
            model: the network, as the method's `attach` returned it.
            regularizer: the method; its hyperparameters with `tune=True` are learned, and those of the model.
            criterion: unreduced task loss.
            seed: of the method's random numbers.
            options: further arguments of `BilevelProblem`.
        """
        objective = TrainingObjective(model, regularizer, criterion, seed)
        found = {**named_hyperparameters(model), **named_hyperparameters(regularizer)}
        hypers = {id(h): (name, h) for name, h in found.items()}  # a dropout rate is held by both, and is one

        def loss_of(training: bool) -> Loss:
            def loss(params: Values, _: Values, batch: Any) -> Tensor:
                if params is problem.params:  # they are the model's own: nothing to swap
                    return objective(batch, training)  # type: ignore[no-any-return]
                return functional_call(objective, _prefixed(params), (batch, training))  # type: ignore[no-any-return]

            return loss

        problem = cls(model, loss_of(True), loss_of(False), hypers=dict(hypers.values()), **options)
        problem.objective = objective
        return problem

    @property
    def regularizer(self) -> Regularizer | None:
        """The method under which the model trains, or None for a problem of plain losses."""
        return None if self.objective is None else self.objective.regularizer

    @property
    def clock(self) -> Clock:
        """The loop's position, as the method's hooks see it."""
        return Clock() if self.objective is None else self.objective.clock

    def begin(self) -> None:
        """New random numbers for the method; the oracles do this by themselves, `evaluate` does not."""
        if self.objective is not None:
            self.objective.begin()

    def write_state(self) -> None:
        """Let the method write its per-example state (`on_backward`) from the last training evaluation.

        A tuner calls it once for each training step; the oracles never do, so that they stay pure.
        """
        if self.objective is not None:
            self.objective.write_state()

    def on_gradients(self, evaluate: Callable[[], Tensor]) -> None:
        """Run the method's `on_gradients`; see `TrainingObjective.on_gradients`."""
        if self.objective is not None:
            self.objective.on_gradients(evaluate)

    def on_step(self) -> None:
        """Run the method's `on_step`, after the parameters moved."""
        if self.objective is not None:
            self.objective.on_step()

    def raw(self) -> Values:
        """The unconstrained values, as leaves that require a gradient."""
        return {name: h.raw.detach().clone().requires_grad_() for name, h in self.hypers.items()}

    def evaluate(self, loss: Loss, params: Values, raw: Values, batch: Any) -> Tensor:
        """A loss at given parameters and unconstrained values, differentiable in both."""
        with substituted({h: raw[name] for name, h in self.hypers.items()}):
            # A method reads its hyperparameters itself; only plain losses get their values as an argument.
            values = {} if self.objective is not None else {name: h() for name, h in self.hypers.items()}
            return loss(params, values, batch)

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def inner_value_and_grad(self, batch: Any) -> tuple[Tensor, Values]:
        """Inner loss and its gradient in the parameters: a training evaluation."""
        self.counts.inner_grad += 1
        self.begin()
        fixed = {name: h.raw.detach() for name, h in self.hypers.items()}
        value = self.evaluate(self.inner_loss, self.params, fixed, batch)
        return value.detach(), _grad(value, self.params)

    def inner_grad(self, batch: Any) -> Values:
        """Gradient of the inner loss in the parameters."""
        return self.inner_value_and_grad(batch)[1]

    def hvp(self, vector: Values, batch: Any) -> Values:
        """Inner Hessian in the parameters, times `vector`; central differences where autograd cannot (see `fallback`)."""
        self.counts.hvp += 1
        return self._second_derivatives(vector, batch, True, False)[0]

    def mixed_vjp(self, vector: Values, batch: Any) -> Values:
        """`vector` times the mixed second derivative of the inner loss: one tensor for each hyperparameter."""
        self.counts.mixed_vjp += 1
        return self._second_derivatives(vector, batch, False, True)[1]

    def second_derivatives(self, vector: Values, batch: Any) -> tuple[Values, Values]:
        """`hvp` and `mixed_vjp` of one batch from ONE graph: both are a gradient of <inner gradient, vector>.

        Example:
            >>> model, h = nn.Linear(1, 1, bias=False), Hyperparameter(1.0, chart="exp")
            >>> loss = lambda w, v, b: v["h"] * w["weight"].square().sum()
            >>> problem = BilevelProblem(model, loss, loss, hypers={"h": h})
            >>> hvp, mixed = problem.second_derivatives({"weight": torch.ones(1, 1)}, None)
            >>> hvp["weight"].item(), bool(mixed["h"] == 2 * model.weight)
            (2.0, True)
        """
        self.counts.hvp += 1
        self.counts.mixed_vjp += 1
        return self._second_derivatives(vector, batch, True, True)

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def outer_grads(self, batch: Any) -> tuple[Tensor, Values, Values]:
        """Outer loss, its gradient in the parameters, and its direct gradient in the unconstrained values."""
        self.counts.outer_grads += 1
        raw = self.raw()
        value = self.evaluate(self.outer_loss, self.params, raw, batch)
        both = _grad(value, {**_prefixed(self.params, "w."), **_prefixed(raw, "u.")})
        return (
            value.detach(),
            {n: both[f"w.{n}"] for n in self.params},
            {n: both[f"u.{n}"] for n in raw},
        )

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def _second_derivatives(self, vector: Values, batch: Any, hessian: bool, mixed: bool) -> tuple[Values, Values]:
        self.begin()
        raw = self.raw()
        wanted = {**(_prefixed(self.params, "w.") if hessian else {}), **(_prefixed(raw, "u.") if mixed else {})}
        with self._kept_buffers():
            found = None if self.fallback is not None else self._exact(vector, batch, raw, wanted)
            if found is None:
                found = self._differences(vector, batch, raw, wanted)
        return (
            {n: found[f"w.{n}"] for n in self.params} if hessian else {},
            {n: found[f"u.{n}"] for n in raw} if mixed else {},
        )

    def _exact(self, vector: Values, batch: Any, raw: Values, wanted: Values) -> Values | None:
        try:
            value = self.evaluate(self.inner_loss, self.params, raw, batch)
            self._check_reach(value, raw)
            first = torch.autograd.grad(value, list(self.params.values()), create_graph=True, allow_unused=True)
            self._refuse_once_differentiable(first)
            pairs = [
                (g, vector[n]) for n, g in zip(self.params, first, strict=True) if g is not None and g.requires_grad
            ]
            if not pairs:
                return {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
            # The vectors as cotangents: the product <gradient, vector> itself is never formed.
            found = torch.autograd.grad(
                [g for g, _ in pairs], list(wanted.values()), [v.to(g.dtype) for g, v in pairs], allow_unused=True
            )
            return _filled(wanted, found)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_DOUBLE_BACKWARD):
                raise
            self.fallback = f"finite differences, because {str(error).splitlines()[0]}"
            return None

    def _differences(self, vector: Values, batch: Any, raw: Values, wanted: Values) -> Values:
        """Central differences of the first derivatives along the vector, under the same random numbers."""
        step = 1e-3 / (1e-12 + float(global_norm(vector.values())))
        start = torch.get_rng_state()
        slopes = []
        for sign in (1.0, -1.0):
            torch.set_rng_state(start)
            moved = {n: (p + sign * step * vector[n]).detach().requires_grad_() for n, p in self.params.items()}
            value = self.evaluate(self.inner_loss, moved, raw, batch)
            self._check_reach(value, raw)
            of = {**_prefixed(moved, "w."), **_prefixed(raw, "u.")}
            slopes.append(_grad(value, {name: of[name] for name in wanted}))
        return {n: (slopes[0][n] - slopes[1][n]) / (2 * step) for n in wanted}

    def _check_reach(self, value: Tensor, raw: Values) -> None:
        """Refuse, once, hyperparameters in which the training loss has no derivative: their gradient would be 0 for ever.

        Raises:
            ValueError: naming them.
        """
        if self._looked:
            return
        if any("CheckpointFunction" in node.name() for node in _nodes([value])):
            raise ValueError(
                "the model uses re-entrant activation checkpointing, whose parameters get no gradient outside of "
                "backward(): use checkpoint(..., use_reentrant=False)"
            )
        found: tuple[Tensor | None, ...] = (None,) * len(raw)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(raw.values()), retain_graph=True, allow_unused=True)
        unreached = [n for n, g in zip(raw, found, strict=True) if g is None or self.hypers[n].discrete]
        if unreached:
            raise ValueError(
                f"the inner loss has no derivative in the hyperparameter {unreached[0]!r} (a rate that is only drawn "
                "with, a floored count, or a value that the loss does not read): no implicit or unrolled gradient can "
                "learn it; wellposed.tuning.SelfTuner can, or give it tune=False"
            )

    def _refuse_once_differentiable(self, gradients: Iterable[Tensor | None]) -> None:
        """Raise where part of the graph cannot be differentiated twice.

        A function marked `once_differentiable` leaves an error node that is not connected to the parameters: autograd
        walks past it, and the second derivative would silently be zero. Looked for once a problem.
        """
        if self._looked:
            return
        self._looked = True
        if any("Error" in node.name() for node in _nodes(gradients)):
            raise RuntimeError("a function of the model is marked once_differentiable")

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """Inside the block nothing is a training evaluation: buffers stay, and the method's last step is kept."""
        if self.objective is None:
            yield
            return
        last = self.objective.last
        try:
            with copied_buffers(self.model):
                yield
        finally:
            self.objective.last = last


def _nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """The nodes of the graph behind tensors, each once."""
    waiting: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions if following is not None)


def _prefixed(values: Values, prefix: str = "model.") -> Values:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _grad(value: Tensor, of: Values) -> Values:
    """Gradients by name; zero where the value does not depend on a tensor."""
    if not value.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    return _filled(of, torch.autograd.grad(value, list(of.values()), allow_unused=True))


def _filled(of: Values, found: Iterable[Tensor | None]) -> Values:
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(of.items(), found, strict=True)}
