"""Tuning under an equal budget: as many trials for every arm, on data and seeds that evaluation never sees."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import optuna

from .space import Choice, Range, Space, parse_space
from .trial import FIRST_EVALUATION_SEED, Outcome, Setting, Trial

__all__ = ["Choice", "Range", "Space", "Tuned", "TuningError", "mean_score", "parse_space", "seconds_left", "tune_arms"]

optuna.logging.set_verbosity(optuna.logging.WARNING)


class TuningError(RuntimeError):
    """No configuration of an arm could be run."""


@dataclass
class Tuned:
    """What tuning found for an arm.

    Attributes:
        settings: the best configuration.
        score: its mean score over the tuning seeds (higher is better).
        history: every configuration tried, with its score (None where a seed failed or diverged, which
            counts as worse than any score).
    """

    settings: dict[str, Setting]
    score: float
    history: list[tuple[dict[str, Setting], float | None]] = field(default_factory=list)


RunBatch = Callable[[list[Trial]], Sequence[Outcome | None]]


def tune_arms(
    spaces: Mapping[str, Space],
    make_trial: Callable[[str, dict[str, Setting], int], Trial],
    run: RunBatch,
    *,
    rounds: int | Mapping[str, int],
    seeds: Sequence[int] = (0,),
    score: str | Mapping[str, str] = "score",
    sampler_seed: int = 0,
    sampler: Literal["tpe", "random"] = "tpe",
    keep_going: Callable[[int], bool] = lambda done: True,
) -> dict[str, Tuned]:
    """Tune all arms side by side, `rounds` configurations each; the first is every arm's default.

    In every round each arm proposes one configuration (Optuna's TPE sampler, one study an arm, seeded), all of them
    run on all tuning seeds, and each arm learns its score. So arms always have equally many trials, whenever time
    runs out, the result does not depend on the number of workers, and a killed run repeats its proposals and finds
    their outcomes in the store.

    Args:
        spaces: search space of each arm; an empty space is tried once.
        make_trial: `(arm, settings, seed) -> Trial`.
        run: runs trials and returns their outcomes in order.
        rounds: configurations an arm, at least 1; a mapping gives each arm its own number.
        seeds: tuning seeds, below 1000.
        score: metric to maximise, averaged over the seeds; a mapping gives each arm its own.
        sampler_seed: of the proposals.
        sampler: how they are made; "random" does not look at the scores.
        keep_going: asked after each round with the number of rounds done; False ends tuning for all arms.

    Raises:
        ValueError: for rounds < 1, a seed that belongs to evaluation, or a trial without the metric `score`.
        TuningError: if no configuration of an arm could be run, with the last traceback.
    """
    budget = dict.fromkeys(spaces, rounds) if isinstance(rounds, int) else dict(rounds)
    scores = dict.fromkeys(spaces, score) if isinstance(score, str) else dict(score)
    if any(count < 1 for count in budget.values()):
        raise ValueError(f"tune_arms: rounds must be >= 1, got {rounds}")
    if not seeds or any(seed >= FIRST_EVALUATION_SEED for seed in seeds):
        raise ValueError(f"tune_arms: seeds must lie below {FIRST_EVALUATION_SEED}, got {list(seeds)}")
    searches = {arm: _Search(space, sampler_seed, sampler) for arm, space in spaces.items()}
    for number in range(max(budget.values(), default=0)):
        asked = {arm: search.ask() for arm, search in searches.items() if number < budget[arm]}
        trials = [make_trial(arm, s, seed) for arm, s in asked.items() if s is not None for seed in seeds]
        outcomes = dict(zip((t.key for t in trials), run(trials), strict=True))
        complete = all(outcome is not None for outcome in outcomes.values())
        if not complete and number > 0:
            break  # the deadline came inside this round: no arm learns from it
        for arm, settings in asked.items():
            if settings is not None:
                found = [outcomes[make_trial(arm, settings, seed).key] for seed in seeds]
                searches[arm].tell(found, scores[arm])
        if not complete or not keep_going(number + 1):
            break
    return {arm: search.best(arm) for arm, search in searches.items()}


class _Search:
    """Optuna's ask and tell for one arm."""

    def __init__(self, space: Space, seed: int, sampler: str) -> None:
        self.space = space
        chosen: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        if sampler == "random":
            chosen = optuna.samplers.RandomSampler(seed=seed)
        self.study = optuna.create_study(direction="maximize", sampler=chosen)
        self.study.enqueue_trial({name: part.middle() for name, part in space.items()})
        self.history: list[tuple[dict[str, Setting], float | None]] = []
        self.error: str | None = None

    def ask(self) -> dict[str, Setting] | None:
        if not self.space and self.history:
            return None
        self.asked = self.study.ask()
        self.settings = {name: _suggest(self.asked, name, part) for name, part in self.space.items()}
        return self.settings

    def tell(self, outcomes: Sequence[Outcome | None], score: str) -> None:
        self.error = next((o.error for o in outcomes if o is not None and o.error), self.error)
        mean = mean_score(outcomes, score)
        self.history.append((dict(self.settings), mean))
        if mean is None:
            # Optuna forgets trials that fail, but ranks pruned ones behind all others: a configuration that diverges
            # is a bad one, and the sampler must move away from it.
            self.study.tell(self.asked, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(self.asked, mean)

    def best(self, arm: str) -> Tuned:
        finished = [(s, settings) for settings, s in self.history if s is not None]
        if not finished:
            why = f"the last error was:\n{self.error}" if self.error else "time ran out before the first was done"
            raise TuningError(f"no configuration of arm {arm!r} could be run; {why}")
        value, settings = max(finished, key=lambda pair: pair[0])
        return Tuned(settings, value, self.history)


def mean_score(outcomes: Sequence[Outcome | None], score: str) -> float | None:
    """Mean over the seeds; None, the worst, if any seed failed or diverged."""
    values = []
    for outcome in outcomes:
        if outcome is None or outcome.status != "finished":
            return None
        if score not in outcome.metrics:
            raise ValueError(f"tune_arms: a trial has no metric {score!r}; it has {sorted(outcome.metrics)}")
        values.append(outcome.metrics[score])
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


def _suggest(trial: optuna.trial.Trial, name: str, part: Range | Choice) -> Setting:
    if isinstance(part, Choice):
        return cast(Setting, trial.suggest_categorical(name, part.choices))
    if part.integer:
        return trial.suggest_int(name, int(part.low), int(part.high), log=part.log)
    return trial.suggest_float(name, part.low, part.high, log=part.log)


def seconds_left(deadline: float | None) -> float:
    """Seconds until a `time.monotonic()` deadline; infinite without one."""
    return math.inf if deadline is None else deadline - time.monotonic()
