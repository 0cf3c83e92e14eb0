"""`LowerLevel` and `UpperLoss`: a bilevel problem of which error bounds can be computed.

    min over u of  f(u) = mean_i g_i(x_i(u)) + r(u),   x_i(u) = argmin over x of h_i(x, u)

i runs over samples (images, or one data set), u are the unconstrained values of the hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..hyperparameter import Hyperparameter
from .constants import Constant, Number, Rule, as_constant
from .strongly_convex import InnerSolution, Watch

Values = dict[str, Tensor]
Objective = Callable[[Tensor, Values], Tensor]


class Curvature(Protocol):
    """Second derivatives of h at one point; what depends on the point alone is computed once.

    `hvp(v)`: Hessian in x times v. `mixed_vjp(v)`: v times the mixed derivative, summed over samples: cotangents of the
    CONSTRAINED hyperparameters by name; the chart's chain rule is the caller's.
    """

    def hvp(self, vector: Tensor, /) -> Tensor: ...

    def mixed_vjp(self, vector: Tensor, /) -> Values: ...


Solver = Callable[[Tensor, Values, Number, Number, float, int, Watch | None], InnerSolution]
"""`solver(x0, hypers, mu, L, eps, max_iterations, watch)`; what it returns is certified by the gradient norms it gives."""


class LowerLevel:
    """The inner problem: a twice differentiable h, strongly convex in x, with moduli that hold.

    Args:
        objective: `h(x, hypers)`, hypers being constrained values by name. Returns a scalar, or with `per_sample` one
            number a sample: (samples,), each depending on its own x alone. Deterministic, over all data.
        x0: where the first solve starts; with `per_sample` of shape (samples, *shape).
        hypers: the hyperparameters by name.
        mu, L: moduli of strong convexity and of smoothness in x: numbers, functions of hypers, or `Known` / `Estimated`
            around them; per sample where they differ.
        per_sample: many independent inner problems, which share the hyperparameters.
        quadratic: h is quadratic in x, whatever the hyperparameters: the Hessian's inverse does not change with x.
        J_norm: bound of the spectral norm of the mixed derivative (in u, not in the constrained values), a function of
            (x, hypers); for the descent test alone. None: computed exactly for few hyperparameters, else estimated.
        L_J: Lipschitz constant in x of the mixed derivative.
        L_Hinv: Lipschitz constant in x of the inverse Hessian, e.g. L_H / mu^2; 0 if `quadratic`.
        gradient: closed form of the gradient in x, `(x, hypers) -> like x`; autograd by default.
        curvature: closed form of the second derivatives, `(x, hypers) -> Curvature`; autograd by default.
        solver: another inner solver; accelerated gradient by default.

    Raises:
        TypeError: for constants or hyperparameters of another type, or data that are not floating.
        ValueError: without mu or L, without hyperparameters, or with a discrete one.

    Example:
        >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> ridge = LowerLevel(
        ...     lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(),
        ...     x0=torch.zeros(2, dtype=torch.float64),
        ...     hypers={"weight": Hyperparameter(1.0, chart="exp")},
        ...     mu=lambda v: 1 + v["weight"], L=lambda v: 1 + v["weight"], quadratic=True,
        ... )
        >>> ridge.gradient(ridge.x0, ridge.u0)
        tensor([[-1., -2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        objective: Objective,
        x0: Tensor,
        hypers: Mapping[str, Hyperparameter],
        mu: Constant | Rule,
        L: Constant | Rule,
        *,
        per_sample: bool = False,
        quadratic: bool = False,
        J_norm: Constant | Rule | None = None,
        L_J: Constant | Rule | None = None,
        L_Hinv: Constant | Rule | None = None,
        gradient: Objective | None = None,
        curvature: Callable[[Tensor, Values], Curvature] | None = None,
        solver: Solver | None = None,
    ) -> None:
        owner = "LowerLevel"
        if not isinstance(x0, Tensor) or not x0.is_floating_point():
            raise TypeError(f"{owner}: x0 must be a floating tensor, got {getattr(x0, 'dtype', type(x0).__name__)}")
        if x0.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{owner}: x0 must be float32 or float64 (certificates need digits), got {x0.dtype}")
        _check_hypers(hypers)
        for name, value in (("mu", mu), ("L", L)):
            if value is None:
                raise ValueError(
                    f"{owner}: {name} is missing and cannot be inferred; give the modulus of "
                    f"{'strong convexity' if name == 'mu' else 'smoothness'} as a number or a function of the hypers"
                )
        self.objective, self.hypers, self.per_sample, self.quadratic = objective, dict(hypers), per_sample, quadratic
        self.x0 = x0.detach() if per_sample else x0.detach()[None]
        self.mu, self.L = as_constant(mu, owner, "mu"), as_constant(L, owner, "L")
        self.J_norm = None if J_norm is None else as_constant(J_norm, owner, "J_norm")
        self.L_J = None if L_J is None else as_constant(L_J, owner, "L_J")
        if L_Hinv is None and quadratic:
            L_Hinv = 0.0
        self.L_Hinv = None if L_Hinv is None else as_constant(L_Hinv, owner, "L_Hinv")
        self._gradient, self._curvature, self.solver = gradient, curvature, solver
        self.checked = False  # whether second derivatives have been compared with differences of the gradient

    @property
    def u0(self) -> Float[Tensor, " p"]:
        """The present unconstrained values of all hyperparameters as one vector, in x's dtype."""
        return torch.cat([h.raw.detach().reshape(-1) for h in self.hypers.values()]).to(self.x0)

    def raw(self, u: Float[Tensor, " p"]) -> Values:
        """The vector cut into each hyperparameter's shape."""
        parts, start = {}, 0
        for name, h in self.hypers.items():
            parts[name] = u[start : start + h.raw.numel()].reshape(h.raw.shape)
            start += h.raw.numel()
        return parts

    def values(self, u: Float[Tensor, " p"]) -> Values:
        """Constrained values by name, differentiable in u."""
        return {name: self.hypers[name].from_raw(part) for name, part in self.raw(u).items()}

    @torch.no_grad()
    def write(self, u: Float[Tensor, " p"]) -> None:
        """Store u in the hyperparameters."""
        for name, part in self.raw(u).items():
            self.hypers[name].raw.copy_(part)

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def gradient(self, x: Float[Tensor, " samples *shape"], u: Float[Tensor, " p"]) -> Float[Tensor, " samples *shape"]:
        """Gradient of h in x, for every sample."""
        return self.gradient_at(self.values(u))(x)  # type: ignore[no-any-return]

    def gradient_at(self, values: Values) -> Callable[[Tensor], Tensor]:
        """The gradient as a function of x, at fixed constrained values."""
        if self._gradient is not None:
            closed = self._gradient
            return (lambda x: closed(x, values)) if self.per_sample else (lambda x: closed(x[0], values)[None])

        @torch.enable_grad()  # type: ignore[untyped-decorator]
        def gradient(x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self._total(leaf, values), leaf)[0]

        return gradient  # type: ignore[no-any-return]

    def hessian_at(self, x: Tensor, values: Values) -> Callable[[Tensor], Tensor]:
        """Products with the Hessian in x at one point, at fixed constrained values."""
        if self._curvature is not None:
            closed = self._curvature(x if self.per_sample else x[0], values)
            return closed.hvp if self.per_sample else (lambda v: closed.hvp(v[0])[None])
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            slope = torch.autograd.grad(self._total(leaf, values), leaf, create_graph=True)[0]
        return lambda v: torch.autograd.grad(slope, leaf, v, retain_graph=True)[0]

    def total(self, x: Tensor, values: Values) -> float:
        """Sum of h over the samples, at fixed constrained values."""
        with torch.no_grad():
            return float(self._total(x, values))

    def inner_loss(self, x: Tensor, u: Tensor) -> float:
        """Mean of h over the samples."""
        return self.total(x, self.values(u)) / len(x)

    def curvature(self, x: Tensor, u: Tensor) -> SecondDerivatives:
        """Second derivatives at (x, u)."""
        return SecondDerivatives(self, x, u)

    def _total(self, x: Tensor, values: Values) -> Tensor:
        found = self.objective(x if self.per_sample else x[0], values)
        wanted = x.shape[:1] if self.per_sample else ()
        if found.shape != wanted:
            what = f"one number a sample, shape {tuple(wanted)}" if self.per_sample else "a scalar"
            raise ValueError(f"LowerLevel: objective must return {what}, got shape {tuple(found.shape)}")
        return found.sum()


class SecondDerivatives:
    """Hessian products, and products with the mixed derivative in u, at one point.

    By autograd the graph of the gradient is built once; its memory does not depend on how many products are taken.
    """

    def __init__(self, lower: LowerLevel, x: Tensor, u: Tensor) -> None:
        self.lower, self.u = lower, u
        self.leaf = u.detach().requires_grad_()
        if lower._curvature is not None:
            with torch.enable_grad():
                self.values = lower.values(self.leaf)
            fixed = {name: value.detach() for name, value in self.values.items()}
            self.closed: Curvature | None = lower._curvature(x if lower.per_sample else x[0], fixed)
            return
        self.closed = None
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            value = lower._total(self.x, lower.values(self.leaf))
            self.slope = torch.autograd.grad(value, self.x, create_graph=True)[0]

    def hvp(self, vector: Tensor) -> Tensor:
        """Hessian of each sample's h in x, times its part of `vector`."""
        if self.closed is not None:
            return self.closed.hvp(vector) if self.lower.per_sample else self.closed.hvp(vector[0])[None]
        return self._pulled(vector, self.x)

    def mixed_vjp(self, vector: Tensor) -> Float[Tensor, " p"]:
        """J' vector, summed over samples: J is the mixed derivative of h in x and u."""
        if self.closed is None:
            return self._pulled(vector, self.leaf)
        cotangents = self.closed.mixed_vjp(vector if self.lower.per_sample else vector[0])
        found = torch.autograd.grad(
            [self.values[name] for name in cotangents], self.leaf, list(cotangents.values()), retain_graph=True
        )
        return found[0]

    def _pulled(self, vector: Tensor, of: Tensor) -> Tensor:
        if not self.slope.requires_grad:
            return torch.zeros_like(of)
        found = torch.autograd.grad(
            self.slope, of, vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found[0]


class UpperLoss:
    """The upper loss: g(x) with a Lipschitz gradient, and optionally a term r of the hyperparameters.

    Args:
        value: `g(x)`: a scalar, or with a `per_sample` inner problem one number a sample; their mean counts.
        L_g: Lipschitz constant of its gradient (per sample), a number or `Known` / `Estimated`.
        convex: whether g is convex: lower bounds are then tighter.
        penalty: `r(hypers)`, a scalar.
        gradient: closed form, `x -> (value, gradient)`; autograd by default.

    Example:
        >>> loss = UpperLoss(lambda x: 0.5 * (x - 1).square().sum(), L_g=1.0, convex=True)
        >>> value, slope = loss.value_and_gradient(torch.zeros(1, 2), per_sample=False)
        >>> value, slope
        (tensor([1.]), tensor([[-1., -1.]]))
    """

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        L_g: Constant | Rule,
        convex: bool = False,
        penalty: Callable[[Values], Tensor] | None = None,
        gradient: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if L_g is None:
            raise ValueError("UpperLoss: L_g is missing; give the Lipschitz constant of the upper gradient")
        self.value, self.convex, self.penalty = value, convex, penalty
        self.L_g = as_constant(L_g, "UpperLoss", "L_g")
        self._gradient = gradient

    def value_and_gradient(
        self, x: Tensor, per_sample: bool, u: Tensor | None = None
    ) -> tuple[Float[Tensor, " samples"], Tensor]:
        """Loss g of every sample (one, if there is no axis of samples) and its gradient in x.

        u is for losses that read the hyperparameters beside x; this one does not.
        """
        if self._gradient is not None:
            found, slope = self._gradient(x if per_sample else x[0])
            return (found, slope) if per_sample else (found.reshape(1), slope[None])
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = self.value(leaf if per_sample else leaf[0])
            if found.shape != (x.shape[:1] if per_sample else ()):
                what = f"one number a sample, shape ({len(x)},)" if per_sample else "a scalar"
                raise ValueError(f"UpperLoss: value must return {what}, got shape {tuple(found.shape)}")
            slope = torch.autograd.grad(found.sum(), leaf)[0]
        return found.detach().reshape(-1), slope

    def direct(self, lower: LowerLevel, x: Tensor, u: Tensor) -> tuple[float, Tensor | None]:
        """r(u) and its gradient in u; (0, None) without a penalty."""
        if self.penalty is None:
            return 0.0, None
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = self.penalty(lower.values(leaf))
            found = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)[0]
        return float(value.detach()), found


def _check_hypers(hypers: Mapping[str, Any]) -> None:
    if not hypers:
        raise ValueError("LowerLevel: hypers is empty; give the strengths as Hyperparameters by name")
    for name, h in hypers.items():
        if not isinstance(h, Hyperparameter):
            raise TypeError(f"LowerLevel: hypers[{name!r}] must be a Hyperparameter, got {type(h).__name__}")
        if h.discrete:
            raise ValueError(f"LowerLevel: hypers[{name!r}] is discrete; an implicit gradient needs a continuous one")
