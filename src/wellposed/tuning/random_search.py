"""Random search: the baseline that every method of hyperparameter optimization must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from .search import Search
from .search_trial import SearchTrial


class RandomSearch(Search):
    """Random search (Bergstra and Bengio 2012): whole trainings at values drawn uniformly from a box.

    The first trial is the hyperparameters' initial values. A search of as many steps as one trial has is plain
    training with early stopping.

    Args:
        problem: both losses.
        steps_per_trial: training steps of a whole training.
        seed: of the proposals.
        options: see `wellposed.tuning.search.Search`: `weight_optimizer`, `boxes`, `evaluate_every`,
            `validation_batches`, `weight_scheduler`, `clip_norm`.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> weight, decay = torch.zeros(1, requires_grad=True), Hyperparameter(8.0, low=0.0, high=10.0)
        >>> inner = lambda w, v, b: (w["w"] - 1).square().sum() + v["decay"] * w["w"].square().sum()
        >>> outer = lambda w, v, b: (w["w"] - 0.5).square().sum()  # lowest at decay = 1
        >>> problem = BilevelProblem(None, inner, outer, {"w": weight}, {"decay": decay})
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.04)
        >>> search = RandomSearch(problem, steps_per_trial=50, weight_optimizer=sgd)
        >>> history = search.run([0], [0], steps=50 * 10)
        >>> len(search.trials), search.best.loss < search.trials[0].loss
        (10, True)
    """

    def __init__(self, problem: BilevelProblem, steps_per_trial: int, *, seed: int = 0, **options: Any) -> None:
        super().__init__(problem, steps_per_trial, **options)
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, history: Sequence[SearchTrial]) -> dict[str, Tensor]:
        hypers = self.problem.hypers
        return {name: box.sample(tuple(hypers[name].raw.shape), self.generator) for name, box in self.boxes.items()}

    def proposer_state(self) -> Tensor:
        return self.generator.get_state()

    def load_proposer_state(self, state: Tensor) -> None:
        self.generator.set_state(state)
