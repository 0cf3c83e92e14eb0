"""One trial in a process: timed around the function alone, held to one thread, marked while it runs."""

import pytest
import trial_functions
from trial_functions import trials

from wellposed.lab.runner import _kill_workers, run_trials
from wellposed.lab.store import Store
from wellposed.lab.trial import TrialResult
from wellposed.lab.worker import run_one


def test_workers_use_one_thread_whatever_the_driver_uses(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", trial_functions.__file__.rpartition("/")[0])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    _kill_workers()  # those of an earlier test have its environment
    (found,) = run_trials(trials(1), trial_functions.threads, Store(tmp_path / "trials.sqlite"), workers=1)
    assert found.metrics == {"threads": 1.0, "omp": 1.0}


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_trial_is_marked_while_it_runs_and_only_then(tmp_path, status):
    (trial,) = trials(1)
    seen = []

    def look(trial):
        seen.extend(path.name for path in tmp_path.iterdir())
        if status == "failed":
            raise ValueError("broken")
        return TrialResult({"score": 1.0})

    key, outcome = run_one(look, trial, tmp_path)
    assert (seen, key, outcome.status) == ([trial.key], trial.key, status)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_driver_ends_the_run_but_not_in_a_worker(tmp_path):
    def interrupted(trial):
        raise KeyboardInterrupt

    (trial,) = trials(1)
    with pytest.raises(KeyboardInterrupt):
        run_one(interrupted, trial)
    assert run_one(interrupted, trial, tmp_path)[1].status == "failed"
