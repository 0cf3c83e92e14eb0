"""How a published network is trained: SGD with a warm-up and milestones, read from a trial's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum 0.9, a linear warm-up, then the learning rate cut at milestones.

    Attributes:
        epochs: after the warm-up.
        batch_size: examples a step.
        learning_rate, weight_decay: of SGD.
        milestones: epochs after the warm-up at which the learning rate is multiplied by `gamma`.
        gamma: factor.
        warmup_epochs: epochs before, in which the learning rate grows from 0.
        nesterov: momentum of Nesterov's kind.
        drop_last: leave out a last, smaller batch.
        decay_on: "all" parameters; "weights" of convolutions and linear layers; or "method": the method decays.
        bf16: train under bfloat16 autocast.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    nesterov: bool = False
    drop_last: bool = False
    decay_on: str = "all"
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.warmup_epochs < 0:
            raise ValueError(
                "Recipe: epochs and batch_size must be >= 1 and warmup_epochs >= 0, got "
                f"{self.epochs}, {self.batch_size} and {self.warmup_epochs}"
            )
        if self.decay_on not in ("all", "weights", "method"):
            raise ValueError(f"Recipe: decay_on must be 'all', 'weights' or 'method', got {self.decay_on!r}")

    @classmethod
    def read(cls, settings: Mapping[str, Any], prefix: str = "") -> Recipe:
        """From a trial's settings; a setting with the prefix (of a second stage) goes before one without.

        Example:
            >>> settings = dict(epochs=9, batch_size=128, learning_rate=0.1, weight_decay=5e-4, milestones="3, 6")
            >>> Recipe.read({**settings, "stage2_epochs": 5}, "stage2_").epochs, Recipe.read(settings).milestones
            (5, (3, 6))
        """
        found: dict[str, Any] = {}
        for name, kind in cls._kinds().items():
            value = settings.get(prefix + name, settings.get(name))
            if value is not None:
                found[name] = kind(value)
        if missing := [n for n in ("epochs", "batch_size", "learning_rate", "weight_decay") if n not in found]:
            raise ValueError(f"Recipe: the setting {missing[0]!r} is missing")
        return cls(**found)

    @staticmethod
    def _kinds() -> dict[str, Callable[[Any], Any]]:
        return {
            "epochs": int,
            "batch_size": int,
            "learning_rate": float,
            "weight_decay": float,
            "milestones": _numbers,
            "gamma": float,
            "warmup_epochs": int,
            "nesterov": bool,
            "drop_last": bool,
            "decay_on": str,
            "bf16": bool,
        }

    @property
    def all_epochs(self) -> int:
        """Epochs with those of the warm-up."""
        return self.warmup_epochs + self.epochs

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """By what the learning rate is multiplied at an optimizer step.

        Example:
            >>> recipe = Recipe(4, 128, 0.1, 0.0, milestones=(2, 3), gamma=0.1, warmup_epochs=1)
            >>> [round(recipe.factor(step, 2), 4) for step in range(10)]
            [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
        """
        warm = self.warmup_epochs * steps_per_epoch
        if step < warm:
            return (step + 1) / warm
        epoch = (step - warm) // steps_per_epoch
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)

    def schedule(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """For `fit(scheduler=)`."""
        return LambdaLR(optimizer, partial(self.factor, steps_per_epoch=total // self.all_epochs))


def _numbers(text: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text).split(",") if part.strip())
