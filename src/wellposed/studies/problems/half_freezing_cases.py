"""What is exactly true of half fine-tuning: frozen is frozen bit for bit, and a penalty on the frozen half bounds it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lab.study import Case
from ...weights.half_fine_tuning import STRATEGIES, HalfFineTuning
from .fact_table import LONGEST, VOCABULARY, stage_batches, stream
from .tiny_llama import TinyLlama

STEPS, DECAY = 50, 0.1
DIMENSION, DRAWS = 8, 20
STRENGTHS = (0.0, 1.0, 10.0, 1e3, 1e6)


def frozen_cases() -> list[Case]:
    """Largest movement of a frozen scalar over 50 steps of AdamW with weight decay 0.1; infinite if all stood still."""
    return [
        Case(f"{strategy}, zero_grad(set_to_none={to_none})", frozen_movement(strategy, to_none), 0.0)
        for strategy in STRATEGIES
        for to_none in (True, False)
    ]


def frozen_movement(strategy: str, to_none: bool, steps: int = STEPS) -> float:
    """How far frozen scalars move in a plain loop that gives the optimizer ALL parameters, with old gradients left."""
    model = TinyLlama(VOCABULARY, LONGEST, width=8, heads=2, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=DECAY, fused=True)
    batches = stage_batches("shift", steps + 1, 4, stream(0, "train"))
    method = HalfFineTuning(strategy=strategy, seed=1)  # type: ignore[arg-type]
    _backward(model, batches[0])
    optimizer.step()  # momentum, and gradients left behind, from before the freeze
    method.new_stage(model, optimizer, force=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in batches[1:]:
        optimizer.zero_grad(set_to_none=to_none)
        _backward(model, batch)
        optimizer.step()
    moved = still = 0.0
    for name, p in model.named_parameters():
        mask, change = method.mask()[name], (p.detach() - start[name]).abs()
        trains = mask if isinstance(mask, Tensor) else torch.full_like(change, mask, dtype=torch.bool)
        moved = max(moved, float(change[~trains].max()) if bool((~trains).any()) else 0.0)
        still += float(change[trains].sum())
    return moved if still > 0 else float("inf")


def _backward(model: TinyLlama, batch: object) -> None:
    inputs, targets = batch.inputs, batch.targets  # type: ignore[attr-defined]
    F.cross_entropy(model(*inputs).transpose(1, 2), targets).backward()


def bound_cases() -> list[Case]:
    """Per draw of a quadratic: the penalised optimum falls nowhere, stays below the optimum of HFT, and reaches it."""
    cases = []
    for draw in range(DRAWS):
        hessian, target, start, trains = quadratic(draw)
        half = half_tuned_loss(hessian, target, start, trains)
        values = [penalised_loss(hessian, target, start, trains, strength) for strength in STRENGTHS]
        falls = max(0.0, *(float(a - b) for a, b in zip(values, values[1:], strict=False)))
        above = max(0.0, *(float(value - half) for value in values))
        cases += [
            Case(f"draw {draw}: fall of the penalised optimum as lambda grows", falls, 1e-9),
            Case(f"draw {draw}: excess over the optimum of HFT", above, 1e-9),
            Case(f"draw {draw}: relative gap at lambda = 1e6", float((half - values[-1]).abs() / half), 1e-4),
        ]
    return cases


def quadratic(draw: int, dimension: int = DIMENSION) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`1/2 (theta - t)' A (theta - t)`: A, t, the start of the stage, and which half of the coordinates trains (float64)."""
    generator = torch.Generator().manual_seed(draw)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    root = normal(dimension, dimension)
    trains = torch.zeros(dimension, dtype=torch.bool)
    trains[torch.randperm(dimension, generator=generator)[: dimension // 2]] = True
    return root @ root.T + torch.eye(dimension, dtype=torch.float64), normal(dimension), normal(dimension), trains


def half_tuned_loss(hessian: Tensor, target: Tensor, start: Tensor, trains: Tensor) -> Tensor:
    """Loss where the trainable half is optimal: `1/2 d' (A_PP - A_PF A_FF^-1 A_FP) d`, d = start - t on the frozen half."""
    f, p = trains, ~trains
    distance = (start - target)[p]
    schur = hessian[p][:, p] - hessian[p][:, f] @ torch.linalg.solve(hessian[f][:, f], hessian[f][:, p])
    return 0.5 * distance @ schur @ distance


def penalised_loss(hessian: Tensor, target: Tensor, start: Tensor, trains: Tensor, strength: float) -> Tensor:
    """Least `L(theta) + strength ||theta - start||^2`, the distance taken over the frozen half alone."""
    theta = penalised_minimum(hessian, target, start, trains, strength)
    penalty = (theta - start)[~trains].square().sum()
    return 0.5 * (theta - target) @ hessian @ (theta - target) + strength * penalty


def penalised_minimum(hessian: Tensor, target: Tensor, start: Tensor, trains: Tensor, strength: float) -> Tensor:
    """Where it is least."""
    weight = 2.0 * strength * (~trains).to(hessian)
    return torch.linalg.solve(hessian + torch.diag(weight), hessian @ target + weight * start)
