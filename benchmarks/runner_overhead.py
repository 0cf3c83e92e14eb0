"""What the runner costs a trial, and what a second worker brings."""

import statistics
import tempfile
import time
from pathlib import Path

from wellposed.lab.runner import run_trials
from wellposed.lab.store import Store
from wellposed.lab.trial import Trial, TrialResult


def nothing(trial):
    return TrialResult({"score": 0.0})


def busy(trial):
    """About 0.4 seconds of arithmetic."""
    total = 0
    for i in range(6_000_000):
        total += i * i
    return TrialResult({"score": float(total % 7)})


def run(function, count, workers, engine="loky"):
    trials = [Trial("s", "a", "smoke", "evaluate", {}, 1000 + i, "f") for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "trials.sqlite")
        started = time.perf_counter()
        run_trials(trials, function, store, workers=workers, engine=engine)
        return time.perf_counter() - started


def main():
    run(nothing, 4, 2)  # start the workers
    for engine in ("serial", "loky"):
        values = [run(nothing, 100, 2, engine) / 100 for _ in range(5)]
        print(f"{engine:<7} {1e3 * statistics.median(values):6.2f} ms a trial that does nothing (stored with fsync)")
    ratios, one, two = [], [], []
    for _ in range(5):
        one.append(run(busy, 12, 1))
        two.append(run(busy, 12, 2))
        ratios.append(one[-1] / two[-1])
    print(f"one worker {statistics.median(one):.2f} s, two workers {statistics.median(two):.2f} s for 12 trials")
    print(f"two over one: {statistics.median(ratios):.2f}x (5 pairs in turn, {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
