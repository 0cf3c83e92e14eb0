"""The small updates of which single-loop bilevel methods are made; functions on lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from ..bilevel import BilevelProblem
from ..loading import distributed
from .normalized_momentum import joint_norm

Schedule = Callable[[int], float] | Literal["cosine"] | None


def linear_system_step(
    z: Sequence[Tensor], product: Sequence[Tensor], right_side: Sequence[Tensor], lr: float
) -> list[Tensor]:
    """One gradient step for `H z = b`: `z - lr (H z - b)`.

    Kept running while b and H drift, z follows the solution; its error shrinks by `1 - lr * mu` a step, mu the smallest
    eigenvalue of H, as long as `lr <= 1 / L`, L the largest. Stable below `2 / L`.

    Args:
        z: current solution.
        product: H z, of a batch.
        right_side: b, the outer loss's gradient in the parameters.
        lr: step size.

    Example:
        >>> linear_system_step([torch.tensor([1.0])], [torch.tensor([2.0])], [torch.tensor([1.0])], lr=0.5)
        [tensor([0.5000])]
    """
    residual = torch._foreach_sub(
        [p.to(x.dtype) for p, x in zip(product, z, strict=True)],
        [b.to(x.dtype) for b, x in zip(right_side, z, strict=True)],
    )
    return list(torch._foreach_add(list(z), residual, alpha=-lr))


def project_to_ball(
    tensors: Sequence[Tensor], centre: Sequence[Tensor], radius: float, independent: int = 0
) -> Float[Tensor, "*problems"]:
    """Move `tensors`, as one vector, to the nearest point of the ball around `centre`; in place.

    Returns:
        The distance from the centre before the projection.

    Example:
        >>> y = torch.tensor([3.0, 4.0])
        >>> project_to_ball([y], [torch.zeros(2)], radius=1.0)
        tensor(5.)
        >>> y
        tensor([0.6000, 0.8000])
    """
    offsets = [y - c for y, c in zip(tensors, centre, strict=True)]
    distance = joint_norm(offsets, independent)
    scale = (radius / distance.clamp(min=torch.finfo(distance.dtype).tiny)).clamp(max=1.0)
    outside = scale < 1.0
    for y, c, d in zip(tensors, centre, offsets, strict=True):
        shape = scale.shape + (1,) * (d.ndim - scale.ndim)
        # Points inside are left alone, bit for bit.
        y.copy_(torch.where(outside.reshape(shape), c + scale.reshape(shape).to(d.dtype) * d, y))
    return distance


def refinement_step_sizes(lr: float, steps: int, stages: int = 3) -> list[float]:
    """Step sizes of the initial refinement: stages of doubling length, the step size halved from one to the next.

    The practical form of the epoch SGD that the theory of BO-REP uses (arXiv 2401.09587; its constants there).

    Example:
        >>> refinement_step_sizes(0.4, steps=7)
        [0.4, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]
    """
    total = 2**stages - 1
    bounds = [steps * (2 ** (stage + 1) - 1) / total for stage in range(stages)]
    return [lr * 0.5 ** next(s for s, bound in enumerate(bounds) if n < bound - 1e-9) for n in range(steps)]


def schedule_factor(schedule: Schedule, number: int, total: int | None) -> float:
    """What the outer learning rate is multiplied with at step `number` of `total`.

    Example:
        >>> schedule_factor("cosine", 0, 10), round(schedule_factor("cosine", 5, 10), 6), schedule_factor(None, 5, None)
        (1.0, 0.5, 1.0)
    """
    if schedule is None:
        return 1.0
    if schedule == "cosine":
        assert total is not None
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, number / total)))
    return float(schedule(number))


def schedule_position(
    problem: BilevelProblem, schedule: Schedule, number: int, total_steps: int | None
) -> tuple[int, int | None]:
    """Where a schedule stands: in steps where their total is known, else by the loop's clock, which counts batches.

    Raises:
        ValueError: for a cosine of unknown length.

    Example:
        >>> from wellposed import Hyperparameter
        >>> loss = lambda w, v, b: w["w"].sum()
        >>> problem = BilevelProblem(None, loss, loss, {"w": torch.ones(1)}, {"h": Hyperparameter(1.0)})
        >>> schedule_position(problem, "cosine", 3, 10)
        (3, 10)
    """
    if schedule != "cosine" or total_steps is not None:
        return number, total_steps
    if problem.clock.total > 1:
        return problem.clock.number, problem.clock.total
    raise ValueError("schedule 'cosine' needs total_steps where step() is called by hand")


def averaged_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Mean over the processes that train together; the tensors themselves where there is one.

    Example:
        >>> averaged_over_ranks([torch.ones(2)])
        [tensor([1., 1.])]
    """
    if not distributed():
        return tensors
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([t.numel() for t in tensors])
    return [p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]
