"""The S-shaped functions of a weight compander, their inverses and slopes, as pure functions on tensors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

CompanderFunction = Literal["arctan", "arsinh", "erf", "tanh", "linear"]
Scale = float | Tensor
"""A scale: a number, or a tensor of shape () where it is learned or tuned."""

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Shape:
    """One odd, increasing function f: `a f(v / b)` is the weight.

    Attributes:
        forward: f(x).
        forward_: the same in place; torch cannot differentiate all of these.
        inverse: x of f(x).
        times_slope: g (a / b) f'(v / b) of (g, v, a, b), with g a tensor or 1.0.
        limit: supremum of f.
    """

    forward: Callable[[Tensor], Tensor]
    forward_: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    times_slope: Callable[[Any, Tensor, Any, Any], Any]
    limit: float


# The in-place operations below work on fresh results only; autograd itself refuses or copies where a derivative
# needs what they overwrite, so that slopes can be differentiated again.
_SHAPES: dict[str, _Shape] = {
    # g a b / (b^2 + v^2), with the constants on the side of v: no trigonometry, and 0, not NaN, where v^2 overflows.
    "arctan": _Shape(
        torch.atan,
        torch.atan_,
        torch.tan,
        lambda g, v, a, b: g / v.square().mul_(1.0 / (a * b)).add_(b / a),
        math.pi / 2,
    ),
    "arsinh": _Shape(
        torch.asinh, torch.asinh_, torch.sinh, lambda g, v, a, b: (g * a) / v.square().add_(b * b).sqrt(), math.inf
    ),
    "erf": _Shape(
        torch.erf,
        torch.erf_,
        torch.erfinv,
        lambda g, v, a, b: g * (v / b).square_().neg_().exp().mul(2.0 / math.sqrt(math.pi) * (a / b)),
        1.0,
    ),
    # 1 / cosh(x)^2 = 4 s(2x) s(-2x): neither cancels like 1 - tanh^2 nor overflows like cosh.
    "tanh": _Shape(
        torch.tanh,
        torch.tanh_,
        torch.atanh,
        lambda g, v, a, b: g * ((v * (2.0 / b)).sigmoid() * (v * (-2.0 / b)).sigmoid()).mul(4.0 * (a / b)),
        1.0,
    ),
    "linear": _Shape(torch.clone, lambda x: x, torch.clone, lambda g, v, a, b: g * (a / b), math.inf),
}

COMPANDER_FUNCTIONS: tuple[str, ...] = tuple(_SHAPES)
"""Names of the functions, the paper's own first; "linear" is the control that only rescales the learning rate."""


def compand(
    v: Float[Tensor, "*shape"], a: Scale = 0.7, b: Scale = 0.7, fn: CompanderFunction = "arctan"
) -> Float[Tensor, "*shape"]:
    r"""The weight `w = a f(v / b)` of a trained number v, elementwise; differentiable twice, also in a and b.

    | fn     | f(x)      | bound of w | v of w            | slope dw/dv                            |
    |--------|-----------|------------|-------------------|----------------------------------------|
    | arctan | arctan(x) | a pi/2     | b tan(w/a)        | (a/b) cos^2(w/a) = a b / (b^2 + v^2)   |
    | arsinh | arsinh(x) | none       | b sinh(w/a)       | a / sqrt(b^2 + v^2)                    |
    | erf    | erf(x)    | a          | b erfinv(w/a)     | 2/sqrt(pi) (a/b) exp(-(v/b)^2)         |
    | tanh   | tanh(x)   | a          | b artanh(w/a)     | (a/b) (1 - (w/a)^2)                    |
    | linear | x         | none       | (b/a) w           | a/b                                    |

    Source: arXiv 2306.16993, eq. 3 (arctan) and section IV-F (arsinh, erf); tanh and linear are additions.

    The graph keeps nothing but v, which a parameter keeps anyway; `a * torch.atan(v / b)` keeps `v / b` as well. Half
    precision is computed in float32.

    Args:
        v: trained numbers.
        a: height, > 0: a number or a tensor of shape ().
        b: width, > 0: a number or a tensor of shape ().
        fn: name of f.

    Raises:
        ValueError: for an unknown function.

    Example:
        >>> compand(torch.tensor([0.0, 1.0, 1e30]), a=1.0, b=1.0)
        tensor([0.0000, 0.7854, 1.5708])
    """
    _shape(fn)
    # A compiler fuses the plain formula and chooses itself what to keep; it refuses functions with a `jvp`.
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return _plain(v, a, b, fn) if plain else _Compand.apply(v, a, b, fn)


def uncompand(
    w: Float[Tensor, "*shape"], a: Scale = 0.7, b: Scale = 0.7, fn: CompanderFunction = "arctan"
) -> Float[Tensor, "*shape"]:
    """The trained number v of a weight: `compand(v) == w` (eq. 4: `b tan(w / a)` for arctan). Without gradient.

    Raises:
        ValueError: if a weight lies outside of the range of `compand`, where a tangent would silently wrap around and
            flip its sign.

    Example:
        >>> compand(uncompand(torch.tensor([-0.3, 0.9])))
        tensor([-0.3000,  0.9000])
        >>> uncompand(torch.tensor([1.0]), a=0.5)
        Traceback (most recent call last):
        ValueError: uncompand: |w| must be < 0.785398 = bound of arctan with a = 0.5, got max |w| = 1
    """
    with torch.no_grad():
        limit = compander_bound(a, fn)
        largest = float(w.abs().max()) if w.numel() else 0.0
        # Written so that NaN is refused, too.
        if not largest < limit:
            raise ValueError(
                f"uncompand: |w| must be < {limit:g} = bound of {fn} with a = {number(a):g}, got max |w| = {largest:g}"
            )
        return (_shape(fn).inverse(_working(w) / a) * b).to(w.dtype)


def compander_slope(
    v: Float[Tensor, "*shape"], a: Scale = 0.7, b: Scale = 0.7, fn: CompanderFunction = "arctan"
) -> Float[Tensor, "*shape"]:
    """`dw/dv` of `compand`, the factor between the gradients: `dL/dv = slope * dL/dw`; at least float32.

    Example:
        >>> compander_slope(torch.tensor([0.0, 1.0, 1e30]), a=1.0, b=0.5)
        tensor([2.0000, 0.4000, 0.0000])
    """
    v = _working(v)
    slope = _shape(fn).times_slope(1.0, v, a, b)
    return slope if isinstance(slope, Tensor) and slope.ndim else torch.ones_like(v) * slope


def compander_bound(a: Scale, fn: CompanderFunction = "arctan") -> float:
    """Supremum of |w|: `a pi / 2` for arctan, `a` for erf and tanh, infinity else.

    Example:
        >>> round(compander_bound(0.7), 4), compander_bound(0.7, "tanh"), compander_bound(0.7, "arsinh")
        (1.0996, 0.7, inf)
    """
    return abs(number(a)) * _shape(fn).limit


def number(scale: Scale) -> float:
    """A scale as a Python number."""
    return float(scale.detach()) if isinstance(scale, Tensor) else scale


@torch.no_grad()
def shrunk_(
    v: Float[Tensor, "*shape"], factor: float | Tensor, a: Scale, b: Scale, fn: CompanderFunction
) -> Float[Tensor, "*shape"]:
    """Overwrite v so that its weight becomes `factor * w`, 0 <= factor <= 1: decoupled weight decay of w.

    At saturation a rounded weight may lie on the wrong side of the bound, where the inverse would wrap around: it is
    held a few units of rounding inside, which moves w by no more than that.

    Example:
        >>> v = torch.tensor([1e20, 0.7])
        >>> compand(shrunk_(v, 0.5, 0.7, 0.7, "arctan"))
        tensor([0.5498, 0.2749])
    """
    shape = _shape(fn)
    u = shape.forward_(_working(v) / b).mul_(factor)
    if math.isfinite(shape.limit):
        inside = shape.limit * (1.0 - 4.0 * torch.finfo(u.dtype).eps)
        u = u.clamp_(-inside, inside)
    return v.copy_(shape.inverse(u) * b)


def _plain(v: Any, a: Any, b: Any, fn: str) -> Any:
    return (_SHAPES[fn].forward(_working(v) / b) * a).to(v.dtype)


class _Compand(torch.autograd.Function):
    """`a f(v / b)` whose graph keeps v alone, which is a parameter and costs nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Any, a: Any, b: Any, fn: str) -> Any:
        return _SHAPES[fn].forward_(_working(v) / b).mul_(a).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        v, a, b, ctx.fn = inputs
        # dw/da = w / a: the weight is kept only where a learns.
        kept = output if ctx.needs_input_grad[1] else None
        ctx.a, ctx.b = (None if isinstance(scale, Tensor) else scale for scale in (a, b))
        saved = (v, *(s if isinstance(s, Tensor) else None for s in (a, b)), kept)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved[:3])

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        v, a, b, w = _saved(ctx)
        x, g = _working(v), _working(gradient)
        scaled = _SHAPES[ctx.fn].times_slope(g, x, a, b)
        needs = ctx.needs_input_grad
        to_a = (g * _working(w) / a).sum().to(a.dtype) if needs[1] else None
        # dw/db = -(v / b) dw/dv for every f.
        to_b = -(scaled * x / b).sum().to(b.dtype) if needs[2] else None
        return scaled.to(v.dtype) if needs[0] else None, to_a, to_b, None

    @staticmethod
    def jvp(ctx: Any, of_v: Any, of_a: Any, of_b: Any, _: Any) -> Any:
        v, a, b, _ = _saved(ctx)
        x = _working(v)
        slope = _SHAPES[ctx.fn].times_slope
        tangent = torch.zeros_like(x) if of_v is None else slope(_working(of_v), x, a, b)
        if of_a is not None:
            tangent = tangent + _SHAPES[ctx.fn].forward(x / b) * of_a
        if of_b is not None:
            tangent = tangent - slope(x / b * of_b, x, a, b)
        return tangent.to(v.dtype)


# torch asks for it at every call, and working it out takes longer than a small layer's arctan.
_Compand.forward.__signature__ = inspect.signature(_Compand.forward)  # type: ignore[attr-defined]


def _saved(ctx: Any) -> tuple[Any, Any, Any, Any]:
    v, a, b, *rest = ctx.saved_tensors
    return v, ctx.a if a is None else a, ctx.b if b is None else b, rest[0] if rest else None


def _shape(fn: str) -> _Shape:
    if fn not in _SHAPES:
        raise ValueError(f"compand: fn must be one of {list(_SHAPES)}, got {fn!r}")
    return _SHAPES[fn]


def _working(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor
