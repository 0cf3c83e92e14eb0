"""Tuning under an equal budget: as many trials for every arm, on data and seeds that evaluation never sees."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import optuna

from .trial import FIRST_EVALUATION_SEED, Outcome, Setting, Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

_KEYS = {"low", "high", "log", "integer", "choices", "default"}


@dataclass(frozen=True)
class Range:
    """Numbers between `low` and `high`, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    default: Setting | None = None

    def suggest(self, trial: optuna.trial.Trial, name: str) -> Setting:
        """Ask Optuna for a value."""
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def middle(self) -> Setting:
        """The default, or the middle of the range on its scale."""
        if self.default is not None:
            return self.default
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(value) if self.integer else value


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    choices: tuple[Setting, ...]
    default: Setting | None = None

    def suggest(self, trial: optuna.trial.Trial, name: str) -> Setting:
        """Ask Optuna for a value."""
        return cast(Setting, trial.suggest_categorical(name, self.choices))

    def middle(self) -> Setting:
        """The default, or the first choice."""
        return self.choices[0] if self.default is None else self.default


Space = Mapping[str, Range | Choice]


def parse_space(table: Mapping[str, Any], owner: str = "search") -> dict[str, Range | Choice]:
    """Read a search space as cards write it.

    Args:
        table: `{"strength": {"low": 0.5, "high": 10, "log": True}, "momentum": {"choices": [0.7, 0.9]}}`, each
            optionally with `default`, ranges with `integer`.
        owner: named in errors.

    Raises:
        ValueError: naming the entry that is wrong, and what is allowed.

    Example:
        >>> parse_space({"q": {"low": 0.3, "high": 0.9}})["q"]
        Range(low=0.3, high=0.9, log=False, integer=False, default=None)
    """
    space: dict[str, Range | Choice] = {}
    for name, entry in table.items():
        where = f"{owner}: {name}"
        if not isinstance(entry, Mapping) or set(entry) - _KEYS:
            extra = sorted(set(entry) - _KEYS) if isinstance(entry, Mapping) else entry
            raise ValueError(f"{where}: unknown {extra}; allowed keys: {sorted(_KEYS)}")
        if "choices" in entry:
            choices = tuple(entry["choices"])
            if not choices or ("default" in entry and entry["default"] not in choices):
                raise ValueError(f"{where}: choices must hold at least one value, and the default; got {entry}")
            space[name] = Choice(choices, entry.get("default"))
            continue
        if "low" not in entry or "high" not in entry or not entry["low"] < entry["high"]:
            raise ValueError(f"{where}: needs choices, or low < high; got {dict(entry)}")
        if entry.get("log") and entry["low"] <= 0:
            raise ValueError(f"{where}: low must be > 0 on a logarithmic scale, got {entry['low']}")
        default = entry.get("default")
        if default is not None and not entry["low"] <= default <= entry["high"]:
            raise ValueError(f"{where}: default must lie in [{entry['low']}, {entry['high']}], got {default}")
        space[name] = Range(**entry)
    return space


@dataclass
class Tuned:
    """What tuning found for an arm.

    Attributes:
        settings: the best configuration.
        score: its mean score over the tuning seeds (higher is better).
        history: every configuration tried, with its score (None where a trial failed or diverged).
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
    rounds: int,
    seeds: Sequence[int] = (0,),
    score: str = "score",
    sampler_seed: int = 0,
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
        rounds: configurations an arm, at least 1.
        seeds: tuning seeds, below 1000.
        score: metric to maximise, averaged over the seeds.
        sampler_seed: of the proposals.
        keep_going: asked after each round with the number of rounds done; False ends tuning for all arms.

    Raises:
        ValueError: for rounds < 1 or a seed that belongs to evaluation.
        RuntimeError: if no configuration of an arm could be run, with the last traceback.
    """
    if rounds < 1:
        raise ValueError(f"tune_arms: rounds must be >= 1, got {rounds}")
    if not seeds or any(seed >= FIRST_EVALUATION_SEED for seed in seeds):
        raise ValueError(f"tune_arms: seeds must lie below {FIRST_EVALUATION_SEED}, got {list(seeds)}")
    searches = {arm: _Search(space, sampler_seed) for arm, space in spaces.items()}
    for number in range(rounds):
        asked = {arm: search.ask() for arm, search in searches.items()}
        trials = [make_trial(arm, s, seed) for arm, s in asked.items() if s is not None for seed in seeds]
        outcomes = dict(zip((t.key for t in trials), run(trials), strict=True))
        complete = all(outcome is not None for outcome in outcomes.values())
        if not complete and number > 0:
            break  # the deadline came inside this round: no arm learns from it
        for arm, settings in asked.items():
            if settings is not None:
                found = [outcomes[make_trial(arm, settings, seed).key] for seed in seeds]
                searches[arm].tell(found, score)
        if not complete or not keep_going(number + 1):
            break
    return {arm: search.best(arm) for arm, search in searches.items()}


class _Search:
    """Optuna's ask and tell for one arm."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.study.enqueue_trial({name: part.middle() for name, part in space.items()})
        self.history: list[tuple[dict[str, Setting], float | None]] = []
        self.error: str | None = None

    def ask(self) -> dict[str, Setting] | None:
        if not self.space and self.history:
            return None
        self.asked = self.study.ask()
        self.settings = {name: part.suggest(self.asked, name) for name, part in self.space.items()}
        return self.settings

    def tell(self, outcomes: Sequence[Outcome | None], score: str) -> None:
        values = [o.metrics[score] for o in outcomes if o is not None and o.status == "finished"]
        self.error = next((o.error for o in outcomes if o is not None and o.error), self.error)
        whole = len(values) == len(outcomes)
        mean = sum(values) / len(values) if whole else None
        self.history.append((dict(self.settings), mean))
        if mean is None:
            # A run that diverged is a bad configuration, told as such, so that the sampler moves away from it.
            self.study.tell(self.asked, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(self.asked, mean)

    def best(self, arm: str) -> Tuned:
        finished = [(s, settings) for settings, s in self.history if s is not None]
        if not finished:
            raise RuntimeError(f"no configuration of arm {arm!r} could be run; the last error was:\n{self.error}")
        value, settings = max(finished, key=lambda pair: pair[0])
        return Tuned(settings, value, self.history)


def seconds_left(deadline: float | None) -> float:
    """Seconds until a `time.monotonic()` deadline; infinite without one."""
    return math.inf if deadline is None else deadline - time.monotonic()
