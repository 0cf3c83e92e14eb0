"""Normalised momentum: steps whose length is the learning rate, whatever the gradient; as functions and as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..numerics import global_norm

Mode = Literal["normalized", "clipped", "plain"]
EPS = 1e-10
"""Added to the norm that is divided by: a gradient of exactly zero then moves nothing."""


def momentum_average(momentum: Sequence[Tensor], gradient: Sequence[Tensor], beta: float) -> list[Tensor]:
    """`beta * m + (1 - beta) * g`, a running mean of gradients (not a running sum, as in `torch.optim.SGD`).

    Args:
        momentum: m, of any shapes; its dtype is kept.
        gradient: g, of the same shapes.
        beta: in [0, 1); 0 forgets the past.

    Example:
        >>> momentum_average([torch.tensor([1.0])], [torch.tensor([2.0])], beta=0.75)
        [tensor([1.2500])]
    """
    scaled = torch._foreach_mul(list(momentum), beta)
    torch._foreach_add_(scaled, [g.to(m.dtype) for m, g in zip(momentum, gradient, strict=True)], alpha=1.0 - beta)
    return list(scaled)


def joint_norm(tensors: Sequence[Tensor], independent: int = 0) -> Tensor:
    """Euclidean norm of all tensors together, in at least float32.

    Args:
        tensors: at least one.
        independent: number of leading dimensions, the same in all tensors, that number problems of their own; the
            norm then has their shape.

    Example:
        >>> joint_norm([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [1.0]])], independent=1)
        tensor([5., 1.])
    """
    if independent == 0:
        return global_norm(tensors)
    total: Tensor | None = None
    for tensor in tensors:
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        square = wide.flatten(independent).square().sum(-1) if wide.ndim > independent else wide.square()
        total = square if total is None else total + square
    assert total is not None, "joint_norm: no tensor"
    return total.sqrt()


def step_factor(
    norm: Float[Tensor, "*problems"], mode: Mode = "normalized", clip: float | Tensor = 1.0, eps: float = EPS
) -> Float[Tensor, "*problems"]:
    """What a direction of this norm is multiplied with, before the learning rate.

    | mode       | factor                | length of the step  |
    |------------|-----------------------|---------------------|
    | normalized | 1 / (norm + eps)      | the learning rate   |
    | clipped    | min(1, clip / norm)   | at most lr * clip   |
    | plain      | 1                     | lr * norm           |

    Source: normalised momentum as in arXiv 2401.09587, algorithm 1 (eps as in the authors' code); the other two are
    what it is compared with.

    Example:
        >>> step_factor(torch.tensor(4.0)), step_factor(torch.tensor(4.0), "clipped", clip=1.0)
        (tensor(0.2500), tensor(0.2500))
    """
    if mode == "plain":
        return torch.ones_like(norm)
    if mode == "clipped":
        return (clip / (norm + eps)).clamp(max=1.0)
    return 1.0 / (norm + eps)


def apply_step(
    tensors: Sequence[Tensor], direction: Sequence[Tensor], length: float | Float[Tensor, "*problems"]
) -> None:
    """`x -= length * direction`, in place; `length` is one number, or one for each of several independent problems.

    Example:
        >>> x = torch.zeros(2, 1)
        >>> apply_step([x], [torch.ones(2, 1)], torch.tensor([1.0, 2.0]))
        >>> x.flatten()
        tensor([-1., -2.])
    """
    for x, d in zip(tensors, direction, strict=True):
        scale = length.reshape(length.shape + (1,) * (d.ndim - length.ndim)) if isinstance(length, Tensor) else length
        x.sub_((scale * d).to(x.dtype))


class NormalizedMomentum(torch.optim.Optimizer):
    """Normalised SGD with momentum: `m = beta m + (1 - beta) g`, `x = x - lr m / |m|`.

    Every step has length `lr`, so that a gradient that explodes (recurrent networks, curvature that grows with the
    gradient) cannot throw the iterate away. The price: steps never shrink by themselves, and the final accuracy is
    about `lr`; decay it with any of torch's schedulers. For a single number this is sign descent.

    Source: the upper-level update of BO-REP (arXiv 2401.09587, algorithm 1); for one level, Cutkosky and Mehta 2020
    (arXiv 2002.03305).

    Args:
        params: tensors or parameter groups.
        lr: length of a step, > 0, in the units of the parameters.
        beta: share of the old momentum, in [0, 1).
        eps: added to the norm, > 0.
        group_norm: take one norm for each parameter group instead of one for all: groups of very different gradient
            then move by their own `lr` each, instead of the largest gradient taking the whole step.

    Raises:
        ValueError: for an argument out of range.
        RuntimeError: for a sparse gradient.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = NormalizedMomentum([x], lr=0.1)
        >>> (1e6 * x[0]).backward()
        >>> optimizer.step()
        >>> x
        tensor([-0.1000,  0.0000], requires_grad=True)
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, beta: float = 0.9, eps: float = EPS, group_norm: bool = False
    ) -> None:
        self.group_norm = group_norm
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        if not isinstance(group["lr"], Tensor) and not group["lr"] > 0:
            raise ValueError(f"NormalizedMomentum: lr must be > 0, got {group['lr']}")
        check_beta("NormalizedMomentum", group["beta"])
        if not group["eps"] > 0:
            raise ValueError(f"NormalizedMomentum: eps must be > 0, got {group['eps']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; parameters without a gradient stay, and do not count in the norm."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, *self._averaged(group)) for group in self.param_groups]
        everything = [m for _, _, momentum in moving for m in momentum]
        if not everything:
            return loss
        common = None if self.group_norm else joint_norm(everything)
        for group, params, momentum in moving:
            if params:
                norm = joint_norm(momentum) if common is None else common
                apply_step(params, momentum, group["lr"] * step_factor(norm, eps=group["eps"]))
        return loss

    def _averaged(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that have a gradient, and their new momentum, in at least float32."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return [], []
        gradients = [p.grad for p in params]
        if any(g.is_sparse for g in gradients):
            raise RuntimeError("NormalizedMomentum: sparse gradients are not supported; use sparse=False")
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        momentum = momentum_average([self.state[p]["momentum"] for p in params], gradients, group["beta"])
        for p, m in zip(params, momentum, strict=True):
            self.state[p]["momentum"] = m
        return params, momentum


def check_beta(owner: str, beta: float) -> None:
    """Raise unless a share of momentum lies in [0, 1).

    Raises:
        ValueError: naming owner and value.

    Example:
        >>> check_beta("BOREP", 1.0)
        Traceback (most recent call last):
        ValueError: BOREP: beta must lie in [0, 1), got 1.0: with 1 no gradient would ever enter
    """
    if not 0 <= beta < 1:
        raise ValueError(f"{owner}: beta must lie in [0, 1), got {beta}: with 1 no gradient would ever enter")
