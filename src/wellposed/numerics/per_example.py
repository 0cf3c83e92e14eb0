"""The gradient of each example's own loss, in one vectorised pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm


def per_example_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    params: Iterable[str] | None = None,
    *,
    chunk_size: int | None = None,
    randomness: Literal["error", "same", "different"] = "error",
) -> dict[str, Tensor]:
    """Return ``{name: (batch, *parameter shape)}``: row i is the gradient of example i's loss.

    Args:
        model: called on batches of one, with the weights it has; its ``.grad`` and buffers are not touched.
        loss_fn: ``(outputs, targets) -> loss`` on a batch of one; mean and sum are therefore the same, and a
            loss that returns one number an example may be given as it is.
        inputs: tensor ``(batch, ...)``, or a tuple or dict of such (passed as arguments or keywords).
        targets: tensor ``(batch, ...)``, or a tuple or dict of such.
        params: names of the parameters wanted; default all that require gradients.
        chunk_size: examples vectorised at once; less memory, more time.
        randomness: what dropout does under ``vmap``: ``"different"`` masks for each example, the ``"same"``, or an
            error (default), because the result would not be a function of the weights.

    Raises:
        ValueError: for an unknown parameter name, or BatchNorm that would use batch statistics (one example's
            gradient then does not exist).

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> gradients = per_example_gradients(model, lambda out, y: out.sum(), inputs, targets)
        >>> gradients["weight"]
        tensor([[[1., 0.]],
        <BLANKLINE>
                [[0., 2.]]])
    """
    _check_batch_norm(model)
    everything = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = [n for n, p in model.named_parameters() if p.requires_grad] if params is None else list(params)
    if unknown := [name for name in wanted if name not in everything]:
        raise ValueError(f"per_example_gradients: params names {unknown[0]!r}, which the model does not have")
    # Only the wanted parameters are differentiated: for the last layer of a large model the rest costs nothing.
    moving = {name: everything.pop(name) for name in wanted}
    constant = {**everything, **{name: buffer.clone() for name, buffer in model.named_buffers()}}

    def loss_of_one(weights: dict[str, Tensor], one_input: Any, one_target: Any) -> Tensor:
        arguments, keywords = _as_arguments(_batch_of_one(one_input))
        outputs = functional_call(model, {**weights, **constant}, arguments, keywords)
        return loss_fn(outputs, _batch_of_one(one_target)).sum()

    vectorised = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness=randomness, chunk_size=chunk_size)
    gradients: dict[str, Tensor] = vectorised(moving, inputs, targets)
    return gradients


def _batch_of_one(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda tensor: tensor.unsqueeze(0), value)


def _as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _check_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"per_example_gradients: {name or type(module).__name__} uses the statistics of the batch, so the "
                "gradient of one example is not defined; call model.eval() or use GroupNorm"
            )
