"""Methods of the catalogue whose strengths can be learned: those whose factory takes a `Hyperparameter`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ..hyperparameter import Hyperparameter, named_hyperparameters
from ..lab.space import Range, parse_space
from ..papers.arms import Arm, load_arms
from ..regularizer import Regularizer
from .arms import from_data
from .task import Task
from .tune_parts import USUAL, Learnable, Part, Strength


def learnable_arms(task: Task) -> list[Learnable]:
    """The catalogue's methods that apply to a task and take a `Hyperparameter` for at least one of their numbers.

    They are asked, not listed: a factory that refuses a `Hyperparameter`, or forgets it, is left out.
    """
    usual = {entry.name for entry in USUAL}
    found = []
    for arm in load_arms():
        if arm.factory and task.kind in arm.tasks and arm.name not in usual:
            keys = [key for key, part in _numbers(arm).items() if _takes(arm, task, key, part)]
            if keys:
                build = partial(_build, arm=arm, keys=tuple(keys))
                found.append(Learnable(arm.name, f"{arm.label}: {', '.join(keys)}", build, arm.tasks, False))
    return found


def _numbers(arm: Arm) -> dict[str, Range]:
    space = parse_space(arm.search, owner=arm.name)
    return {key: part for key, part in space.items() if isinstance(part, Range) and not part.integer}


def _hyperparameter(arm: Arm, key: str, part: Range) -> Hyperparameter:
    start = float(part.middle())
    if not part.low < start < part.high:  # a default at the end of its range cannot be learned from
        start = float(Range(part.low, part.high, part.log).middle())
    return Hyperparameter(start, part.low, part.high, name=f"{arm.name} {key}")


def _make(arm: Arm, task: Task, own: Mapping[str, Any]) -> Regularizer:
    module, _, name = arm.factory.partition(":")
    defaults = {key: part.middle() for key, part in parse_space(arm.search, owner=arm.name).items()}
    made: Regularizer = getattr(importlib.import_module(module), name)(
        **from_data(arm, task), **arm.fixed, **{**defaults, **own}
    )
    return made


def _takes(arm: Arm, task: Task, key: str, part: Range) -> bool:
    h = _hyperparameter(arm, key, part)
    try:
        made = _make(arm, task, {key: h})
    except (TypeError, ValueError, RuntimeError):
        return False
    return any(found is h for found in named_hyperparameters(made).values())


def _build(model: nn.Module, task: Task, arm: Arm, keys: tuple[str, ...]) -> Part:
    spaces = _numbers(arm)
    own = {key: _hyperparameter(arm, key, spaces[key]) for key in keys}
    strengths = [
        Strength(f"{arm.name} {key}", h, (spaces[key].low, spaces[key].high, spaces[key].log)) for key, h in own.items()
    ]
    defaults = {key: part.middle() for key, part in parse_space(arm.search, owner=arm.name).items()}
    module, _, name = arm.factory.partition(":")

    def expression(code: Mapping[str, str]) -> str:
        learned = {key: code[f"{arm.name} {key}"] for key in keys}
        rest = {k: repr(v) for k, v in {**from_data(arm, task), **arm.fixed, **defaults}.items() if k not in keys}
        return f"{name}({', '.join(f'{k}={v}' for k, v in {**rest, **learned}.items())})"

    return Part(arm.name, _make(arm, task, own), strengths, f"from {module} import {name}", expression)
