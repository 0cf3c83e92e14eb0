"""Searches of the eight strengths of `regularized_digits` within a budget of plain training steps.

Every search tries the initial strengths first: random points of an eight-dimensional box are far worse than doing
nothing, and a search without that trial would be no rival.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import optuna

from ...step import DivergenceError
from .regularized_digits import DECAYS, EVALUATE_EVERY, INITIAL, NAMES, RANGES, Perceptron, RegularizedDigits

REDUCTION = 3
STARTUP_TRIALS = 3


@dataclass
class Found:
    """What a search leaves.

    Attributes:
        run: the one with the lowest validation loss.
        strengths: its own.
        trials: how many were tried.
        units: plain steps taken.
        spent, validation: the lowest validation loss so far, over the plain steps taken.
    """

    run: Perceptron
    strengths: Mapping[str, float]
    trials: int
    units: int
    spent: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


class _Search:
    """Proposals, runs, and what they have cost."""

    def __init__(
        self, problem: RegularizedDigits, seed: int, learning_rate: float, sampler: optuna.samplers.BaseSampler
    ) -> None:
        self.problem, self.seed, self.learning_rate = problem, seed, learning_rate
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self.study.enqueue_trial(dict(INITIAL))
        self.runs: list[tuple[Perceptron, dict[str, float], optuna.trial.Trial]] = []
        self.units = 0
        self.spent: list[float] = []
        self.validation: list[float] = []

    def propose(self) -> tuple[Perceptron, dict[str, float], optuna.trial.Trial]:
        """A new run under newly proposed strengths."""
        trial = self.study.ask()
        strengths = {n: trial.suggest_float(n, *RANGES[n], log=n in DECAYS) for n in NAMES}
        run = Perceptron(self.problem, self.seed, self.learning_rate, draw=len(self.runs))
        self.runs.append((run, strengths, trial))
        return self.runs[-1]

    def advance(self, run: Perceptron, strengths: Mapping[str, float], steps: int) -> None:
        """Train one of the runs on; a run that has diverged keeps its price."""
        while steps > 0:
            part = min(steps, EVALUATE_EVERY - run.steps % EVALUATE_EVERY)
            run.train(part, strengths)
            steps -= part
            self.units += part
            self.spent.append(float(self.units))
            self.validation.append(min(r.validation for r, _, _ in self.runs))

    def found(self) -> Found:
        """The best of all runs.

        Raises:
            DivergenceError: if every run diverged.
        """
        run, strengths, _ = min(self.runs, key=lambda entry: entry[0].validation)
        if run.diverged or not run.best[1]:
            raise DivergenceError("every run of the search diverged")
        return Found(run, strengths, len(self.runs), self.units, self.spent, self.validation)


def sequential_search(
    problem: RegularizedDigits,
    seed: int,
    learning_rate: float,
    steps: int,
    budget: int,
    sampler: Callable[[int], optuna.samplers.BaseSampler],
) -> Found:
    """As many runs of `steps` steps as the budget holds, one after another.

    Args:
        problem: the data.
        seed: of the proposals and the runs.
        learning_rate: of all runs.
        steps: of each run.
        budget: plain steps in all.
        sampler: e.g. `optuna.samplers.RandomSampler`, called with the seed.
    """
    search = _Search(problem, seed, learning_rate, sampler(seed))
    for _ in range(max(1, budget // steps)):
        run, strengths, trial = search.propose()
        search.advance(run, strengths, steps)
        search.study.tell(trial, run.validation)
    return search.found()


def successive_halving(problem: RegularizedDigits, seed: int, learning_rate: float, steps: int, budget: int) -> Found:
    """Successive halving (Jamieson and Talwalkar 2016): random strengths, of which a third goes on at each rung.

    Rungs at a ninth, a third and all of `steps`; as many strengths as the budget holds.
    """
    rungs = rung_steps(steps)
    search = _Search(problem, seed, learning_rate, optuna.samplers.RandomSampler(seed))
    alive = [search.propose() for _ in range(bracket_size(steps, budget))]
    for number, rung in enumerate(rungs):
        for run, strengths, _ in alive:
            search.advance(run, strengths, rung - run.steps)
        alive.sort(key=lambda entry: entry[0].validation)
        alive = alive[: max(1, len(alive) // REDUCTION)] if number < len(rungs) - 1 else alive
    return search.found()


def rung_steps(steps: int) -> tuple[int, int, int]:
    """Where a third goes on, and the end.

    Example:
        >>> rung_steps(1500)
        (167, 500, 1500)
    """
    return round(steps / REDUCTION**2), round(steps / REDUCTION), steps


def bracket_size(steps: int, budget: int) -> int:
    """Strengths with which halving can begin, such that it costs at most `budget` plain steps; at least one.

    Example:
        >>> bracket_size(1500, 3540), bracket_size(1500, 4350)
        (9, 12)
    """
    first, second, last = rung_steps(steps)

    def cost(size: int) -> int:
        thirds = max(1, size // REDUCTION)
        ninths = max(1, thirds // REDUCTION)
        return size * first + thirds * (second - first) + ninths * (last - second)

    size = 1
    while cost(size + 1) <= budget:
        size += 1
    return size


def random_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Independent proposals."""
    return optuna.samplers.RandomSampler(seed)


def tpe_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's default, a tree-structured Parzen estimator, after `STARTUP_TRIALS` random proposals."""
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
