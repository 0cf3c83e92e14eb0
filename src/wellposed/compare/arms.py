"""Arms of a comparison: which methods of the catalogue apply to a task, their search spaces, and how to build them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..lab.trial import Setting
from ..lab.tuning import Choice, Range, Space, parse_space
from ..papers.arms import Arm, load_arms
from ..regularizer import Regularizer
from .errors import UserError
from .task import Task

REFERENCE = "early-stopping"
"""Every arm is compared with this: training with tuned learning rate and weight decay, stopped on validation data."""

PLAIN = "plain"
"""The control without any regularization: not even weight decay."""

SHARED = ("learning_rate", "weight_decay", "epochs")


def applicable_arms(task: Task, names: Sequence[str] | None = None) -> list[Arm]:
    """Arms that fit the task: those named, with the reference and plain training, or all.

    Raises:
        UserError: for a name that the catalogue does not hold, or that does not fit the task.
    """
    known = {arm.name: arm for arm in load_arms()}
    fitting = [arm for arm in known.values() if task.kind in arm.tasks]
    if names is None:
        return fitting
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"no method '{name}'.{hint} Methods: {', '.join(known)}")
        if task.kind not in known[name].tasks:
            fit = ", ".join(arm.name for arm in fitting)
            raise UserError(f"'{name}' does not apply to {task.kind}. Methods that do: {fit}")
    return [arm for arm in fitting if arm.name in {*names, REFERENCE, PLAIN}]


def search_space(arm: Arm, task: Task) -> dict[str, Range | Choice]:
    """The arm's own knobs beside those that all arms share; plain training has no weight decay by definition."""
    base = default_epochs(task)
    space: dict[str, Range | Choice] = {
        "learning_rate": Range(0.005, 0.3, log=True, default=0.05),
        "weight_decay": Range(1e-5, 1e-2, log=True, default=5e-4),
        "epochs": Choice((base // 2, base), default=base),
    }
    if arm.name == PLAIN:
        del space["weight_decay"]
    own: Space = parse_space(arm.search, owner=arm.name)
    return {**space, **own}


def default_epochs(task: Task, batch_size: int = 64) -> int:
    """Epochs for about 450 optimizer steps, but at least 4 and at most 40: small data are seen more often."""
    steps = max(1, task.sizes["train"] // batch_size)
    return int(min(40, max(4, round(450 / steps) // 2 * 2)))


def build_regularizer(arm: Arm, task: Task, settings: Mapping[str, Setting]) -> Regularizer | None:
    """The arm's method with its own settings; None for plain training."""
    if not arm.factory:
        return None
    module, _, name = arm.factory.partition(":")
    own = {key: value for key, value in settings.items() if key not in SHARED}
    made: Any = getattr(importlib.import_module(module), name)(**from_data(arm, task), **arm.fixed, **own)
    if not isinstance(made, Regularizer):
        raise TypeError(f"arm {arm.name!r}: {arm.factory} is no Regularizer")
    return made


def from_data(arm: Arm, task: Task) -> dict[str, Any]:
    """The keywords of a method that the data fill in."""
    facts = {"num_examples": task.sizes["train"], "num_classes": task.num_outputs}
    return {key: facts[key] for key in arm.from_data}
