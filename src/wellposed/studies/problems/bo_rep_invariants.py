"""BO-REP's exact properties on the closed-form problem: the length of a step, and indifference to the outer loss's scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...lab.verdicts import Case
from ...tuning import BOREP
from .unbounded_smoothness import CoshProblem, noise_stream

RADII, SCALES, DRAWS, STEPS, OUTER_LR = (1.0, 4.0, 8.0), (1e-3, 1e3), 5, 100, 0.05


class ScaledCoshProblem(CoshProblem):
    """The closed-form problem with F multiplied by `scale`, its noise included."""

    def __init__(self, seeds: list[int], radius: float, scale: float) -> None:
        super().__init__(seeds, radius)
        self.scale = scale

    def outer_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        value, by_y, by_x = super().outer_grads(batch)
        return self.scale * value, {"y": self.scale * by_y["y"]}, {"x": self.scale * by_x["x"]}


def trajectory(seeds: list[int], radius: float, scale: float = 1.0) -> tuple[Tensor, Tensor, BOREP]:
    """Paths of x and y over `STEPS` steps, (steps + 1, draws, 10), and the tuner at their end."""
    problem = ScaledCoshProblem(seeds, radius, scale)
    tuner = BOREP(problem, OUTER_LR, 0.5, 0.5, independent=1)
    train, validation = noise_stream(seeds, 0), noise_stream(seeds, 1)
    tuner.refine(train)
    x, y = problem.hypers["x"].raw, problem.params["y"]
    paths: list[tuple[Tensor, Tensor]] = [(x.clone(), y.detach().clone())]
    for _ in range(STEPS):
        tuner.step(train, validation)
        paths.append((x.clone(), y.detach().clone()))
    return torch.stack([x for x, _ in paths]), torch.stack([y for _, y in paths]), tuner


def step_and_scale() -> list[Case]:
    """Every step has length outer_lr once the momentum is not zero; F -> c F moves neither path."""
    cases = []
    for radius in RADII:
        paths = {scale: trajectory(list(range(DRAWS)), radius, scale)[:2] for scale in (1.0, *SCALES)}
        for draw in range(DRAWS):
            own = [path[:, draw] for path in paths[1.0]]
            # z starts at 0, and F has no direct gradient: the momentum of the first step is zero, and nothing moves.
            lengths = (own[0][2:] - own[0][1:-1]).norm(dim=-1)
            error = float((lengths / OUTER_LR - 1.0).abs().max())
            cases.append(Case(f"step length, r = {radius:g}, draw {draw}", error, 1e-6))
            for scale in SCALES:
                error = max(
                    float((path - other[:, draw]).abs().max() / path.abs().max())
                    for path, other in zip(own, paths[scale], strict=True)
                )
                cases.append(Case(f"F times {scale:g}, r = {radius:g}, draw {draw}", error, 1e-5))
    return cases
