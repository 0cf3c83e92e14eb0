"""Three fine-tuning stages after the stage that learned the facts: one run at one learning rate, and what it kept.

The model of stage 0 belongs to a seed alone, so all arms share it. It is kept in memory and, between processes, in a
folder of temporary files; what is read there is bit for bit what would be computed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...batching import Batch
from ...checkpoint import CheckpointError, save_atomically
from ...continual_metrics import backward_transfer, overall_performance
from ...fit import fit
from ...regularizer import Regularizer
from ...step import DivergenceError
from .fact_table import (
    LONGEST,
    TASKS,
    VOCABULARY,
    FactTable,
    fact_table,
    knowing_model,
    stage_batches,
    stream,
    task_accuracy,
    task_sequences,
    warm_cosine,
)
from .tiny_llama import TinyLlama

BATCH, WARMUP = 32, 10

MethodOfStage = Callable[[int], Regularizer | None]
"""From the number of a stage (from 0) to its method; the same object may serve all of them."""


@dataclass(frozen=True)
class Sizes:
    """How large a problem is; smoke scale shrinks it."""

    facts: int = 300
    knowledge_steps: int = 450
    test_size: int = 1024


@dataclass
class Problem:
    """One seed: its facts, the model that knows them, and the sequences to measure with."""

    seed: int
    table: FactTable
    start: dict[str, Tensor]
    recall: float
    measured: dict[str, tuple[Tensor, Tensor]]
    _batches: dict[int, list[list[Batch]]] = field(default_factory=dict)

    def model(self) -> TinyLlama:
        """A fresh copy of the model of stage 0."""
        model = TinyLlama(VOCABULARY, LONGEST)
        model.load_state_dict(self.start)
        return model

    def batches(self, steps: int) -> list[list[Batch]]:
        """The batches of each stage; the same for all arms and learning rates."""
        if steps not in self._batches:
            self._batches = {
                steps: [
                    stage_batches(task, steps, BATCH, stream(self.seed, "train", stage))
                    for stage, task in enumerate(TASKS, 1)
                ]
            }
        return self._batches[steps]


@dataclass(frozen=True)
class Stages:
    """What one run learned and kept.

    Attributes:
        x: mean accuracy on each task right after its stage; 0 if the run diverged.
        y: recall of the facts after the last stage; 0 if the run diverged.
        x1, y1: the same after the first stage alone.
        performance, transfer: OP and BWT; NaN where only the tasks just learned were measured.
    """

    x: float = 0.0
    y: float = 0.0
    x1: float = 0.0
    y1: float = 0.0
    performance: float = 0.0
    transfer: float = 0.0


@lru_cache(maxsize=4)
def problem_of(seed: int, sizes: Sizes, testing: bool, code: str) -> Problem:
    """The problem of a seed, with validation or test sequences.

    Args:
        seed: of everything.
        sizes: of the problem.
        testing: measure on test sequences; else on those of the validation stream.
        code: fingerprint of the code: another version's temporary files are not read.
    """
    table = fact_table(seed, sizes.facts)

    def learned() -> dict[str, Any]:
        model = knowing_model(seed, table, sizes.knowledge_steps)
        return {"state": model.state_dict()}

    start = kept_between_processes(["stage 0", seed, sizes.facts, sizes.knowledge_steps, code], learned)["state"]
    name = "test" if testing else "validation"
    measured = {
        task: task_sequences(task, sizes.test_size, stream(seed, name, stage)) for stage, task in enumerate(TASKS, 1)
    }
    problem = Problem(seed, table, start, 0.0, measured)
    problem.recall = table.recall(problem.model())
    return problem


def run_stages(
    problem: Problem, method_of: MethodOfStage, learning_rate: float, weight_decay: float, steps: int, all_tasks: bool
) -> Stages:
    """Fine-tune the model of stage 0 on the three tasks, one after the other.

    Args:
        problem: of the seed.
        method_of: the method of each stage.
        learning_rate, weight_decay: of AdamW; a new optimizer in every stage.
        steps: in each stage; 10 of them warm up, then half a cosine.
        all_tasks: also measure the tasks of earlier stages, for overall performance and backward transfer.
    """
    model: Any = problem.model()
    names = list(TASKS)
    scores = torch.full((len(names), len(names)), math.nan, dtype=torch.float64)
    found = Stages()
    for stage, batches in enumerate(problem.batches(steps)):
        try:
            model = fit(
                model,
                batches,
                epochs=1,
                regularizer=method_of(stage),
                optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay, fused=True),
                scheduler=partial(warm_cosine, warmup=min(WARMUP, steps)),
                seed=problem.seed,
            ).model
        except DivergenceError:
            return Stages(x1=found.x1, y1=found.y1)
        for task in range(0 if all_tasks else stage, stage + 1):
            scores[stage, task] = task_accuracy(model, *problem.measured[names[task]])
        if stage == 0:
            found = Stages(x1=float(scores[0, 0]), y1=problem.table.recall(model))
    return Stages(
        float(scores.diagonal().mean()),
        problem.table.recall(model),
        found.x1,
        found.y1,
        overall_performance(scores) if all_tasks else math.nan,
        backward_transfer(scores, over="all") if all_tasks else math.nan,
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, from the smallest x to the largest.

    Example:
        >>> pareto_front([(0.0, 1.0), (0.5, 0.4), (0.4, 0.3), (0.9, 0.1)])
        [(0.0, 1.0), (0.5, 0.4), (0.9, 0.1)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def kept_at(points: Sequence[tuple[float, float]], learned: Sequence[float]) -> list[float]:
    """What an arm keeps when it has learned so much: linear between the points of its front, 0 beyond the last.

    Example:
        >>> [round(y, 6) for y in kept_at([(0.0, 1.0), (0.8, 0.2)], [0.4, 0.8, 0.9])]
        [0.6, 0.2, 0.0]
    """
    front = pareto_front(points)
    found = []
    for t in learned:
        right = next((i for i, (x, _) in enumerate(front) if x >= t), None)
        if right is None:
            found.append(0.0)
        elif right == 0:
            found.append(front[0][1])
        else:
            (x0, y0), (x1, y1) = front[right - 1], front[right]
            found.append(y0 + (y1 - y0) * ((t - x0) / (x1 - x0)))
    return found


def kept_between_processes(key: Sequence[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` returns, from a temporary file if one holds it already; the result does not depend on which.

    A file that cannot be read or written costs the time to compute, and nothing else.
    """
    digest = hashlib.sha256(json.dumps([torch.__version__, *key]).encode()).hexdigest()
    path = temporary_folder() / f"{digest[:32]}.pt"
    try:
        return dict(torch.load(path, weights_only=True))
    except Exception:  # no such file, or one that is damaged
        found = compute()
    try:
        save_atomically(found, path)
    except (CheckpointError, OSError):
        return found
    return found


def temporary_folder() -> Path:
    """Where results that processes share lie: one folder a user."""
    return Path(tempfile.gettempdir()) / f"wellposed-{getattr(os, 'getuid', lambda: 0)()}"


def settings_key(settings: Mapping[str, Any]) -> list[Any]:
    """Settings as JSON holds them, in one order, equal numbers alike."""
    return [[name, float(v) if isinstance(v, (int, float)) else v] for name, v in sorted(settings.items())]
