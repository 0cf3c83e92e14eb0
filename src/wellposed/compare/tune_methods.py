"""How each method of `wellposed tune` trains a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..bilevel import BilevelProblem
from ..tuner import Tuner
from .tune_options import APPLIED, UNTUNED
from .tune_plan import Plan

LEARNING_RATE = 0.05
CLIP_NORM = 5.0


def cosine(progress: float) -> float:
    """The learning rate's factor at a share of training: from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Pace:
    """How long a training is.

    Attributes:
        steps_per_epoch: training batches in an epoch.
        epochs: of one training.
    """

    steps_per_epoch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Training batches in one training."""
        return self.steps_per_epoch * self.epochs

    def factor(self, epoch: int) -> float:
        """The learning rate's factor in an epoch: the same for every method, whatever its steps are."""
        return cosine(epoch / self.epochs)


class Descent:
    """Makes SGD with momentum, as `wellposed compare` trains, and lowers its learning rate epoch by epoch.

    Args:
        pace: of the training.
        make: makes another optimizer.
    """

    def __init__(self, pace: Pace, make: Callable[[Any], Optimizer] | None = None) -> None:
        self.pace, self.make = pace, make
        self.optimizer: Optimizer | None = None

    def __call__(self, groups: Any) -> Optimizer:
        if self.make is not None:
            self.optimizer = self.make(groups)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True)
        return self.optimizer

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rates of an epoch."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            first = group.setdefault("first_lr", group["lr"])
            group["lr"] = first * self.pace.factor(epoch)


def make_tuner(
    method: str, plan: Plan, pace: Pace, descent: Descent, seed: int, rehearsal: bool = False
) -> Callable[[BilevelProblem], Tuner]:
    """What `fit(tuner=...)` takes.

    Args:
        method: name, or "untuned" or "applied".
        plan: what is learned.
        pace: of one training.
        descent: makes the optimizer; whoever trains lowers its learning rate, unless the tuner does.
        seed: of the proposals and perturbations.
        rehearsal: whether every kind of step must come within the first batches.
    """

    def search(kind: Callable[..., Tuner], problem: BilevelProblem) -> Tuner:
        return kind(
            problem,
            steps_per_trial=pace.steps,
            weight_optimizer=descent,
            weight_scheduler=lambda o, steps: LambdaLR(o, lambda step: pace.factor(step // pace.steps_per_epoch)),
            evaluate_every=pace.steps_per_epoch,
            boxes=plan.boxes(problem),
            clip_norm=CLIP_NORM,
            seed=seed,
        )

    from .. import tuning

    if method in ("random", UNTUNED, APPLIED):
        return partial(search, tuning.RandomSearch)
    if method == "tpe":
        from ..integrations import OptunaSearch

        return partial(search, OptunaSearch)
    if method in ("stn", "delta-stn"):
        return partial(
            tuning.SelfTuner, weight_optimizer=descent, delta=method == "delta-stn", clip_norm=CLIP_NORM, seed=seed,
            **(SELF_TUNING | ({"train_steps": 1} if rehearsal else {"warmup_steps": WARM_UP * pace.steps // 100})),
        )  # fmt: skip
    if method == "bo-rep":
        first = 1 if rehearsal else WARM_UP * pace.steps // 100
        return partial(tuning.BOREP, inner_optimizer=descent, refine_steps=first, **BILEVEL)
    raise ValueError(f"make_tuner: no method {method!r} trains a network")


WARM_UP = 10
"""Per cent of a training before hyperparameters move."""

SELF_TUNING: dict[str, Any] = {
    "hyper_optimizer": partial(torch.optim.RMSprop, lr=0.01),
    "train_steps": 5,
    "scale": 1.0,
    "tune_scales": True,
    "tau": 1e-3,
}
BILEVEL: dict[str, Any] = {"outer_lr": 0.05, "inner_lr": LEARNING_RATE, "z_lr": 0.02, "schedule": "cosine"}
