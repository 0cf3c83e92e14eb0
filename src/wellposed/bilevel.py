"""The bilevel interface: a problem with counted oracles, and the protocol of tuners that learn hyperparameters.

    min over u of  L_outer(w*(u), u)   with   w*(u) = argmin over w of L_inner(w, u)

w are the network's parameters, u the unconstrained values of the hyperparameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .batching import as_batch, batch_size, call_model, unwrap
from .hyperparameter import Hyperparameter, named_hyperparameters, substituted
from .objective import Criterion, objective
from .regularizer import Regularizer
from .step import Step, collect_records

Values = dict[str, Tensor]
Loss = Callable[[Values, Values, Any], Tensor]
"""`loss(params, hypers, batch) -> scalar`; `hypers` are constrained values by name."""

TUNER_REQUIREMENTS = frozenset({"double_backward", "strongly_convex", "deterministic", "response_layers"})
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
    differentiable in them, with the chain rule through the chart included.

    Args:
        model: the network; its parameters are updated in place by tuners.
        inner_loss: training loss, penalties included.
        outer_loss: validation loss, without penalties.
        params: tensors to train by name; the model's trainable parameters by default.
        hypers: hyperparameters by name.
        strong_convexity: lower bound of the inner Hessian's eigenvalues, where one is known.

    Attributes:
        counts: how often each oracle was called.
        fallback: why Hessian products are finite differences, or None while they are exact.

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
        model: nn.Module,
        inner_loss: Loss,
        outer_loss: Loss,
        params: Mapping[str, Tensor] | None = None,
        hypers: Mapping[str, Hyperparameter] | None = None,
        strong_convexity: float | None = None,
    ) -> None:
        self.model = model
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        trainable = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
        self.params: Values = dict(trainable if params is None else params)
        self.hypers = dict(named_hyperparameters(model) if hypers is None else hypers)
        self.strong_convexity = strong_convexity
        self.counts = Counts()
        self.fallback: str | None = None
        self._write: Callable[[], None] = lambda: None
        self._looked = False
        if not self.params:
            raise ValueError("BilevelProblem: params is empty; the model has no parameter that trains")
        if not self.hypers:
            raise ValueError("BilevelProblem: hypers is empty; give a strength as a Hyperparameter")
        raws = {id(h.raw): name for name, h in self.hypers.items()}
        for name, tensor in self.params.items():
            if id(tensor) in raws:
                raise ValueError(f"BilevelProblem: {name!r} is a parameter and the hyperparameter {raws[id(tensor)]!r}")

    @classmethod
    def from_regularizer(
        cls, model: nn.Module, regularizer: Regularizer, criterion: Criterion, **options: Any
    ) -> BilevelProblem:
        """The problem of training `model` under `regularizer`: inner with its `loss` and `penalty`, outer plain.

        Only the pure hooks are called; a tuner's loop calls `on_backward` where a method keeps a table.
        """
        whole = _Objective(model, regularizer, criterion)

        def inner(params: Values, hypers: Values, batch: Any) -> Tensor:
            return functional_call(whole, _prefixed(params), (batch, True))  # type: ignore[no-any-return]

        def outer(params: Values, hypers: Values, batch: Any) -> Tensor:
            return functional_call(whole, _prefixed(params), (batch, False))  # type: ignore[no-any-return]

        problem = cls(model, inner, outer, hypers=named_hyperparameters(regularizer), **options)
        problem._write = whole.write_state
        return problem

    def write_state(self) -> None:
        """Let the methods write their per-example state (`on_backward`) from the last inner evaluation.

        A tuner calls it once for each training step; the oracles never do, so that they stay pure.
        """
        self._write()

    def raw(self) -> Values:
        """The unconstrained values, as leaves that require a gradient."""
        return {name: h.raw.detach().clone().requires_grad_() for name, h in self.hypers.items()}

    def evaluate(self, loss: Loss, params: Values, raw: Values, batch: Any) -> Tensor:
        """A loss at given parameters and unconstrained values, differentiable in both."""
        with substituted({h: raw[name] for name, h in self.hypers.items()}):
            values = {name: h() for name, h in self.hypers.items()}
            return loss(params, values, batch)

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def inner_value_and_grad(self, batch: Any) -> tuple[Tensor, Values]:
        """Inner loss and its gradient in the parameters."""
        self.counts.inner_grad += 1
        value = self.evaluate(self.inner_loss, self.params, self.raw(), batch)
        return value.detach(), _grad(value, self.params)

    def inner_grad(self, batch: Any) -> Values:
        """Gradient of the inner loss in the parameters."""
        return self.inner_value_and_grad(batch)[1]

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def hvp(self, vector: Values, batch: Any) -> Values:
        """Inner Hessian in the parameters, times `vector`; central differences where autograd cannot (see `fallback`)."""
        self.counts.hvp += 1
        if self.fallback is None:
            found = self._second_derivative(vector, batch, self.params)
            if found is not None:
                return found
        step = 1e-3 / (1e-12 + float(torch.stack([v.norm() for v in vector.values()]).norm()))
        raw = self.raw()
        gradients = []
        for sign in (1.0, -1.0):
            moved = {n: (p + sign * step * vector[n]).detach().requires_grad_() for n, p in self.params.items()}
            gradients.append(_grad(self.evaluate(self.inner_loss, moved, raw, batch), moved))
        return {n: (gradients[0][n] - gradients[1][n]) / (2 * step) for n in self.params}

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def mixed_vjp(self, vector: Values, batch: Any) -> Values:
        """`vector` times the mixed second derivative of the inner loss: one tensor for each hyperparameter."""
        self.counts.mixed_vjp += 1
        raw = self.raw()
        if self.fallback is None:
            found = self._second_derivative(vector, batch, raw, raw)
            if found is not None:
                return found
        step = 1e-3 / (1e-12 + float(torch.stack([v.norm() for v in vector.values()]).norm()))
        slopes = []
        for sign in (1.0, -1.0):
            moved = {n: (p + sign * step * vector[n]).detach() for n, p in self.params.items()}
            slopes.append(_grad(self.evaluate(self.inner_loss, moved, raw, batch), raw))
        return {n: (slopes[0][n] - slopes[1][n]) / (2 * step) for n in raw}

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

    def _second_derivative(self, vector: Values, batch: Any, of: Values, raw: Values | None = None) -> Values | None:
        try:
            value = self.evaluate(self.inner_loss, self.params, raw or self.raw(), batch)
            first = torch.autograd.grad(value, list(self.params.values()), create_graph=True, allow_unused=True)
            self._refuse_once_differentiable(first)
            pairs = [(g * vector[n]).sum() for n, g in zip(self.params, first, strict=True) if g is not None]
            return _grad(torch.stack(pairs).sum(), of)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_DOUBLE_BACKWARD):
                raise
            self.fallback = f"finite differences, because {str(error).splitlines()[0]}"
            return None

    def _refuse_once_differentiable(self, gradients: Iterable[Tensor | None]) -> None:
        """Raise where part of the graph cannot be differentiated twice.

        A function marked `once_differentiable` leaves an error node that is not connected to the parameters: autograd
        walks past it, and the second derivative would silently be zero. Looked for once a problem.
        """
        if self._looked:
            return
        self._looked = True
        waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if "Error" in node.name():
                raise RuntimeError("a function of the model is marked once_differentiable")
            waiting.extend(following for following, _ in node.next_functions if following is not None)


class _Objective(nn.Module):
    """Model and loss as one module, so that `functional_call` swaps the parameters for both."""

    def __init__(self, model: nn.Module, regularizer: Regularizer, criterion: Criterion) -> None:
        super().__init__()
        self.model = model
        # In a list, so that the regularizer's own parameters and buffers are not swapped.
        self._rest = [regularizer, criterion]
        self._last: Step | None = None

    @torch.no_grad()
    def write_state(self) -> None:
        if self._last is None:
            raise RuntimeError("BilevelProblem.write_state: no inner evaluation was made yet")
        self._rest[0].on_backward(self._last)  # type: ignore[attr-defined]
        self._last = None

    def forward(self, sample: Any, inner: bool) -> Tensor:
        regularizer, criterion = self._rest
        batch = as_batch(sample)
        step = Step(self.model, None, batch.inputs, batch.targets, batch.index, batch.weights, dict(batch.extra))
        with collect_records() as records:
            step.outputs = call_model(self.model, step.inputs)
        step.records = records
        valid = step.valid
        step.num_examples = batch_size(batch)
        step.normalizer = float(step.num_examples if valid is None else max(1, int(valid.sum())))
        if inner:
            self._last = step
        return objective(step, regularizer if inner else Regularizer(), criterion)  # type: ignore[arg-type]


def _prefixed(values: Values, prefix: str = "model.") -> Values:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _grad(value: Tensor, of: Values) -> Values:
    """Gradients by name; zero where the value does not depend on a tensor."""
    if not value.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in of.items()}
    found = torch.autograd.grad(value, list(of.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(of.items(), found, strict=True)}


@dataclass
class StepInfo:
    """What one step of a tuner saw; either loss may be None where the step did not evaluate it."""

    inner_loss: float | None = None
    outer_loss: float | None = None
    values: dict[str, float] = field(default_factory=dict)


class Tuner(ABC):
    """A method that learns hyperparameters; it owns the alternation of the two levels.

    Subclasses say what they require of the problem (`requires`, a subset of `TUNER_REQUIREMENTS`), and do one step.

    Raises:
        ValueError: naming the part of the model that does not meet a requirement.
    """

    requires: frozenset[str] = frozenset()

    def __init__(self, problem: BilevelProblem) -> None:
        check_tunable(problem, self.requires, type(self).__name__)
        self.problem = problem
        self.history: list[StepInfo] = []

    @abstractmethod
    def step(self, train_batch: Any, validation_batch: Any) -> StepInfo:
        """Update parameters and hyperparameters once."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs beside the model."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""

    def values(self) -> dict[str, Tensor]:
        """The current constrained values by name."""
        return {name: h().detach() for name, h in self.problem.hypers.items()}

    def run(self, train: Iterable[Any], validation: Iterable[Any], steps: int) -> list[StepInfo]:
        """Take `steps` steps over endlessly repeated loaders; returns (and extends) the history.

        Raises:
            ArithmeticError: if a loss is not finite, with the current values.
        """
        train_batches, validation_batches = _endless(train), _endless(validation)
        for _ in range(steps):
            info = self.step(next(train_batches), next(validation_batches))
            for name, loss in (("inner", info.inner_loss), ("outer", info.outer_loss)):
                if loss is not None and not loss - loss == 0.0:
                    raise ArithmeticError(f"{type(self).__name__}: the {name} loss is {loss} at {self.values()}")
            self.history.append(info)
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


def _offence(problem: BilevelProblem, need: str) -> str | None:
    if need == "strongly_convex" and not (problem.strong_convexity or 0) > 0:
        return "the problem states no strong_convexity > 0"
    for name, module in problem.model.named_modules():
        kind = type(module).__name__
        if need == "deterministic" and module.training and getattr(module, "p", 0) and "Dropout" in kind:
            return f"the module {name!r} ({kind}) draws random numbers in training mode"
        if need == "double_backward" and isinstance(module, nn.RNNBase):
            if any(p.is_cuda for p in module.parameters()):
                return f"the module {name!r} ({kind}) runs on cuDNN, which has no second derivative"
    if need == "response_layers" and not any(hasattr(m, "response") for m in problem.model.modules()):
        return "the model has no response layer; convert it first"
    return None


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    epoch = 0
    while True:
        if callable(choose := getattr(loader, "set_epoch", None)):
            choose(epoch)
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("Tuner.run: a loader yielded no batch")
        epoch += 1
