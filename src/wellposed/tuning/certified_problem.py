"""A bilevel problem with the structure that error bounds need: from its two levels, or from a problem and its moduli."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import as_batch
from ..bilevel import BilevelProblem
from ..numerics.eigenvalues import lanczos
from .constants import Constant, Estimated, Rule
from .lower_level import LowerLevel, UpperLoss, Values

LANCZOS_STEPS = 12
SAME_HYPERS = 0.05
"""Change of an unconstrained hyperparameter that an estimate of L outlives: 5 % of a weight, within its safety."""


class CertifiedProblem(BilevelProblem):
    """A `LowerLevel` and an `UpperLoss` as the problem that tuners take.

    Args:
        lower: the inner problem.
        upper: the upper loss.

    Example:
        >>> from wellposed import Hyperparameter
        >>> y = torch.ones(2, dtype=torch.float64)
        >>> lower = LowerLevel(lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(),
        ...                    0 * y, {"weight": Hyperparameter(1.0, chart="exp")},
        ...                    mu=lambda v: 1 + v["weight"], L=lambda v: 1 + v["weight"], quadratic=True)
        >>> problem = CertifiedProblem(lower, UpperLoss(lambda x: 0.5 * (x - 0.8).square().sum(), L_g=1.0, convex=True))
        >>> list(problem.params), list(problem.hypers)
        (['x'], ['weight'])
    """

    def __init__(self, lower: LowerLevel, upper: UpperLoss) -> None:
        if not isinstance(lower, LowerLevel) or not isinstance(upper, UpperLoss):
            raise TypeError(
                "CertifiedProblem: takes a LowerLevel and an UpperLoss, got "
                f"{type(lower).__name__} and {type(upper).__name__}"
            )
        x = lower.x0.clone() if lower.per_sample else lower.x0[0].clone()
        start = torch.as_tensor(lower.mu.lower(lower.values(lower.u0)))
        super().__init__(
            None,
            lambda params, hypers, batch: lower.objective(params["x"], hypers).mean(),
            lambda params, hypers, batch: _upper_value(upper, params["x"], hypers),
            params={"x": x},
            hypers=lower.hypers,
            strong_convexity=float(start.min()),
        )
        self.lower, self.upper = lower, upper


def _upper_value(upper: UpperLoss, x: Tensor, hypers: Values) -> Tensor:
    value = upper.value(x).mean()
    return value if upper.penalty is None else value + upper.penalty(hypers)


class _Carried(dict[str, Tensor]):
    """Constrained values that also carry the unconstrained ones, which `BilevelProblem.evaluate` takes."""

    raw: Values


class FlatLower(LowerLevel):
    """The inner problem of a `BilevelProblem` on one batch: all parameters as one vector.

    Args:
        problem: the problem; its method may have no state and no random numbers.
        batch: ALL training data.
        mu, L: moduli, as of `LowerLevel`; L is estimated by Lanczos steps where it is None.
    """

    def __init__(self, problem: BilevelProblem, batch: Any, mu: Constant | Rule, L: Constant | Rule | None) -> None:
        self.problem, self.batch = problem, batch
        self._shapes = {n: p.shape for n, p in problem.params.items()}
        x0 = torch.cat([p.detach().reshape(-1) for p in problem.params.values()])
        self.at = x0[None]
        self.products = 0  # Hessian products that estimates of L took
        self._estimate: tuple[Tensor, float] | None = None
        super().__init__(
            self._evaluate, x0, problem.hypers, mu, Estimated(self._largest, safety=1.2) if L is None else L
        )

    def values(self, u: Tensor) -> Values:
        found = _Carried(super().values(u))
        found.raw = self.raw(u)
        return found

    def params(self, x: Tensor) -> Values:
        """A flat vector cut into the parameters."""
        parts = torch.split(x, [shape.numel() for shape in self._shapes.values()])
        return {n: part.view(shape) for (n, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _evaluate(self, x: Tensor, values: Values) -> Tensor:
        assert isinstance(values, _Carried)
        return self.problem.evaluate(self.problem.inner_loss, self.params(x), values.raw, self.batch)

    def _largest(self, values: Values) -> float:
        """Largest curvature at the point that the tuner has reached; kept while the hyperparameters hardly move."""
        u = torch.cat([v.detach().reshape(-1) for v in values.raw.values()])  # type: ignore[attr-defined]
        if self._estimate is not None and float((u - self._estimate[0]).abs().max()) <= SAME_HYPERS:
            return self._estimate[1]
        frozen = _Carried({n: v.detach() for n, v in values.items()})
        frozen.raw = {n: v.detach() for n, v in values.raw.items()}  # type: ignore[attr-defined]
        self.products += min(LANCZOS_STEPS, self.at.numel())
        found = largest_curvature(lambda x: self._evaluate(x, frozen), self.at[0])
        self._estimate = (u, found)
        return found


class FlatUpper(UpperLoss):
    """The outer loss of a `BilevelProblem` on one batch, of the same vector; may read the hyperparameters itself."""

    def __init__(self, lower: FlatLower, batch: Any, L_g: Constant | Rule | None, convex: bool = False) -> None:
        self.lower, self.batch = lower, batch
        if L_g is None:
            u = lower.u0
            L_g = Estimated(largest_curvature(lambda x: self._evaluate(x, u), lower.x0[0]), safety=1.5)
        super().__init__(lambda x: self._evaluate(x, lower.u0), L_g, convex)

    def _evaluate(self, x: Tensor, u: Tensor) -> Tensor:
        problem = self.lower.problem
        return problem.evaluate(problem.outer_loss, self.lower.params(x), self.lower.raw(u), self.batch)

    def value_and_gradient(self, x: Tensor, per_sample: bool, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert u is not None
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self._evaluate(leaf[0], u)
            slope = torch.autograd.grad(value, leaf)[0]
        return value.detach().reshape(1), slope

    def direct(self, lower: LowerLevel, x: Tensor, u: Tensor) -> tuple[float, Tensor | None]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = self._evaluate(x[0], leaf)
            if not value.requires_grad:
                return 0.0, None
            return 0.0, torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)[0]


def largest_curvature(function: Callable[[Tensor], Tensor], x: Tensor, steps: int = LANCZOS_STEPS) -> float:
    """Largest eigenvalue of a function's Hessian by Lanczos steps: close, and from below.

    Example:
        >>> round(largest_curvature(lambda x: (x * x * torch.tensor([1.0, 3.0])).sum(), torch.zeros(2)), 4)
        6.0
    """
    start = torch.randn(len(x), generator=torch.Generator(x.device).manual_seed(0), dtype=x.dtype, device=x.device)

    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        slope = torch.autograd.grad(function(leaf), leaf, create_graph=True)[0]

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(slope, leaf, v, retain_graph=True)[0]

    return max(0.0, float(lanczos(product, len(x), min(steps, len(x)), start=start).ritz()[0][-1]))


def refuse_randomness(problem: BilevelProblem, owner: str) -> None:
    """Raise for a network whose training loss is not a function of parameters and hyperparameters.

    The training loss runs in training mode whatever mode the model is in now.

    Raises:
        ValueError: naming the module.
    """
    if problem.objective is None:
        return
    for name, module in problem.model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{owner}: the module {name!r} ({kind}) uses statistics of the batch in training mode; the inner "
                "problem must be a fixed function, replace it by GroupNorm or LayerNorm"
            )
        if "Dropout" in kind and float(getattr(module, "p", 0.0)) > 0:
            raise ValueError(
                f"{owner}: the module {name!r} ({kind}) draws random numbers in training mode; the inner problem must "
                "be deterministic, remove it or set its rate to 0"
            )


class WholeBatch:
    """Takes the one batch that holds all data, and refuses other data later.

    Args:
        owner, which: named in errors: the tuner, and "train" or "validation".
    """

    def __init__(self, owner: str, which: str) -> None:
        self.owner, self.which = owner, which
        self.batch: Any = None
        self._index: Tensor | None = None

    def take(self, batches: Any) -> Any:
        """The batch of the first call; each call takes one from the iterator and compares.

        Raises:
            ValueError: if a later batch holds other examples.
        """
        fresh = next(batches)
        index = self._sorted_index(fresh)
        if self.batch is None:
            self.batch, self._index = fresh, index
        elif index is not None and self._index is not None and not torch.equal(index, self._index):
            raise ValueError(
                f"{self.owner}: the {self.which} batches differ; its certificates need ALL data in one batch, "
                "e.g. batch_size=len(data)"
            )
        return self.batch

    @staticmethod
    def _sorted_index(batch: Any) -> Tensor | None:
        try:
            index = as_batch(batch).index
        except (TypeError, ValueError):
            return None  # a problem of plain losses may take any batch
        return index.sort().values if isinstance(index, Tensor) else None
