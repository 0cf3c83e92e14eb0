"""The store: two processes at once, changes of schema that are whole or not at all, and what it hands back."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from trial_functions import trials

import wellposed.lab.store as module
from wellposed.lab.store import Store, StoreError
from wellposed.lab.trial import Outcome, Trial

SUPPORT = Path(__file__).parents[1] / "support"
OPEN_AND_WRITE = """
import sys, time
from trial_functions import trials
from wellposed.lab.store import Store
from wellposed.lab.trial import Outcome
path, at, number = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
while time.time() < at:
    pass
store = Store(path)
for trial in trials(12):
    kept = store.put(trial, Outcome("failed" if number % 2 else "finished", {"score": float(number)}))
    assert number % 2 or kept.status == "finished"
"""
VERSION_1 = """
CREATE TABLE meta (name VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
INSERT INTO meta VALUES ('schema_version', '1');
CREATE TABLE trials (
    "key" VARCHAR NOT NULL PRIMARY KEY, study VARCHAR NOT NULL, arm VARCHAR NOT NULL, scale VARCHAR NOT NULL,
    phase VARCHAR NOT NULL, settings VARCHAR NOT NULL, seed INTEGER NOT NULL, fingerprint VARCHAR NOT NULL,
    status VARCHAR NOT NULL, result VARCHAR NOT NULL, seconds FLOAT NOT NULL, peak_memory INTEGER, error VARCHAR
);
"""


def test_processes_that_create_one_store_at_once_lose_nothing_and_none_stops(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    path, at = tmp_path / "trials.sqlite", time.time() + 2
    command = [sys.executable, "-c", OPEN_AND_WRITE, str(path), str(at)]
    writers = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(4)]
    for writer in writers:
        errors = writer.communicate(timeout=60)[1]
        assert writer.returncode == 0, errors
    # Two of them wrote failures, two finished outcomes: whatever the order, a finished one stays.
    assert [outcome.status for _, outcome in Store(path).outcomes()] == ["finished"] * 12


def test_a_change_of_schema_that_is_cut_leaves_the_old_store_whole(tmp_path, monkeypatch):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1)
    whole = module._MIGRATIONS[1]

    def cut(connection):
        whole(connection)
        raise KeyboardInterrupt

    monkeypatch.setitem(module._MIGRATIONS, 1, cut)
    with pytest.raises(KeyboardInterrupt):
        Store(path)
    monkeypatch.setitem(module._MIGRATIONS, 1, whole)
    assert Store(path).outcomes() == []


def test_put_returns_what_the_store_holds(tmp_path):
    store = Store(tmp_path / "trials.sqlite")
    (trial,) = trials(1)
    assert store.put(trial, Outcome("failed", error="e", attempts=1)).status == "failed"
    assert store.put(trial, Outcome("diverged", attempts=2)).attempts == 2
    assert store.put(trial, Outcome("finished", {"score": 1.0})).status == "diverged"


def test_an_outcome_comes_back_as_it_was_put(tmp_path):
    store = Store(tmp_path / "trials.sqlite")
    trial = Trial("s", "a", "smoke", "evaluate", {"lr": np.float64(0.1), "n": np.int64(3), "on": True}, 1000, "f")
    curves = {"loss": [float("inf"), 0.1 + 0.2]}
    outcome = Outcome("finished", {"score": 1 / 3}, curves, {"rows": [1, 2]}, 1.5, 2**40, None, 2, "abc")
    store.put(trial, outcome)
    ((found, kept),) = store.outcomes(study="s", arm="a", phase="evaluate", scale="smoke")
    assert (kept, found.key) == (outcome, trial.key)
    assert found.settings == {"lr": 0.1, "n": 3, "on": True}
    assert store.outcomes(arm="b") == []


def test_a_store_without_a_readable_version_or_place_is_refused(tmp_path):
    path = tmp_path / "odd.sqlite"
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = 'two'")
    with pytest.raises(StoreError, match="no readable schema version"):
        Store(path)
    with pytest.raises(StoreError, match="cannot create the folder"):
        Store(path / "inside" / "trials.sqlite")
    with pytest.raises(StoreError, match="cannot open the store"):
        Store(tmp_path)
