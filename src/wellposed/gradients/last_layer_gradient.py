"""Exact gradients of each example's loss in one tensor near the output, without a backward pass through the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..batching import map_tensors, unwrap, valid_positions
from ..numerics import per_example_gradients
from ..objective import Criterion
from ..step import Step, copied_buffers, mode

LARGEST = 1 << 31
"""Bytes that the gradients of one pool may take."""


def last_linear_weight(model: nn.Module) -> str:
    """Name of the last linear layer's weight that trains: of an adapter where there is one, else of the head.

    Raises:
        ValueError: if no linear layer trains.

    Example:
        >>> last_linear_weight(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
        '2.weight'
    """
    found = [
        f"{name}.weight" if name else "weight"
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    if not found:
        raise ValueError("MiniBatchCoreset: the model trains no linear layer; name the tensor to compare by parameter=")
    return found[-1]


def named_tensor(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter]:
    """The module that owns a parameter, its name there, and the parameter.

    Raises:
        ValueError: naming the parameter that the model does not have.
    """
    owner, _, leaf = name.rpartition(".")
    parameter = dict(unwrap(model).named_parameters(remove_duplicate=False)).get(name)
    if parameter is None:
        raise ValueError(f"MiniBatchCoreset: parameter: the model has no parameter {name!r}")
    return unwrap(model).get_submodule(owner), leaf, parameter


def mean_token_loss(
    loss: Float[Tensor, batch * length], valid: Bool[Tensor, "batch length"] | None
) -> Float[Tensor, " batch"]:
    """The loss of each example: as it is, or the mean over the example's OWN tokens, so that padding has no part.

    Example:
        >>> loss = torch.tensor([[1.0, 3.0], [2.0, 9.0]])
        >>> mean_token_loss(loss, torch.tensor([[True, True], [True, False]]))
        tensor([2., 2.])
    """
    if loss.ndim == 1:
        return loss
    if valid is None:
        return loss.mean(1)
    return torch.where(valid, loss, 0.0).sum(1) / valid.sum(1).clamp(min=1)


class ExampleLosses:
    """Losses of some examples of a pool, chunk by chunk, in evaluation mode, leaving no trace.

    Args:
        step: with the pool.
        criterion: unreduced task loss.
        rows: (examples,) which ones, positions in the pool.
        chunk_size: examples in one forward pass; None for all.
    """

    def __init__(self, step: Step, criterion: Criterion, rows: Tensor, chunk_size: int | None) -> None:
        self.step, self.criterion = step, criterion
        size = len(step.targets)

        def select(part: Tensor) -> tuple[Any, Any, dict[str, Any]]:
            return tuple(take(value, size, part) for value in (step.inputs, step.targets, step.extra))  # type: ignore[return-value]

        self.chunks = [select(part) for part in rows.split(chunk_size or max(1, len(rows)))]

    def __call__(self, chunk: tuple[Any, Any, dict[str, Any]], step: Step | None = None) -> Tensor:
        """(chunk,) losses at the parameters that the model has now."""
        inputs, targets, extra = chunk
        outputs = (step or self.step).forward(inputs, grad=False, training=False)
        return mean_token_loss(self.criterion(outputs, targets), valid_positions(targets, extra))


def take(value: Any, size: int, rows: Tensor) -> Any:
    """Rows of every tensor whose first dimension is `size`; the rest as it is."""
    return map_tensors(lambda t: t[rows.to(t.device)] if t.ndim and len(t) == size else t, value)


def linear_gradients(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Gradients in the weight of a linear layer, `sum_t g_t a_t'` for each example.

    Args:
        inputs: a, what went into the layer, (n, ..., fan in).
        outputs: g, gradients of the examples' losses in what came out, (n, ..., fan out).

    Returns:
        (n, fan out * fan in), in at least float32.

    Example:
        >>> linear_gradients(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 0.0]]))
        tensor([[10., 20.,  0.,  0.]])
    """
    n = len(inputs)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    a, g = (t.to(dtype).reshape(n, -1, t.shape[-1]) for t in (inputs, outputs))
    return torch.bmm(g.transpose(1, 2), a).reshape(n, -1)


def last_layer_gradients(losses: ExampleLosses, parameter: str) -> Float[Tensor, "n d"]:
    """Gradient of each example's loss in one parameter, in evaluation mode; the model's `.grad` is not touched.

    For the weight of a linear layer one backward pass of the whole chunk is enough, through what comes after the layer
    alone: in front of it no graph is built. Any other parameter is differentiated example by example (vectorised).

    Raises:
        ValueError: for an unknown parameter, or gradients that would take more than 2 GB.
    """
    model = unwrap(losses.step.model)
    owner, leaf, tensor = named_tensor(model, parameter)
    count = sum(len(chunk[1]) for chunk in losses.chunks)
    if count * tensor.numel() * 4 > LARGEST:
        raise ValueError(
            f"MiniBatchCoreset: parameter {parameter!r} has {tensor.numel():,} values: the gradients of {count} examples "
            "would take more than 2 GB; name a smaller tensor by parameter=, e.g. the last adapter's, or feature='zo'"
        )
    if isinstance(owner, nn.Linear) and leaf == "weight":
        return torch.cat([_of_linear(losses, chunk, owner, parameter) for chunk in losses.chunks])
    return torch.cat([_by_example(losses, chunk, model, parameter) for chunk in losses.chunks])


def _of_linear(losses: ExampleLosses, chunk: Any, layer: nn.Linear, name: str) -> Tensor:
    with torch.enable_grad(), _graph_from(layer) as calls:
        found = losses(chunk)
        if not calls:
            raise ValueError(f"MiniBatchCoreset: parameter {name!r}: the forward pass never calls its layer")
        slopes = torch.autograd.grad(found.sum(), [output for _, output in calls])
    if any(len(inputs) != len(found) for inputs, _ in calls):
        raise ValueError(
            f"MiniBatchCoreset: parameter {name!r}: its layer does not see one row an example; name another one"
        )
    return torch.stack([linear_gradients(a, g) for (a, _), g in zip(calls, slopes, strict=True)]).sum(0)


@contextmanager
def _graph_from(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Begin the graph at a layer's output inside a pass that builds none; collects its inputs and outputs."""
    calls: list[tuple[Tensor, Tensor]] = []

    def begin(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not calls:
            output = output.detach().requires_grad_()
            torch.set_grad_enabled(True)  # for the rest of the pass, whose own context ends it
        calls.append((arguments[0].detach(), output))
        return output

    handle = layer.register_forward_hook(begin)
    try:
        yield calls
    finally:
        handle.remove()


def _by_example(losses: ExampleLosses, chunk: Any, model: nn.Module, name: str) -> Tensor:
    inputs, targets, extra = chunk
    valid = valid_positions(targets, extra)

    def loss_of(outputs: Any, one: tuple[Any, ...]) -> Tensor:
        return mean_token_loss(losses.criterion(outputs, one[0]), one[1] if len(one) == 2 else None)

    with copied_buffers(model), mode(model, False), losses.step.services.autocast():
        known = (targets,) if valid is None else (targets, valid)
        found = per_example_gradients(model, loss_of, inputs, known, [name])
    rows = found[name].flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
