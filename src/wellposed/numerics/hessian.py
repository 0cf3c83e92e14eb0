"""Products of a loss's Hessian with a vector, without the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .tree import global_norm

Loss = Callable[[tuple[Tensor, ...]], Tensor]


def hessian_vector_product(
    loss: Tensor | Loss,
    params: Sequence[Tensor],
    vector: Sequence[Tensor],
    mode: Literal["reverse", "forward_over_reverse", "finite_difference"] = "reverse",
    *,
    step: float | None = None,
) -> tuple[Tensor, ...]:
    r"""Return :math:`\nabla^2 L(\theta)\, v`, one tensor a parameter (zeros where the loss does not depend on it).

    ==========================  =====================================  =========================================
    mode                        how                                    when
    ==========================  =====================================  =========================================
    ``"reverse"``               gradient of ``<gradient, v>``          always, if the loss is twice differentiable
    ``"forward_over_reverse"``  ``torch.func.jvp`` of the gradient     less memory; every operator needs a forward
                                                                       derivative
    ``"finite_difference"``     ``(g(t + r v) - g(t - r v)) / (2 r)``  no second derivative (fused attention, cuDNN
                                                                       recurrent nets); sees through ReLU's kinks
    ==========================  =====================================  =========================================

    Args:
        loss: a function of the tuple of parameters that returns a scalar and has no other effect. For a module,
            ``lambda p: criterion(functional_call(model, dict(zip(names, p)), (inputs,)), targets)``.
            In mode ``"reverse"`` also a scalar tensor whose graph contains ``params``; its graph is kept, so
            that several products can be taken.
        params: the parameters.
        vector: one tensor a parameter, of its shape.
        step: r of ``"finite_difference"``, in units of ``|v|``: the parameters move by ``step`` in all. Default
            ``eps ** (1/3) * (1 + |params|)``, which balances truncation (order ``step ** 2``) and rounding.

    Raises:
        ValueError: for an unknown mode, a loss that is not a scalar, a tensor loss in a mode that has to evaluate
            it again, or a vector that does not match.

    Example:
        >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (product,) = hessian_vector_product(lambda p: (p[0] ** 3).sum(), [theta], [torch.tensor([1.0, 1.0])])
        >>> product
        tensor([ 6., 12.])
    """
    _check(loss, params, vector, mode)
    if isinstance(loss, Tensor):
        return _double_backward(loss, params, vector)
    point = tuple(parameter.detach() for parameter in params)
    direction = tuple(entry.detach().to(p) for entry, p in zip(vector, point, strict=True))
    if mode == "reverse":
        point = tuple(parameter.requires_grad_() for parameter in point)
        with torch.enable_grad():
            value = _scalar(loss(point))
        return tuple(product.detach() for product in _double_backward(value, point, direction))
    if mode == "forward_over_reverse":
        products: tuple[Tensor, ...] = torch.func.jvp(torch.func.grad(loss), (point,), (direction,))[1]
        return products
    return _central_difference(loss, point, direction, step)


def _double_backward(loss: Tensor, params: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
    gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    # A parameter that enters linearly has a gradient without graph, which autograd.grad would refuse.
    curved = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not curved:
        return tuple(torch.zeros_like(parameter) for parameter in params)
    outputs, cotangents = zip(*curved, strict=True)
    return torch.autograd.grad(outputs, params, cotangents, retain_graph=True, materialize_grads=True)


def _central_difference(
    loss: Loss, point: tuple[Tensor, ...], direction: tuple[Tensor, ...], step: float | None
) -> tuple[Tensor, ...]:
    length = global_norm(direction)
    if step is None:
        step = torch.finfo(point[0].dtype).eps ** (1 / 3) * (1 + float(global_norm(point)))
    radius = step / length.clamp(min=torch.finfo(length.dtype).tiny)  # v = 0: the product below is exactly 0
    high = _gradient(loss, tuple(p + radius.to(p) * d for p, d in zip(point, direction, strict=True)))
    low = _gradient(loss, tuple(p - radius.to(p) * d for p, d in zip(point, direction, strict=True)))
    return tuple((h - g) / (2 * radius.to(h)) for h, g in zip(high, low, strict=True))


def _gradient(loss: Loss, point: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(parameter.requires_grad_() for parameter in point)
    with torch.enable_grad():
        return torch.autograd.grad(_scalar(loss(leaves)), leaves, materialize_grads=True)


def _scalar(value: Tensor) -> Tensor:
    if value.ndim != 0:
        raise ValueError(f"hessian_vector_product: loss must be a scalar, got shape {tuple(value.shape)}")
    return value


def _check(loss: Tensor | Loss, params: Sequence[Tensor], vector: Sequence[Tensor], mode: str) -> None:
    if mode not in ("reverse", "forward_over_reverse", "finite_difference"):
        raise ValueError(
            "hessian_vector_product: mode must be 'reverse', 'forward_over_reverse' or 'finite_difference', "
            f"got {mode!r}"
        )
    if isinstance(loss, Tensor):
        _scalar(loss)
        if mode != "reverse":
            raise ValueError(f"hessian_vector_product: mode {mode!r} needs loss as a function of params, got a tensor")
    shapes, wanted = [tuple(v.shape) for v in vector], [tuple(p.shape) for p in params]
    if shapes != wanted:
        raise ValueError(f"hessian_vector_product: vector must have the shapes of params {wanted}, got {shapes}")
