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


def deadly_once(trial):
    """Kills its worker the first time only, like a worker that ran out of memory beside others."""
    folder = Path(os.environ["WELLPOSED_TEST_MARKS"])
    if trial.seed == 1001 and not (folder / f"{trial.arm}-1001").exists():
        _mark(trial)
        os._exit(9)
    return work(trial)


def untidy(trial):
    """Leaves by sys.exit, returns nothing, or returns what cannot be stored."""
    if trial.seed == 1001:
        sys.exit(3)
    if trial.seed == 1002:
        return None
    if trial.seed == 1003:
        return TrialResult({}, {}, {"rows": {1, 2}})
    return work(trial)


def threads(trial):
    import torch

    return TrialResult({"threads": torch.get_num_threads(), "omp": float(os.environ["OMP_NUM_THREADS"])})


def _note_process(trial):
    (Path(os.environ["WELLPOSED_TEST_MARKS"]) / f"pid-{trial.arm}-{trial.seed}").write_text(str(os.getpid()))


def where(trial):
    """Which node of a cluster runs the trial, and with how many threads."""
    import ray

    result = work(trial)
    result.metrics |= threads(trial).metrics
    result.artifacts |= {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
    return result


def slow_once(trial):
    """The first trial takes ten minutes the first time, so that its machine can be lost meanwhile."""
    folder = Path(os.environ["WELLPOSED_TEST_MARKS"])
    if trial.seed == 1000 and not (folder / "a-1000").exists():
        _mark(trial)
        _note_process(trial)
        time.sleep(600)
    return work(trial)


def noted(trial):
    _note_process(trial)
    return work(trial)


if __name__ == "__main__":
    # A shell starts what runs in the background with Ctrl-C ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from wellposed.lab.runner import run_trials
    from wellposed.lab.store import Store

    path, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    if sys.argv[4:] == ["ray"]:
        # The module by its name, as a cluster needs it: this file is "__main__" here.
        import trial_functions

        run_trials(trials(count, seconds=seconds), trial_functions.noted, Store(path), workers=2, engine="ray")
    else:
        run_trials(trials(count, seconds=seconds), work, Store(path), workers=2)
    print("done")
