"""BO-REP: does normalised momentum survive an upper level whose curvature explodes, and is it better than clipping?

Three problems: a bilevel problem in closed form whose curvature grows with its gradient, from two distances; a recurrent
encoder as the upper level; cleaning of wrong labels by learned weights. Every arm has the same budget of oracle calls
(a gradient of f, a Hessian product, a mixed product, a gradient of g count one each) and the same tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bilevel import BilevelProblem
from ..lab.study import Condition, Seed, Study
from ..lab.trial import Trial, TrialResult
from ..step import DivergenceError
from ..tuner import Tuner
from ..tuning import BOREP, StocBiO, clipped_ma_soba, ma_soba, normalized_ma_soba, soba
from .problems import hyper_cleaning, recurrent_digits
from .problems.bo_rep_invariants import step_and_scale
from .problems.unbounded_smoothness import CoshProblem, noise_stream

if TYPE_CHECKING:
    from ..lab.study import Figure

Settings = Mapping[str, Any]

REFINE, STOCBIO_STEPS = 50, 10
TUNING_SEEDS = 4
"""Draws of the closed-form problem over which a tuning trial is averaged; they run side by side."""
GRID = tuple(sign * 10.0**power for power in range(-6, 1) for sign in (1, 3))
"""Outer learning rates of regime r1, half a decade apart."""
FLOOR = 1e-3
"""Values of the closed-form problem below this are noise."""
WORST_CE, WORST_ACCURACY = math.log(10), 10.0
POINTS = 50
"""Places on a curve."""
EXPLODES, TIMES_MEDIAN, LOSES = 0.3, 5.0, 5.0


def run(trial: Trial) -> TrialResult:
    """Tune and measure one arm on one problem."""
    return PROBLEMS[str(trial.settings["problem"])](trial)


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def make_tuner(settings: Settings, problem: BilevelProblem, independent: int = 0, outer_lr: Any = None) -> Tuner:
    """The arm that `settings["method"]` names, with its budget as its length."""
    method = str(settings["method"])
    chosen: dict[str, Any] = {
        "schedule": "cosine" if settings["decay"] == "cosine" else None,
        "total_steps": iterations(settings),
        "independent": independent,
    }
    rates = (settings["outer_lr"] if outer_lr is None else outer_lr, settings["inner_lr"], settings["z_lr"])
    if method == "stocbio":
        return StocBiO(problem, *rates, inner_steps=STOCBIO_STEPS, neumann_steps=STOCBIO_STEPS, **chosen)
    if method == "soba":
        return soba(problem, *rates, **chosen)
    beta = float(settings["beta"])
    if method == "borep":
        period, inner_steps = int(settings["period"]), int(settings["inner_steps"])
        return BOREP(
            problem, *rates, beta, period=period, inner_steps=inner_steps, refine_steps=REFINE, **chosen
        )  # fmt: skip
    if method == "norm_masoba":
        return normalized_ma_soba(problem, *rates, beta, **chosen)
    if method == "clipped_masoba":
        return clipped_ma_soba(problem, *rates, float(settings["clip"]), beta, **chosen)
    if method == "masoba":
        return ma_soba(problem, *rates, beta, **chosen)
    raise ValueError(f"bo-rep: method must be an arm of the card, got {method!r}")


def iterations(settings: Settings) -> int:
    """The largest number of steps that an arm's budget of oracle calls allows.

    Example:
        >>> iterations({"method": "masoba", "budget": 6000})
        1500
        >>> iterations({"method": "borep", "budget": 6000, "period": 2, "inner_steps": 3})
        1322
    """
    budget, method = int(settings["budget"]), settings["method"]
    if method == "stocbio":
        return budget // (2 * STOCBIO_STEPS + 2)
    if method != "borep":
        return budget // 4
    period, inner_steps = int(settings["period"]), int(settings["inner_steps"])
    left = budget - REFINE
    full, rest = divmod(left, inner_steps + 3 * period)
    return full * period + max(0, rest - inner_steps) // 3


def steps_of(tuner: Tuner, total: int, train: Iterator[Any], validation: Iterator[Any]) -> Iterator[Any]:
    """What each step saw, until the last one or until nothing is finite any more."""
    for _ in range(total):
        try:
            yield tuner.step(train, validation)
        except DivergenceError:
            return


# ── S1: curvature without bound ───────────────────────────────────────────────────────────────────────────────────
def run_cosh(trial: Trial) -> TrialResult:
    """Measure log10 of Phi at the end; a run that did not end below its start counts as no progress."""
    settings, tuning = trial.settings, trial.phase == "tune"
    if settings.get("grid"):
        return run_grid(trial)
    seeds = [TUNING_SEEDS * trial.seed + i for i in range(TUNING_SEEDS)] if tuning else [trial.seed]
    problem = CoshProblem(seeds, float(settings["radius"]))
    start, total = problem.value(), iterations(settings)
    train, validation = noise_stream(seeds, 0), noise_stream(seeds, 1)
    places, curve = evenly(total), []
    for number, _ in enumerate(steps_of(make_tuner(settings, problem, 1), total, train, validation), 1):
        if number in places and not tuning:
            curve.append(float(progress(problem.value(), start).mean()))
    end = problem.value()
    q, stuck = progress(end, start), ~(end <= start)
    metrics = {"score": -float(q.mean()), "q": float(q.mean()), "no_progress": float(stuck.double().mean())}
    if tuning:
        return TrialResult(metrics)
    metrics |= {"start": float(start.log10().mean()), "calls": float(problem.calls)}
    return TrialResult(metrics, {"q": padded(curve, float(start.log10().mean()))})


def progress(end: Tensor, start: Tensor) -> Tensor:
    """log10 of Phi, clipped to [1e-3, Phi(x0)]; what is not finite counts as Phi(x0).

    Example:
        >>> progress(torch.tensor([1e-9, float("nan"), 1e9]), torch.tensor([100.0, 100.0, 100.0]))
        tensor([-3.,  2.,  2.])
    """
    return torch.minimum(torch.where(end.isfinite(), end, start), start).clamp(min=FLOOR).log10()


def run_grid(trial: Trial) -> TrialResult:
    """Regime r1: the same arm on the whole grid of outer learning rates, on a tuning seed."""
    seed = trial.seed % TUNING_SEEDS
    problem = CoshProblem([seed], float(trial.settings["radius"]), repeat=len(GRID))
    start, total = problem.value(), iterations(trial.settings)
    tuner = make_tuner(trial.settings, problem, 1, torch.tensor(GRID, dtype=torch.float64))
    streams = noise_stream([seed], 0, len(GRID)), noise_stream([seed], 1, len(GRID))
    for _ in steps_of(tuner, total, *streams):
        pass
    end = problem.value()
    exploded = ~(end <= start)
    return TrialResult(
        {"q": float(progress(end, start).mean()), "exploded": float(exploded.double().mean())},
        {"grid": progress(end, start).tolist()},
    )


# ── S2: a recurrent representation ────────────────────────────────────────────────────────────────────────────────
def run_rnn(trial: Trial) -> TrialResult:
    """Cross-entropy with the head solved on the training part: on validation data while tuning, on test data after."""
    settings, seed = trial.settings, trial.seed
    train, validation, test = recurrent_digits.split_digits(seed)
    problem = recurrent_digits.RecurrentDigits(float(settings["gain"]), seed)
    streams = recurrent_digits.batches(train, 2 * seed), recurrent_digits.batches(validation, 2 * seed + 1)
    total = iterations(settings)
    seen = list(steps_of(make_tuner(settings, problem), total, *streams))
    part = validation if trial.phase == "tune" else test
    ce = WORST_CE
    if len(seen) == total:
        features = problem.features(train.inputs)
        if bool(features.isfinite().all()):
            head = recurrent_digits.solved_head(features, train.targets)
            ce = recurrent_digits.head_loss(problem.features(part.inputs), part.targets, head)
    metrics = {"score": -math.log(ce), "ce": ce, "diverged": float(len(seen) < total)}
    norms = torch.tensor([info.extra["hypergrad_norm"] for info in seen], dtype=torch.float64)
    metrics["norm_ratio"] = float(norms.max() / norms.median().clamp(min=1e-12)) if len(norms) else 0.0
    return TrialResult(metrics, {"outer_loss": blocks([info.outer_loss for info in seen], total, WORST_CE)})


# ── S3: cleaning of labels ────────────────────────────────────────────────────────────────────────────────────────
def run_cleaning(trial: Trial) -> TrialResult:
    """Accuracy of the final network: on examples of no level while tuning, on test data after."""
    settings, seed = trial.settings, trial.seed
    data = hyper_cleaning.cleaning_data(seed)
    if settings["method"] == "no_cleaning":
        return TrialResult(_without_cleaning(data))
    problem = hyper_cleaning.HyperCleaning(data)
    rows = hyper_cleaning.training_rows(len(data.train), seed)
    total = iterations(settings)
    seen = list(steps_of(make_tuner(settings, problem), total, rows, iter(int, 1)))
    tuning = trial.phase == "tune"
    inputs, targets = (data.selection, data.selection_labels) if tuning else (data.test, data.test_labels)
    done = len(seen) == total and bool(problem.head.isfinite().all())
    accuracy = _accuracy(problem.head, inputs, targets) if done else WORST_ACCURACY
    metrics = {
        "score": accuracy,
        "accuracy": accuracy,
        "error": 100.0 - accuracy,
        "auroc": hyper_cleaning.area_under_roc(problem.weights, ~data.wrong) if done else 0.5,
        "diverged": float(not done),
    }
    return TrialResult(metrics, {"outer_loss": blocks([info.outer_loss for info in seen], total, WORST_CE)})


def _without_cleaning(data: hyper_cleaning.CleaningData) -> dict[str, float]:
    """The minimisers on given and on true labels, all weights 1."""
    found = {}
    for name, labels in (("accuracy", data.labels), ("accuracy_clean_labels", data.truth)):
        head = recurrent_digits.solved_head(data.train, labels, hyper_cleaning.PENALTY)
        found[name] = _accuracy(head, data.test, data.test_labels)
    return {**found, "error": 100.0 - found["accuracy"]}


def _accuracy(head: Tensor, inputs: Tensor, targets: Tensor) -> float:
    right = (inputs.double() @ head.detach().double().T).argmax(-1) == targets.argmax(-1)
    return 100.0 * float(right.double().mean())


PROBLEMS: Mapping[str, Callable[[Trial], TrialResult]] = {"cosh": run_cosh, "rnn": run_rnn, "cleaning": run_cleaning}


# ── curves ────────────────────────────────────────────────────────────────────────────────────────────────────────
def evenly(total: int) -> set[int]:
    """Step numbers, from 1, at which a curve of `POINTS` places is measured."""
    return {max(1, round(total * (i + 1) / POINTS)) for i in range(POINTS)}


def padded(curve: list[float], value: float) -> list[float]:
    """A curve of `POINTS` places; those that a diverged run did not reach hold `value`."""
    return [*curve, *([value] * (POINTS - len(curve)))]


def blocks(values: Sequence[float], total: int, missing: float) -> list[float]:
    """Means over `POINTS` blocks of equal length; `missing` where a run did not come so far, and as upper bound.

    Example:
        >>> blocks([1.0, 3.0], total=2, missing=9.0)[-1]
        3.0
    """
    bounds = [total * i // POINTS for i in range(POINTS + 1)]
    parts = [values[a : max(b, a + 1)] for a, b in pairwise(bounds)]
    return [min(missing, sum(part) / len(part)) if len(part) > 0 else missing for part in parts]


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────
def gains(metric: str, own: str, rivals: Mapping[str, str], of: Callable[[float], float] = float) -> Any:
    """Each rival's metric, of which less is better, minus BO-REP's: positive as the paper says."""

    def estimand(seed: Seed) -> dict[str, float]:
        return {name: of(seed[arm][metric]) - of(seed[own][metric]) for name, arm in rivals.items()}

    return estimand


def beats_clipping(seed: Seed) -> dict[str, float]:
    """At both distances."""
    return _at_both(seed, "clipped_masoba")


def refinement_and_periods(seed: Seed) -> dict[str, float]:
    """At both distances."""
    return _at_both(seed, "norm_masoba")


def _at_both(seed: Seed, rival: str) -> dict[str, float]:
    return {f"r = {r}": seed[f"{rival}_r{r}"]["q"] - seed[f"borep_r{r}"]["q"] for r in (4, 8)}


def curvature_explodes(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime r1."""
    share = _mean(seed["masoba_grid"]["exploded"] for seed in seeds)
    text = "MA-SOBA ends above its start, or nowhere finite, in >= 30 % of the runs over the grid of learning rates"
    return [Condition(text, share, share >= EXPLODES)]


def gradients_explode(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime r2."""
    ratio = _mean(seed["masoba_rnn"]["norm_ratio"] for seed in seeds)
    text = "MA-SOBA's largest hypergradient norm is >= 5 times the median of its run (mean over seeds)"
    return [Condition(text, ratio, ratio >= TIMES_MEDIAN)]


def noise_hurts(seeds: Sequence[Seed]) -> list[Condition]:
    """Regime r3."""
    witness = [seed["no_cleaning"] for seed in seeds]
    loss = _mean(w["accuracy_clean_labels"] - w["accuracy"] for w in witness)
    text = "training on the noisy labels alone loses >= 5 points against the clean labels"
    return [Condition(text, loss, loss >= LOSES)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def figures(run_: Any) -> list[Figure]:
    """Progress over the budget on the closed-form and the recurrent problem, and what the learning rate does."""
    from ..lab.figures import line_plot
    from ..lab.study import Figure

    shown = {"borep": "BO-REP", "norm_masoba": "normalised", "clipped_masoba": "clipped", "masoba": "MA-SOBA",
             "stocbio": "StocBiO"}  # fmt: skip
    share = [100.0 * (i + 1) / POINTS for i in range(POINTS)]
    drawn = []
    for group, curve, y_label, title, caption in (
        ("r4", "q", "log10 of Phi", "Where the upper level is not smooth",
         "Closed-form problem from distance 4, each arm as tuned (mean and range over the seeds). A run that left the "
         "finite numbers stays at its start."),
        ("rnn", "outer_loss", "validation cross-entropy, nats", "A recurrent representation",
         "Loss on the validation batches, as each arm saw it on its way (mean and range over the seeds)."),
    ):  # fmt: skip
        lines = {
            label: (share, seeds)
            for arm, label in shown.items()
            if (seeds := run_.arms[f"{arm}_{group}"].curves(curve))
        }
        drawn.append(Figure(title, caption, line_plot(lines, "share of the oracle calls, %", y_label, title)))
    grid = run_.arms["masoba_grid"].curves("grid")
    svg = line_plot({"MA-SOBA": (GRID, grid)}, "outer learning rate", "log10 of Phi at the end", "Grid", log_x=True)
    caption = "MA-SOBA from distance 4, other settings as tuned; a run that ends above its start counts as its start."
    drawn.append(Figure("No learning rate is both safe and fast", caption, svg))
    return drawn


_RIVALS = ("masoba", "soba", "stocbio")

STUDY = Study(
    slug="bo-rep",
    run=run,
    estimands={
        "unbounded-smoothness": gains("q", "borep_r4", {arm: f"{arm}_r4" for arm in _RIVALS}),
        "beats-clipping": beats_clipping,
        "refinement-and-periods": refinement_and_periods,
        "rnn-representation": gains("ce", "borep_rnn", {arm: f"{arm}_rnn" for arm in _RIVALS}, math.log),
        "rnn-beats-clipping": gains("ce", "borep_rnn", {"clipped_masoba": "clipped_masoba_rnn"}, math.log),
        "hyper-cleaning": gains(
            "error", "borep_cleaning", {arm: f"{arm}_cleaning" for arm in ("masoba", "stocbio")}
        ),
    },
    regimes={
        "unbounded-smoothness": curvature_explodes,
        "beats-clipping": curvature_explodes,
        "refinement-and-periods": curvature_explodes,
        "rnn-representation": gradients_explode,
        "rnn-beats-clipping": gradients_explode,
        "hyper-cleaning": noise_hurts,
    },
    exact={"step-and-scale": step_and_scale},
    headline=("q", "log10 of Phi at the end; test cross-entropy, nats; test error, points: less is better"),
    figures=figures,
)  # fmt: skip
