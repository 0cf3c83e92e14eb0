"""Self-tuning networks: does one run that tunes itself beat searches at the same compute, and is it the schedule?

Problem: noisy digits under eight regularization strengths, in the regime where a perceptron overfits. Compute is counted
in plain training steps. Every search tries the initial strengths first; plain training has its learning rate, one L2
coefficient and its length tuned. The recorded schedule, replayed on a plain network, and the final values held fixed
show what the schedule is worth without the response layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from ..lab.study import Condition, Seed, Study
from ..lab.trial import Setting, Trial, TrialResult
from ..step import DivergenceError
from .problems.exact_responses import best_response_cases, no_training_gradient_cases
from .problems.regularized_digits import (
    DECAYS,
    EVALUATE_EVERY,
    INITIAL,
    Perceptron,
    RegularizedDigits,
    regularized_digits,
)
from .problems.self_tuned import SelfTuned, self_tuned, stn_units
from .problems.strength_search import Found, random_sampler, sequential_search, successive_halving, tpe_sampler
from .training import accuracy

if TYPE_CHECKING:
    from ..lab.study import Figure

OVERFITS_BY, UNTUNED_LOSES_BY = 0.1, 0.03

Settings = Mapping[str, Setting]
Arm = Callable[[Settings, RegularizedDigits, int, bool], TrialResult]


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm."""
    problem = regularized_digits(trial.seed)
    return ARMS[str(trial.settings["method"])](trial.settings, problem, trial.seed, trial.phase == "evaluate")


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def plain(settings: Settings, problem: RegularizedDigits, seed: int, testing: bool) -> TrialResult:
    """One run with fixed strengths: the initial ones, but for one L2 coefficient of all layers."""
    strengths = {**INITIAL, **dict.fromkeys(DECAYS, float(settings["l2"]))}
    return _plain_run(settings, problem, seed, testing, lambda progress: strengths)


def replay(settings: Settings, problem: RegularizedDigits, seed: int, testing: bool) -> TrialResult:
    """A plain run under the schedule that this seed's STN recorded."""
    found = _own_stn(settings, problem, seed)
    return _plain_run(settings, problem, seed, testing, found.schedule.at)


def final(settings: Settings, problem: RegularizedDigits, seed: int, testing: bool) -> TrialResult:
    """A plain run under the final values of this seed's STN."""
    values = _own_stn(settings, problem, seed).schedule.at(1.0)
    return _plain_run(settings, problem, seed, testing, lambda progress: values)


def _own_stn(settings: Settings, problem: RegularizedDigits, seed: int) -> SelfTuned:
    return self_tuned(problem, seed, settings, delta=False)


def _plain_run(
    settings: Settings,
    problem: RegularizedDigits,
    seed: int,
    testing: bool,
    strengths: Callable[[float], Mapping[str, float]],
) -> TrialResult:
    steps = int(settings["steps"])
    run_ = Perceptron(problem, seed, float(settings["lr"]))
    curves: dict[str, list[float]] = {"validation": [], "units": []}
    for step in range(steps):
        run_.step(strengths(step / steps))
        if run_.steps % EVALUATE_EVERY == 0 or run_.steps == steps:
            run_.evaluate()
            curves["validation"].append(run_.validation)
            curves["units"].append(float(run_.steps))
    if run_.diverged:
        raise DivergenceError("stn: the validation loss of a plain run is not finite")
    return TrialResult(_metrics(run_, problem, testing, steps), curves)


def searched(search: Callable[..., Found]) -> Arm:
    """The best run of a search at the compute of this study's STN, times `budget_factor`."""

    def arm(settings: Settings, problem: RegularizedDigits, seed: int, testing: bool) -> TrialResult:
        budget = stn_units(settings) * int(settings.get("budget_factor", 1))
        found = search(problem, seed, float(settings["lr"]), int(settings["steps"]), budget)
        metrics = _metrics(found.run, problem, testing, found.units)
        curves = {"validation": found.validation, "units": found.spent}
        return TrialResult({**metrics, "trials": found.trials}, curves, {"strengths": dict(found.strengths)})

    return arm


def self_tuning(delta: bool) -> Arm:
    """An STN or a Delta-STN."""

    def arm(settings: Settings, problem: RegularizedDigits, seed: int, testing: bool) -> TrialResult:
        start = float(settings["initial_dropout"])
        found = self_tuned(problem, seed, settings, delta=delta, initial_dropout=start, testing=testing)
        metrics = {"score": -found.validation, "validation": found.validation, "units": found.units}
        if testing:
            metrics |= {"ce": found.test, "last_ce": found.last_test, "accuracy": found.accuracy}
        return TrialResult(metrics, found.curves, {"schedule": found.schedule.to_json()} if testing else {})

    return arm


def _metrics(run_: Perceptron, problem: RegularizedDigits, testing: bool, units: float) -> dict[str, float]:
    """Scores of the checkpoint with the lowest validation loss; while testing also on test data, and of the last step."""
    found = {"score": -run_.validation, "validation": run_.validation, "units": float(units)}
    if testing:
        logits, labels = run_.logits(problem.test, run_.best[1] or None), problem.test_labels
        last = run_.logits(problem.test)
        found |= {"ce": float(F.cross_entropy(logits, labels)), "accuracy": accuracy(logits, labels)}
        found["last_ce"] = float(F.cross_entropy(last, labels))
    return found


ARMS: Mapping[str, Arm] = {
    "plain": plain,
    "random": searched(partial(sequential_search, sampler=random_sampler)),
    "tpe": searched(partial(sequential_search, sampler=tpe_sampler)),
    "halving": searched(successive_halving),
    "stn": self_tuning(delta=False),
    "delta_stn": self_tuning(delta=True),
    "replay": replay,
    "final": final,
}


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _log_ratio(seed: Seed, other: str, own: str) -> float:
    return math.log(seed[other]["ce"] / seed[own]["ce"])


def beats_search(seed: Seed) -> dict[str, float]:
    """Against three searches at equal compute."""
    return {rival: _log_ratio(seed, rival, "stn") for rival in ("random", "tpe", "halving")}


def overfits(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime r1: plain training is worse at its last step than at its checkpoint."""
    gap = sum(math.log(s["plain"]["last_ce"] / s["plain"]["ce"]) for s in seeds) / len(seeds)
    text = "plain training overfits: log(test loss at the last step / at the checkpoint) >= 0.1"
    return [Condition(text, gap, gap >= OVERFITS_BY)]


def overfits_and_tuning_helps(seeds: Sequence[Seed]) -> list[Condition]:
    """Regimes r1 and r2: there is something to tune."""
    gain = sum(_log_ratio(seed, "untuned", "random4") for seed in seeds) / len(seeds)
    text = "there is something to tune: log(test loss untuned / after four times the search) >= 0.03"
    return [*overfits(seeds), Condition(text, gain, gain >= UNTUNED_LOSES_BY)]


def figures(run_: Any) -> list[Figure]:
    """What compute buys, and whether schedules from two starts meet."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    drawn = []
    labels = {
        "stn": "STN", "random4": "random search, four times the compute", "tpe": "TPE", "halving": "successive halving",
        "delta_stn": "Delta-STN",
    }  # fmt: skip
    lines = {}
    for arm, label in labels.items():
        spent, found = run_.arms[arm].curves("units"), run_.arms[arm].curves("validation")
        if spent:
            lines[label] = (spent[0], found)
    if lines:
        svg = line_plot(
            lines, "compute, plain training steps", "lowest validation loss so far", "Validation loss over compute"
        )
        caption = (
            "Mean and range over the seeds. Compute is counted: an STN's step is two plain ones, a Delta-STN's four and "
            "a half. The first trial of every search has the initial strengths."
        )
        drawn.append(Figure("What compute buys", caption, svg))
    lines = {}
    for arm, start in (("stn", "0.05"), ("stn_half", "0.5")):
        for name, layer in (("dropout_input", "inputs"), ("dropout_hidden2", "second hidden layer")):
            rates = run_.arms[arm].curves(name)
            if rates:
                steps = [EVALUATE_EVERY * (i + 1) for i in range(len(rates[0]))]
                lines[f"{layer}, from {start}"] = (steps, rates)
    if lines:
        svg = line_plot(lines, "training step", "dropout rate", "Learned dropout rates from two starts")
        caption = "Mean and range over the seeds: if the start did not matter, both lines of a layer would meet."
        drawn.append(Figure("Do schedules from two starts meet?", caption, svg))
    return drawn


STUDY = Study(
    slug="stn",
    run=run,
    estimands={
        "stn-beats-search": beats_search,
        "stn-beats-tuned-plain": lambda seed: _log_ratio(seed, "plain", "stn"),
        "stn-matches-4x-search": lambda seed: _log_ratio(seed, "random4", "stn"),
        "schedule-beats-final": lambda seed: _log_ratio(seed, "final", "replay"),
        "init-does-not-matter": lambda seed: _log_ratio(seed, "stn_half", "stn"),
    },
    regimes={
        "stn-beats-search": overfits_and_tuning_helps,
        "stn-beats-tuned-plain": overfits,
        "stn-matches-4x-search": overfits_and_tuning_helps,
        "schedule-beats-final": overfits,
        "init-does-not-matter": overfits,
    },
    exact={"best-response-exact": best_response_cases, "no-training-gradient": no_training_gradient_cases},
    headline=("ce", "test cross-entropy, nats"),
    figures=figures,
)
