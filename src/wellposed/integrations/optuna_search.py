"""`OptunaSearch`: whole trainings at what an Optuna sampler proposes, with an optional pruner."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState
from torch import Tensor

from ..bilevel import BilevelProblem
from ..tuning.search import Search
from ..tuning.search_box import Box
from ..tuning.search_trial import SearchTrial

SAMPLERS = ("tpe", "random")
PRUNERS = ("halving", "median")
REDUCTION = 3
"""Successive halving lets one trial in three go on, from a ninth of a training to a third to the whole."""


class OptunaSearch(Search):
    """Bayesian optimization as most people run it: whole trainings, proposed by Optuna (Akiba et al. 2019).

    The first trial is the hyperparameters' initial values, and Optuna learns from it. Each entry of a hyperparameter
    with a shape is a parameter of its own; a trial that diverges is told as pruned, so that samplers move away from it.

    Args:
        problem: both losses.
        steps_per_trial: training steps of a whole training.
        sampler: "tpe" (the tree-structured Parzen estimator), "random", or any Optuna sampler. A grid must have more
            points than the search has trials: Optuna's raises an error at its last.
        pruner: None, "halving" (asynchronous successive halving), "median", or any Optuna pruner; it is asked after
            every evaluation, and counts in training steps.
        startup_trials: random trials before "tpe" has a model; Optuna's own 10 would be a whole search of trainings.
        seed: of the samplers called by name.
        options: see `wellposed.tuning.search.Search`: `weight_optimizer`, `boxes`, `evaluate_every`,
            `validation_batches`, `weight_scheduler`, `clip_norm`.

    Attributes:
        study: Optuna's, for its importances and plots.

    Raises:
        ValueError: for an unknown sampler or pruner, or a pruner without evaluations inside a trial.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> weight, decay = torch.zeros(1, requires_grad=True), Hyperparameter(8.0, low=0.0, high=10.0)
        >>> inner = lambda w, v, b: (w["w"] - 1).square().sum() + v["decay"] * w["w"].square().sum()
        >>> outer = lambda w, v, b: (w["w"] - 0.5).square().sum()  # lowest at decay = 1
        >>> problem = BilevelProblem(None, inner, outer, {"w": weight}, {"decay": decay})
        >>> sgd = lambda groups: torch.optim.SGD(groups, lr=0.04)
        >>> search = OptunaSearch(problem, steps_per_trial=20, weight_optimizer=sgd)
        >>> history = search.run([0], [0], steps=20 * 10)
        >>> len(search.study.trials), search.best.loss < search.trials[0].loss
        (10, True)
    """

    def __init__(
        self,
        problem: BilevelProblem,
        steps_per_trial: int,
        *,
        sampler: str | BaseSampler = "tpe",
        pruner: str | BasePruner | None = None,
        startup_trials: int = 4,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(problem, steps_per_trial, **options)
        if pruner is not None and self.evaluate_every >= steps_per_trial:
            raise ValueError(
                f"OptunaSearch: pruner needs evaluations inside a trial; give evaluate_every below steps_per_trial = "
                f"{steps_per_trial}, got {self.evaluate_every}"
            )
        if startup_trials < 1:
            raise ValueError(f"OptunaSearch: startup_trials must be >= 1, got {startup_trials}")
        chosen_sampler = _sampler(sampler, seed, startup_trials)
        with _quiet():
            self.study = optuna.create_study(
                direction="minimize",
                sampler=chosen_sampler,
                pruner=_pruner(pruner, steps_per_trial, self.evaluate_every),
            )
        self.distributions: dict[str, BaseDistribution] = {}
        for name, h in problem.hypers.items():
            for key in _keys(name, h.raw):
                self.distributions[key] = _distribution(self.boxes[name])
        self._asked: Trial | None = None
        self._reported = 0

    def propose(self, history: Sequence[SearchTrial]) -> dict[str, Tensor]:
        found = self._ask().params
        return {
            name: torch.tensor([found[key] for key in _keys(name, h.raw)], dtype=torch.float64).reshape(h.raw.shape)
            for name, h in self.problem.hypers.items()
        }

    def prune(self, trial: SearchTrial) -> bool:
        return self._report(trial).should_prune()

    def observe(self, trial: SearchTrial) -> None:
        asked = self._report(trial)
        if trial.status == "finished":
            self.study.tell(asked, trial.loss)
        else:
            self.study.tell(asked, state=TrialState.PRUNED)
        self._asked = None

    def _ask(self) -> Trial:
        self._asked, self._reported = self.study.ask(self.distributions), 0
        return self._asked

    def _report(self, trial: SearchTrial) -> Trial:
        """Optuna's side of a trial, told of all evaluations so far."""
        asked = self._asked
        if asked is None:  # the first trial, which nobody proposed
            self.study.enqueue_trial(self._parameters(trial))
            asked = self._ask()
        for steps, loss in trial.losses[self._reported :]:
            asked.report(loss, steps)
        self._reported = len(trial.losses)
        return asked

    def _parameters(self, trial: SearchTrial) -> dict[str, float | int]:
        found: dict[str, float | int] = {}
        for name, values in trial.values.items():
            box = self.boxes[name]
            for key, value in zip(_keys(name, values), values.double().reshape(-1).tolist(), strict=True):
                # What went through a chart and back may lie outside by a rounding.
                inside = min(max(value, box.low), box.high)
                found[key] = int(inside) if box.discrete else inside
        return found

    def proposer_state(self) -> Any:
        # One pickle, so that the trial asked for stays one of this study; its sampler's random numbers are inside.
        return pickle.dumps((self.study, self._asked)), self._reported

    def load_proposer_state(self, state: Any) -> None:
        self.study, self._asked = pickle.loads(state[0])
        self._reported = state[1]


def _sampler(sampler: str | BaseSampler, seed: int, startup: int) -> BaseSampler:
    if isinstance(sampler, BaseSampler):
        return sampler
    if sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup)
    if sampler == "random":
        return RandomSampler(seed=seed)
    raise ValueError(f"OptunaSearch: sampler must be one of {list(SAMPLERS)} or an Optuna sampler, got {sampler!r}")


def _pruner(pruner: str | BasePruner | None, steps: int, every: int) -> BasePruner:
    if isinstance(pruner, BasePruner):
        return pruner
    if pruner is None:
        return NopPruner()
    if pruner == "median":
        return MedianPruner()
    if pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=max(every, steps // REDUCTION**2), reduction_factor=REDUCTION)
    raise ValueError(f"OptunaSearch: pruner must be None, one of {list(PRUNERS)} or an Optuna pruner, got {pruner!r}")


def _distribution(box: Box) -> BaseDistribution:
    if box.discrete:
        return IntDistribution(int(box.low), int(box.high), log=box.log)
    return FloatDistribution(box.low, box.high, log=box.log)


def _keys(name: str, values: Tensor) -> list[str]:
    """Names of a hyperparameter's entries, as Optuna shows them."""
    if values.ndim == 0:
        return [name]
    return [f"{name}[{i}]" for i in range(values.numel())]


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces every study; inside the block it does not, and the caller's own setting stays."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
