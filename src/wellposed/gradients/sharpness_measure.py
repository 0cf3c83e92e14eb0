"""`surrogate_sharpness`: how much the mean prediction can change over a ball of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batching import unwrap
from ..numerics.tree import global_norm
from .output_gradient import MeanPrediction, OutputFunction


def surrogate_sharpness(
    model: nn.Module,
    x: Any,
    rho: float = 0.05,
    output_fn: OutputFunction | None = None,
    exact: bool = False,
    steps: int = 20,
) -> Tensor:
    """Surrogate sharpness (Dao et al. 2024, arXiv 2503.04242): `max over ||d|| <= rho of h(w + d) - h(w)`.

    `h(w) = mean_j f_w(x_j)` is the mean prediction on `x`, and w are all parameters that require a gradient. To first
    order the maximum is `rho * ||dh/dw||`, which the method constrains.

    Args:
        model: in the mode in which it shall be measured.
        x: inputs, (batch, ...).
        rho: radius of the ball, > 0, in units of the weights.
        output_fn: from the model's outputs to (batch,); `mean_output` by default.
        exact: search the ball by projected gradient ascent, instead of the first order. What it returns is reached
            somewhere in the ball, so it is a lower bound of the maximum.
        steps: of that ascent, each of length `rho / 2`.

    Returns:
        A detached scalar, >= 0, in units of the prediction.

    Raises:
        ValueError: if rho <= 0, the batch is empty, no parameter requires a gradient, or `output_fn` does not return
            one value an example.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[2.0, 2.0]])                # gradient (2, 2) of the weight, 1 of the bias: norm 3
        >>> surrogate_sharpness(model, x, rho=0.1), surrogate_sharpness(model, x, rho=0.1, exact=True)
        (tensor(0.3000), tensor(0.3000))
    """
    if not rho > 0:
        raise ValueError(f"surrogate_sharpness: rho must be > 0, got {rho!r}")
    mean = MeanPrediction(unwrap(model), [(x, 1.0)], output_fn)
    gradient = mean.gradient()
    norm = global_norm(gradient)
    return rho * norm if not exact or norm == 0 else _ascended(mean, x, gradient, rho, steps)


def _ascended(mean: MeanPrediction, x: Any, gradient: list[Tensor], rho: float, steps: int) -> Tensor:
    start = [p.detach() for p in mean.parameters]
    with torch.no_grad():
        base = mean.value(None, x).detach()
    best = torch.zeros_like(base)
    move = [torch.zeros_like(p) for p in start]
    for number in range(steps):
        # The first step goes to the edge: the point that the first order means.
        length = (rho if number == 0 else rho / 2) / global_norm(gradient)
        move = [m + g * length.to(g) for m, g in zip(move, gradient, strict=True)]
        shrink = (rho / global_norm(move)).clamp(max=1.0)
        move = [m * shrink.to(m) for m in move]
        values = {n: (p + m).requires_grad_() for n, p, m in zip(mean.names, start, move, strict=True)}
        value = mean.value(values, x)
        best = torch.maximum(best, value.detach() - base)
        found = torch.autograd.grad(value, list(values.values()), allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for g, p in zip(found, start, strict=True)]
        if global_norm(gradient) == 0:
            break
    return best
