"""Half fine-tuning: does a random frozen half keep more of the old knowledge, or does it only move less?

Problem: a small Llama-like model that knows 300 facts learns three tasks, one after the other. Every arm runs at six
learning rates, because the rate alone trades learning against keeping; arms are compared by what they keep at equal
learning. Beside full fine-tuning: interpolation with the old weights (WiSE-FT), L2-SP and LoRA. Two claims follow the
paper's own protocol, one recipe for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..lab.study import Condition, Seed, Study
from ..lab.trial import Setting, Trial, TrialResult
from ..regularizer import Regularizer
from ..weights.half_fine_tuning import HalfFineTuning
from ..weights.interpolation import WeightInterpolation
from ..weights.l2_sp import L2StartingPoint
from ..weights.low_rank import LowRankAdaptation
from .problems.continual_runs import (
    Problem,
    Sizes,
    Stages,
    kept_at,
    kept_between_processes,
    problem_of,
    run_stages,
    settings_key,
)
from .problems.fact_table import TASKS, task_accuracy
from .problems.half_freezing_cases import bound_cases, frozen_cases

if TYPE_CHECKING:
    from ..lab.study import Figure

RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3)
MATCHED = (0.5, 0.6, 0.7, 0.8, 0.9)
GRID = tuple(i / 20 for i in range(21))
TUNING_SEEDS = (0, 1)
RECALL_AT_LEAST, LEARNED_AT_LEAST, KEPT_BETWEEN, FORGETS_TO = 0.95, 0.9, (0.10, 0.90), 0.8

Settings = Mapping[str, Setting]


def _half(settings: Settings, seed: int) -> Callable[[int], Regularizer]:
    method = HalfFineTuning(strategy=settings["strategy"], seed=seed)  # type: ignore[arg-type]
    return lambda stage: method  # one object: every stage draws another half


def _low_rank(settings: Settings, seed: int) -> Callable[[int], Regularizer]:
    rank = int(settings["rank"])
    return lambda stage: LowRankAdaptation(
        rank,
        2.0 * rank,
        targets=lambda name, module: name.startswith("layers."),
        trainable=["embed_tokens.weight", "embed_positions.weight", "norm.weight", "lm_head.weight"],
        seed=3 * seed + stage,
    )


METHODS: Mapping[str, Callable[[Settings, int], Callable[[int], Regularizer | None]]] = {
    "fft": lambda s, seed: lambda stage: None,
    "hft": _half,
    "fft-wise": lambda s, seed: lambda stage: WeightInterpolation(float(s["alpha"])),
    "l2sp": lambda s, seed: lambda stage: L2StartingPoint(float(s["strength"])),
    "lora": _low_rank,
}


def run(trial: Trial) -> TrialResult:
    """One arm at all learning rates of one seed; the arm `hft-recipe` at the one that full fine-tuning chose."""
    settings, testing = trial.settings, trial.phase == "evaluate"
    problem = _problem(trial.seed, settings, testing, trial.fingerprint)
    rates = RATES[: int(settings.get("rates", len(RATES)))]
    if settings.get("rate") == "of fft":
        star = chosen_rate(settings, rates, trial.fingerprint)
        found = run_at(problem, settings, rates[star], testing)
        metrics = {"rate_star": float(star), "x_star": found.x, "y_star": found.y, "score": found.x + found.y}
        return TrialResult(metrics)
    runs = [_tuning_run(problem, settings, rate, trial) for rate in rates]
    untrained = [task_accuracy(problem.model(), *problem.measured[task]) for task in TASKS]
    points = [(sum(untrained) / len(untrained), problem.recall), *((r.x, r.y) for r in runs)]
    first = [(untrained[0], problem.recall), *((r.x1, r.y1) for r in runs)]
    retention = _mean(kept_at(points, MATCHED))
    if not testing:
        return TrialResult({"score": retention})
    metrics = {
        "score": retention,
        "retention": retention,
        "retention1": _mean(kept_at(first, MATCHED)),
        "recall": problem.recall,
        "x_max": max(r.x for r in runs),
        "x1_max": max(r.x1 for r in runs),
        "y1_top": runs[-1].y1,
    }
    for i, r in enumerate(runs):
        metrics |= {
            f"x_{i}": r.x, f"y_{i}": r.y, f"x1_{i}": r.x1, f"y1_{i}": r.y1,
            f"overall_performance_{i}": r.performance, f"backward_transfer_{i}": r.transfer,
        }  # fmt: skip
    curves = {"front": kept_at(points, GRID), "front1": kept_at(first, GRID)}
    return TrialResult(metrics, curves | {"learned": [r.x for r in runs], "kept": [r.y for r in runs]})


def run_at(problem: Problem, settings: Settings, rate: float, all_tasks: bool) -> Stages:
    """One run of an arm's method."""
    method_of = METHODS[str(settings["method"])](settings, problem.seed)
    return run_stages(
        problem, method_of, rate, float(settings["weight_decay"]), int(settings["steps"]), all_tasks=all_tasks
    )


def chosen_rate(settings: Settings, rates: Sequence[float], code: str) -> int:
    """Number of the rate with the largest x + y of full fine-tuning on the tuning seeds, under the same settings.

    Full fine-tuning's own tuning trials left these runs in temporary files; where they are gone, they run again.
    """
    plain = {**settings, "method": "fft"}
    sums = [0.0] * len(rates)
    for seed in TUNING_SEEDS:
        for i, rate in enumerate(rates):
            x, y = _plain_point(seed, plain, rate, code)
            sums[i] += x + y
    return max(range(len(rates)), key=sums.__getitem__)


def _tuning_run(problem: Problem, settings: Settings, rate: float, trial: Trial) -> Stages:
    testing = trial.phase == "evaluate"
    found = run_at(problem, settings, rate, testing)
    if not testing and settings["method"] == "fft" and trial.seed in TUNING_SEEDS:
        key = _point_key(trial.seed, settings, rate, trial.fingerprint)
        kept_between_processes(key, lambda: {"point": [found.x, found.y]})
    return found


def _plain_point(seed: int, settings: Settings, rate: float, code: str) -> tuple[float, float]:
    def compute() -> dict[str, Any]:
        found = run_at(_problem(seed, settings, False, code), settings, rate, all_tasks=False)
        return {"point": [found.x, found.y]}

    x, y = kept_between_processes(_point_key(seed, settings, rate, code), compute)["point"]
    return float(x), float(y)


def _point_key(seed: int, settings: Settings, rate: float, code: str) -> list[Any]:
    sizes = _sizes(settings)
    relevant = {"weight_decay": settings["weight_decay"], "steps": settings["steps"], **vars(sizes)}
    return ["full fine-tuning", seed, rate, settings_key(relevant), code]


def _sizes(settings: Settings) -> Sizes:
    return Sizes(**{name: int(settings[name]) for name in vars(Sizes()) if name in settings})


def _problem(seed: int, settings: Settings, testing: bool, code: str) -> Problem:
    return problem_of(seed, _sizes(settings), testing, code)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _lead(metric: str, rivals: Sequence[str]) -> Callable[[Seed], dict[str, float] | float]:
    """Difference of the category-wise arm to its rivals: one number against one, else one a rival."""

    def lead(seed: Seed) -> dict[str, float] | float:
        found = {rival: seed["hft-category"][metric] - seed[rival][metric] for rival in rivals}
        return found if len(rivals) > 1 else found[rivals[0]]

    return lead


def same_recipe(seed: Seed) -> float:
    """log((y of HFT + 0.01) / (y of FFT + 0.01)) at full fine-tuning's own recipe and rate."""
    star = int(seed["hft-recipe"]["rate_star"])
    return math.log((seed["hft-recipe"]["y_star"] + 0.01) / (seed["fft"][f"y_{star}"] + 0.01))


def no_loss(seed: Seed) -> float:
    """X of HFT minus x of FFT, there."""
    star = int(seed["hft-recipe"]["rate_star"])
    return seed["hft-recipe"]["x_star"] - seed["fft"][f"x_{star}"]


def _knows(seeds: Sequence[Seed]) -> Condition:
    recall = _mean([s["fft"]["recall"] for s in seeds])
    return Condition("recall of the facts before fine-tuning >= 0.95", recall, recall >= RECALL_AT_LEAST)


def forgets_three_stages(seeds: Sequence[Seed]) -> list[Condition]:
    """On full fine-tuning alone: the model knows, can learn all tasks, and keeps neither nearly all nor nothing."""
    learned, kept = (_mean([s["fft"][name] for s in seeds]) for name in ("x_max", "retention"))
    low, high = KEPT_BETWEEN
    return [
        _knows(seeds),
        Condition("largest accuracy on the new tasks over the rates >= 0.9", learned, learned >= LEARNED_AT_LEAST),
        Condition("matched retention of full fine-tuning lies in [0.10, 0.90]", kept, low <= kept <= high),
    ]


def forgets_one_stage(seeds: Sequence[Seed]) -> list[Condition]:
    """The same of the first stage: learned at some rate, forgotten at the largest."""
    learned, kept = (_mean([s["fft"][name] for s in seeds]) for name in ("x1_max", "y1_top"))
    return [
        _knows(seeds),
        Condition("largest accuracy on the first task over the rates >= 0.9", learned, learned >= LEARNED_AT_LEAST),
        Condition("recall after it at the largest rate <= 0.9", kept, kept <= KEPT_BETWEEN[1]),
    ]


def forgets_by_recipe(seeds: Sequence[Seed]) -> list[Condition]:
    """Full fine-tuning at its own rate loses a fifth of what the model knew."""
    kept = _mean([s["fft"][f"y_{int(s['hft-recipe']['rate_star'])}"] for s in seeds])
    known = _mean([s["fft"]["recall"] for s in seeds])
    text = "recall of full fine-tuning at its rate is at most 0.8 of the recall before"
    return [Condition(text, kept / known if known else 1.0, kept <= FORGETS_TO * known)]


def figures(run_: Any) -> list[Figure]:
    """What is kept at equal learning: rivals, and ways to draw the half."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    panels = {
        "What is kept at equal learning": ("fft", "hft-category", "fft-wise", "l2sp", "lora"),
        "Does it matter how the half is drawn?": ("fft", "hft-category", "hft-layer", "hft-model"),
    }
    drawn = []
    for title, arms in panels.items():
        lines = {}
        for name in arms:
            if name in run_.arms and (fronts := run_.arms[name].curves("front")):
                lines[run_.arms[name].arm.label] = (GRID, fronts)
        if lines:
            svg = line_plot(lines, "accuracy on the new tasks", "facts still known", f"{title}: fronts over six rates")
            caption = (
                "Each line joins the best runs over six learning rates (mean and range over the seeds): to the right the "
                "tasks are learned better, above more of the facts is kept. A line ends at 0 where no rate learned so much."
            )
            drawn.append(Figure(title, caption, svg))
    return drawn


STUDY = Study(
    slug="hft",
    run=run,
    estimands={
        "retention": _lead("retention", ["fft"]),
        "rivals": _lead("retention", ["fft-wise", "l2sp", "lora"]),
        "single_stage": _lead("retention1", ["fft"]),
        "same_recipe": same_recipe,
        "no_loss": no_loss,
        "strategy": _lead("retention", ["hft-layer", "hft-model"]),
    },
    regimes={
        "retention": forgets_three_stages,
        "rivals": forgets_three_stages,
        "single_stage": forgets_one_stage,
        "same_recipe": forgets_by_recipe,
        "no_loss": forgets_by_recipe,
        "strategy": forgets_three_stages,
    },
    exact={"frozen": frozen_cases, "bound": bound_cases},
    headline=("retention", "facts kept at equal learning, share"),
    figures=figures,
)
