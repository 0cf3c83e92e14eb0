"""BoTorch's Gaussian process as the surrogate of the IGNITE study: its tasks, designs and search, beside its arms.

    python benchmarks/ignite_botorch.py [SEEDS [POINTS [STEPS]]]

A `SingleTaskGP` with BoTorch's priors and fitting, standardised outcomes, designs scaled to the unit cube. Kernel and
noise rest on as many designs as those of the study's arm `gp`, the mean on all. No setting is tuned, by any score.
"""

import json
import sys
import time
from pathlib import Path

import torch

from wellposed.gradients import percentile_report
from wellposed.integrations import botorch_surrogate
from wellposed.lab.statistics import mean_interval, paired_interval, sign_flip_p
from wellposed.studies.ignite import searched
from wellposed.studies.problems.offline_surrogates import StandardizedTask
from wellposed.studies.problems.offline_tasks import TASKS, offline_task

FITTED_ON = 300
LEDGER = Path(__file__).parents[1] / "results" / "ignite.json"
ARMS = ("base", "ignite", "gp")
MEASURES = {"s100": "best of 128 designs", "s50": "median design"}


def found_on(name, number, seed, points, steps):
    """Scores of the designs that the search ends with on one task, as the study's `run_task` measures them."""
    task = StandardizedTask.of(offline_task(name, seed), points)
    surrogate = botorch_surrogate.BotorchSurrogate.fitted(task.x, task.y, FITTED_ON, 10 * seed + number)
    designs = task.designs(searched(surrogate, task, {"search": "ascent", "steps": steps}, 10 * seed + number))
    report = percentile_report(task.task.score(designs), (50, 100))
    return {"s100": report[100], "s50": report[50]}


def run(seeds, points, steps):
    """Metrics by name, one value a seed, named as in the ledger."""
    metrics = {}
    for seed in seeds:
        started = time.perf_counter()
        by_task = {name: found_on(name, number, seed, points, steps) for number, name in enumerate(TASKS)}
        for measure in MEASURES:
            for name, found in by_task.items():
                metrics.setdefault(f"{measure}_{name}", []).append(found[measure])
            metrics.setdefault(measure, []).append(sum(f[measure] for f in by_task.values()) / len(TASKS))
        print(f"seed {seed}: s100 {metrics['s100'][-1]:.3f}  {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return metrics


def table(measure, arms):
    """One line a task, one column an arm."""
    print(f"\n{MEASURES[measure]}, normalised true score: mean over {len(arms['botorch']['s100'])} seeds")
    print(f"{'':<18}" + "".join(f"{name:>16}" for name in arms))
    for metric in (*(f"{measure}_{name}" for name in TASKS), measure):
        cells = []
        for metrics in arms.values():
            found = mean_interval(metrics[metric])
            cells.append(f"{found.estimate:.3f} ± {found.half_width:.3f}")
        label = "mean of 5 tasks" if metric == measure else metric.removeprefix(f"{measure}_")
        print(f"{label:<18}" + "".join(f"{cell:>16}" for cell in cells))
    for name in list(arms)[1:]:
        values = arms["botorch"][measure], arms[name][measure]
        gap = paired_interval(*values)
        p = sign_flip_p([a - b for a, b in zip(*values, strict=True)])
        print(f"BoTorch - {name:<8} {gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], sign-flip p {p:.4f}")


def main(count=12, points=None, steps=200):
    torch.set_num_threads(1)
    try:
        import botorch
    except ImportError:
        raise SystemExit(f"error: {botorch_surrogate.HOW_TO_INSTALL}") from None
    ledger = json.loads(LEDGER.read_text("utf-8"))
    seeds = ledger["seeds"][:count]
    arms = {"botorch": run(seeds, points, steps)}
    for name in ARMS:
        # Metrics alone are numbers by seed in the ledger's order.
        arms[name] = {metric: values[: len(seeds)] for metric, values in ledger["arms"][name]["metrics"].items()}
    print(f"BoTorch {botorch.__version__}, kernel fitted on {FITTED_ON} designs; ledger of {ledger['date']}")
    for measure in MEASURES:
        table(measure, arms)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
