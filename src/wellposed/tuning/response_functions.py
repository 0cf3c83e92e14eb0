"""The structured best response as pure functions: weights whose rows are affine in the hyperparameters.

    W(k) = W0 + diag(V k) W1,    b(k) = b0 + (C k) * b1

k is the response input of one example. Nothing here materialises W(k) but `response_weight`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def spread(rows: Float[Tensor, "rows channels"], like: Tensor, channel: int, owner: str = "response layer") -> Tensor:
    """Factors of examples and channels, shaped to multiply `like`; the dimensions between are broadcast over.

    Args:
        rows: one row for all examples, or one for each.
        like: (batch, ..., channels) with channel=-1, or (batch, channels, ...) with channel=1.
        channel: where the channels stand.
        owner: named in errors.

    Raises:
        ValueError: if there are neither one row nor as many as examples.

    Example:
        >>> spread(torch.ones(2, 3), torch.zeros(2, 7, 3), -1).shape
        torch.Size([2, 1, 3])
    """
    if rows.shape[0] != 1 and rows.shape[0] != like.shape[0]:
        raise ValueError(
            f"{owner}: the response input has {rows.shape[0]} rows, but the layer sees a batch of {like.shape[0]}; the "
            "first dimension of what a response layer gets must be that of the examples"
        )
    if like.ndim == 2:
        return rows
    if like.ndim == 1:
        return rows[0]
    middle = (1,) * (like.ndim - 2)
    shape = (rows.shape[0], *middle, rows.shape[1]) if channel == -1 else (rows.shape[0], rows.shape[1], *middle)
    return rows.reshape(shape)


def response_linear(
    x: Float[Tensor, "batch *middle inputs"],
    k: Float[Tensor, "rows n"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None,
    response_weight: Float[Tensor, "outputs inputs"],
    response_bias: Float[Tensor, " outputs"] | None,
    scale: Float[Tensor, "outputs n"],
    bias_scale: Float[Tensor, "outputs n"] | None,
    owner: str = "response_linear",
) -> Float[Tensor, "batch *middle outputs"]:
    """A linear layer with its own weights for each example (MacKay et al. 2019, arXiv 1903.03088, section 3.2).

    y = x W0' + b0 + (k V') * (x W1') + (k C') * b1: two products, and no weight of an example is formed.

    Args:
        x: inputs; what stands between the first and the last dimension shares its example's weights.
        k: response input, one row for all examples or one for each.
        weight, bias: W0, b0.
        response_weight, response_bias: W1, b1.
        scale, bias_scale: V, C.
        owner: named in errors.

    Raises:
        ValueError: if k has neither one row nor as many as x.

    Example:
        >>> one = torch.ones(1, 1)
        >>> response_linear(one, 2 * one, one, None, one, None, 3 * one, None)
        tensor([[7.]])
    """
    general, varied = F.linear(x, weight, bias), F.linear(x, response_weight)
    y = torch.addcmul(general, spread(k @ scale.T, general, -1, owner), varied)
    if response_bias is None or bias_scale is None:
        return y
    # Under autocast the product with a float32 bias would widen the output.
    return y + spread(((k @ bias_scale.T) * response_bias).to(y.dtype), y, -1, owner)


def response_weight(
    k: Float[Tensor, " n"],
    weight: Float[Tensor, "*weight"],
    varied: Float[Tensor, "*weight"],
    scale: Float[Tensor, "channels n"],
    channel: int = 0,
) -> Float[Tensor, "*weight"]:
    """The weight itself at one response input: W0 + diag(V k) W1.

    Args:
        k: response input.
        weight, varied: W0, W1.
        scale: V.
        channel: dimension of the weight that the scale belongs to (1 for an embedding, whose columns respond).

    Example:
        >>> response_weight(torch.ones(1), torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[1.0], [2.0]]))
        tensor([[1.],
                [2.]])
    """
    shape = [1] * weight.ndim
    shape[channel] = -1
    return torch.addcmul(weight, (scale @ k).reshape(shape), varied)


def response_squared_norm(
    k: Float[Tensor, "rows n"],
    weight: Float[Tensor, "channels rest"],
    varied: Float[Tensor, "channels rest"],
    scale: Float[Tensor, "channels n"],
) -> Float[Tensor, " rows"]:
    """||W0 + diag(V k) W1||^2 of each row of k, from three numbers a channel: ||W0||^2 + 2 a.r + a^2.q with a = V k.

    r are the inner products of the rows of W0 and W1, q the squared norms of the rows of W1.

    Example:
        >>> one = torch.ones(1, 1)
        >>> response_squared_norm(torch.tensor([[1.0], [3.0]]), one, one, one)
        tensor([ 4., 16.])
    """
    return _SquaredNorm.apply(k @ scale.T, weight, varied)[0]  # type: ignore[no-any-return]


class _SquaredNorm(torch.autograd.Function):
    """||W0 + diag(a) W1||^2 of each row of a, with a derivative that passes over the weights half as often as autograd's.

    The inner products of rows, r and q, are outputs as well: the backward pass needs them again, and a pass over the
    weights costs as much as an optimizer's.
    """

    @staticmethod
    def forward(a: Tensor, weight: Tensor, varied: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # One buffer for all three products: to allocate a tensor of this size costs more than to fill it.
        product = weight * varied
        both = product.sum(-1)
        own = torch.mul(varied, varied, out=product).sum(-1)
        squared = torch.mul(weight, weight, out=product).sum()
        return squared + (2 * a) @ both + a.square() @ own, both, own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, by_both: Tensor | None, by_own: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        a, weight, varied, both, own = ctx.saved_tensors
        by_a = by_weight = by_varied = None
        if gradient is not None:
            first = (gradient @ a)[:, None] * 2
            if ctx.needs_input_grad[0]:
                by_a = (2 * gradient)[:, None] * (both + a * own)
            if ctx.needs_input_grad[1]:
                by_weight = (weight * (2 * gradient.sum())).addcmul_(first, varied)
            if ctx.needs_input_grad[2]:
                by_varied = (weight * first).addcmul_((gradient @ a.square())[:, None] * 2, varied)
        # Only in a second derivative does anything depend on the inner products.
        if by_both is not None:
            by_weight = _sum(by_weight, by_both[:, None] * varied)
            by_varied = _sum(by_varied, by_both[:, None] * weight)
        if by_own is not None:
            by_varied = _sum(by_varied, 2 * by_own[:, None] * varied)
        return by_a, by_weight, by_varied


def _sum(found: Tensor | None, more: Tensor) -> Tensor:
    return more if found is None else found + more
