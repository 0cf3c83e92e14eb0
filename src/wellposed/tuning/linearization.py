"""Predictions linearised in the response input, by forward-mode differentiation inside one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from .response_input import ResponseState

Affine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`apply(x, weight, bias)`: a map that is affine in x, e.g. `F.linear`."""


class Linearization:
    """Hooks on the root of a network: inside its forward, response layers carry a tangent; outputs are sums of both.

    f(x; k = 0) + (df/dk at 0) k, both from one pass, hence with the same dropout masks (Bae and Grosse 2020,
    arXiv 2010.13514). Reverse mode goes through the result. A class, so that a model which carries it can be copied.

    Args:
        state: shared by the network's response layers; acts only while `state.linearized`.
    """

    def __init__(self, state: ResponseState) -> None:
        self.state = state
        self._level: forward_ad.dual_level | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the forward pass."""
        if self.state.linearized and self.state.k is not None:
            self._level = forward_ad.dual_level()
            self._level.__enter__()

    def end(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        """After it; also runs when the pass raised."""
        if self._level is None:
            return outputs
        try:
            return _map_outputs(_primal_plus_tangent, outputs)
        finally:
            level, self._level = self._level, None
            level.__exit__(None, None, None)


@contextmanager
def explained_forward_mode(owner: str) -> Iterator[None]:
    """Inside the block, an operation without forward-mode derivative raises an error that says what to do.

    The hooks cannot do this: what a network raises passes them by. So the block belongs where the network is evaluated.

    Args:
        owner: named in the error.

    Raises:
        NotImplementedError: with the operation as PyTorch names it.

    Example:
        >>> import torch
        >>> with explained_forward_mode("SelfTuner"), forward_ad.dual_level():
        ...     a = forward_ad.make_dual(torch.ones(2, 2), torch.ones(2, 2))
        ...     torch.cdist(a, a)
        Traceback (most recent call last):
        NotImplementedError: SelfTuner: linearize=True needs the forward-mode derivative of every operation ...
    """
    try:
        yield
    except NotImplementedError as error:
        words = str(error)
        if "forward AD" not in words and "forward mode AD" not in words:
            raise
        raise NotImplementedError(
            f"{owner}: linearize=True needs the forward-mode derivative of every operation in the network, and PyTorch "
            f"says: {words.splitlines()[0].rstrip('.')}. Pass linearize=False; or, if the operation is a fused attention, "
            "train inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or load the model of transformers with "
            "attn_implementation='eager'"
        ) from error


def linearized_affine(
    apply: Affine,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    factor: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """A response layer at k = 0 as a dual number: W0 x + b0, with its derivative along k and along x's own tangent.

    The derivative is factor * (W1 x) + shift + W0 dx. Dual numbers of the whole expression would compute the response
    a second time, only to find that it is zero.

    Args:
        apply: the affine map, `apply(x, weight, bias)`.
        x: input, dual or not.
        weight, bias: W0, b0.
        response_weight: W1.
        factor: k times the transposed scale V, shaped to multiply the output.
        shift: (k C') * b1, shaped likewise, or None.
    """
    primal, tangent = forward_ad.unpack_dual(x)
    y = apply(primal, weight, bias)
    moved = factor * apply(primal, response_weight, None)
    if shift is not None:
        moved = moved + shift
    if tangent is not None:
        moved = moved + apply(tangent, weight, None)
    return forward_ad.make_dual(y, moved.to(y.dtype))


def _primal_plus_tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return primal if tangent is None else primal + tangent


def _map_outputs(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to the floating tensors of a model's outputs; containers keep their types."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Model outputs of transformers are dataclasses and mappings at once.
        changes = {f.name: _map_outputs(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value)(**changes)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_outputs(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map_outputs(function, v) for v in value)
    if isinstance(value, Mapping):
        return type(value)({k: _map_outputs(function, v) for k, v in value.items()})  # type: ignore[call-arg]
    return value
