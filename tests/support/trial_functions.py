"""Trial functions that worker processes import, and a driver that is run as a process of its own."""

import os
import signal
import sys
import time
from pathlib import Path

from wellposed.lab.trial import Trial, TrialResult


def trials(count, arm="a", **settings):
    return [Trial("s", arm, "smoke", "evaluate", dict(settings), 1000 + i, "f") for i in range(count)]


def _mark(trial):
    folder = Path(os.environ["WELLPOSED_TEST_MARKS"])
    with (folder / f"{trial.arm}-{trial.seed}").open("a") as file:
        file.write("x")


def work(trial):
    _mark(trial)
    time.sleep(float(trial.settings.get("seconds", 0)))
    return TrialResult({"score": float(trial.seed)}, {"c": [1.0]}, {"note": "n"})


class Diverged(ArithmeticError):
    diverged = True


def sometimes(trial):
    if trial.seed == 1001:
        raise ValueError("this trial is broken")
    if trial.seed == 1002:
        raise Diverged("inf")
    return work(trial)


def deadly(trial):
    if trial.seed == 1001:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(trial)


if __name__ == "__main__":
    from wellposed.lab.runner import run_trials
    from wellposed.lab.store import Store

    path, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    run_trials(trials(count, seconds=seconds), work, Store(path), workers=2)
    print("done")
