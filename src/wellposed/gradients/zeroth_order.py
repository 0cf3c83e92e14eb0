"""Zeroth-order gradients: each example's slope along random directions of one tensor, from two forward passes each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..batching import unwrap
from ..step import LoopServices, Step
from .adam_features import GradientRows
from .last_layer_gradient import ExampleLosses, named_tensor


def directional_differences(
    losses_at: Callable[[Tensor], Tensor], tensor: Tensor, directions: Float[Tensor, "m d"], eps: float
) -> Float[Tensor, "n m"]:
    r"""Central differences `p_ik = (L_i(phi + eps z_k) - L_i(phi - eps z_k)) / (2 eps)`, with an error of order eps^2.

    Every value is made anew from phi: adding and taking away in place would drift.

    Args:
        losses_at: from a value of the tensor to the losses of the examples, (n,).
        tensor: phi, of any shape with d values.
        directions: z, one a row.
        eps: > 0.

    Example:
        >>> slope = directional_differences(lambda phi: (phi * torch.tensor([[1.0], [2.0]])).sum(1).square(),
        ...     torch.tensor([3.0]), torch.tensor([[1.0]]), eps=0.5)
        >>> slope.T
        tensor([[ 6., 24.]])
    """
    columns = []
    for direction in directions:
        shift = eps * direction.reshape(tensor.shape)
        columns.append((losses_at(tensor + shift) - losses_at(tensor - shift)) / (2 * eps))
    return torch.stack(columns, 1)


def random_directions(count: int, like: Tensor, generator: torch.Generator) -> Float[Tensor, "m d"]:
    """Standard normal directions, drawn on the CPU so that they are the same on every device."""
    return torch.randn(count, like.numel(), generator=generator).to(like)


class ZerothOrderGradients:
    """Estimates `g_i ~ mean_k p_ik z_k` of a model's per-example gradients in one parameter.

    The blocks in front of the one that holds the parameter run once a chunk: where they stand in an `nn.Sequential` or
    an `nn.ModuleList`, further passes skip them and start from what they returned. Whether that gives the same losses
    is checked at the first chunk; if not, every pass runs through the whole model.

    Args:
        parameter: name of the tensor.
        eps: length of a difference, > 0. In half precision differences are noise, and are refused.

    Raises:
        ValueError: for a parameter in half precision, or a layer that runs under autocast.
    """

    def __init__(self, parameter: str, eps: float = 1e-3) -> None:
        self.parameter, self.eps = parameter, eps
        self._skips: bool | None = None

    def __call__(self, losses: ExampleLosses, directions: Float[Tensor, "m d"]) -> GradientRows:
        """Rows for the pool's examples, as a product: `p / m` and the directions."""
        model = unwrap(losses.step.model)
        owner, leaf, tensor = named_tensor(model, self.parameter)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(_half(self.parameter, str(tensor.dtype)))
        # In full precision, whatever training runs in.
        step = dataclasses.replace(losses.step, services=LoopServices())
        with torch.no_grad(), _refuse_autocast(owner, self.parameter):
            found = [self._of_chunk(losses, chunk, step, owner, leaf, tensor, directions) for chunk in losses.chunks]
        return GradientRows(torch.cat(found) / len(directions), directions)

    def _of_chunk(
        self,
        losses: ExampleLosses,
        chunk: Any,
        step: Step,
        owner: nn.Module,
        leaf: str,
        tensor: Tensor,
        directions: Tensor,
    ) -> Tensor:
        blocks = _blocks_before(unwrap(step.model), self.parameter) if self._skips is not False else []

        def losses_at(value: Tensor) -> Tensor:
            # The owner's own entry, so that parametrisations and adapters see it too.
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            try:
                return losses(chunk, step)
            finally:
                owner._parameters[leaf] = tensor  # type: ignore[assignment]

        start = tensor.detach()
        with _run_once(blocks):
            if blocks and self._skips is None:
                first, second = losses_at(start), losses_at(start)
                self._skips = bool(torch.allclose(first, second, rtol=1e-5, atol=1e-7, equal_nan=True))
            if self._skips is not False:
                return directional_differences(losses_at, start, directions, self.eps)
        return directional_differences(losses_at, start, directions, self.eps)


def _half(name: str, what: str) -> str:
    return (
        f"MiniBatchCoreset: feature='zo' needs float32, but {name!r} is evaluated in {what}: differences of losses would "
        "be noise; keep the adapter in float32, or use feature='last_layer_grad'"
    )


@contextmanager
def _refuse_autocast(layer: nn.Module, name: str) -> Iterator[None]:
    def check(module: nn.Module, arguments: Any) -> None:
        kind = next((p.device.type for p in module.parameters()), "cpu")
        if torch.is_autocast_enabled(kind):
            raise ValueError(_half(name, f"autocast to {torch.get_autocast_dtype(kind)}"))

    handle = layer.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _blocks_before(model: nn.Module, parameter: str) -> list[nn.Module]:
    """The neighbours in front of the outermost listed block that holds the parameter, in their order."""
    module, path = model, parameter.split(".")
    for name in path[:-1]:
        inner = module.get_submodule(name)
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            neighbours = list(module.children())
            return neighbours[: neighbours.index(inner)]
        module = inner
    return []


@contextmanager
def _run_once(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, the first pass runs through the blocks; later ones get what the last of them returned."""
    kept: list[Any] = []

    def instead(block: nn.Module, last: bool) -> Callable[..., Any]:
        original = block.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if kept:
                return kept[0]
            output = original(*arguments, **keywords)
            if last:
                kept.append(output)
            return output

        return forward

    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = instead(block, block is blocks[-1])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.forward = forward  # type: ignore[method-assign]
