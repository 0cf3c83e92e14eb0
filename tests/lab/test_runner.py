"""Nothing finished is ever lost: each way in which a run can end, as a test."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from trial_functions import deadly, deadly_once, sometimes, trials, untidy, work

from wellposed.lab.runner import MAX_ATTEMPTS, _kill_workers, run_trials
from wellposed.lab.store import SCHEMA_VERSION, Store, StoreError
from wellposed.lab.trial import Outcome, Trial

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def marks(tmp_path, monkeypatch):
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("WELLPOSED_TEST_MARKS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    _kill_workers()  # those of an earlier test have its environment
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "trials.sqlite")


def runs(marks):
    return {path.name: len(path.read_text()) for path in marks.iterdir()}


def driver(path, count, seconds):
    command = [sys.executable, str(SUPPORT / "trial_functions.py"), str(path), str(count), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(marks, number, process):
    for _ in range(600):
        if len(runs(marks)) >= number:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the driver did not begin")


def members(group):
    """Processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def nobody_left(group):
    """Whether all processes of a group end within a few seconds: joblib's tidy up after the driver."""
    for _ in range(100):
        if not members(group):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("engine", ["serial", "loky"])
def test_finished_trials_are_not_run_again(store, marks, engine):
    first = run_trials(trials(3), work, store, workers=2, engine=engine)
    again = run_trials(trials(4), work, store, workers=2, engine=engine)
    assert [o.metrics["score"] for o in again] == [1000, 1001, 1002, 1003]
    assert first[0].artifacts == {"note": "n"}
    assert again[0].peak_memory is None or again[0].peak_memory > 0
    assert set(runs(marks).values()) == {1}


@pytest.mark.parametrize("engine", ["serial", "loky"])
def test_a_trial_that_raises_is_recorded_and_loses_nothing_else(store, engine):
    found = run_trials(trials(5), sometimes, store, workers=2, engine=engine)
    assert [o.status for o in found] == ["finished", "failed", "diverged", "finished", "finished"]
    assert "this trial is broken" in found[1].error
    assert "Traceback" in found[1].error
    for _ in range(MAX_ATTEMPTS + 1):
        found = run_trials(trials(5), sometimes, store, workers=2, engine="serial")
    assert found[1].attempts == MAX_ATTEMPTS
    assert found[2].attempts == 1


def test_a_worker_that_dies_takes_only_its_own_trial(store):
    found = run_trials(trials(5), deadly, store, workers=2)
    assert [o.status for o in found] == ["finished", "failed", "finished", "finished", "finished"]
    assert "worker process died" in found[1].error


def test_after_kill_9_of_the_whole_run_the_same_call_continues(tmp_path, marks):
    path = tmp_path / "trials.sqlite"
    process = driver(path, 6, 0.6)
    wait_for(marks, 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {trial.seed for trial, _ in Store(path).outcomes()}
    before = runs(marks)
    assert finished
    found = run_trials(trials(6, seconds=0.6), work, Store(path), workers=2)
    assert all(o.status == "finished" for o in found)
    for seed in finished:
        assert runs(marks)[f"a-{seed}"] == before[f"a-{seed}"] == 1


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_worker(tmp_path, marks):
    path = tmp_path / "trials.sqlite"
    process = driver(path, 40, 0.3)
    wait_for(marks, 4, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert nobody_left(process.pid)
    assert 0 < len(Store(path).outcomes()) < 40


def test_a_full_disk_is_one_clear_error_and_finished_trials_survive(tmp_path, marks):
    path = tmp_path / "trials.sqlite"
    store = Store(path)
    run_trials(trials(2), work, store, engine="serial")
    with store._engine.begin() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    from sqlalchemy import event

    @event.listens_for(store._engine, "connect")
    def limit(connection, _):
        connection.execute(f"PRAGMA max_page_count={pages}")

    store._engine.dispose()

    with pytest.raises(StoreError, match=r"the disk is full: .*Finished trials are safe"):
        for trial in trials(200, arm="b")[2:]:
            store.put(trial, Outcome("finished", {"score": 1.0}, {"long": [0.5] * 2000}))
    store.close()
    assert len(Store(path).outcomes(arm="a")) == 2


def test_two_runs_on_one_store_share_the_work_and_lose_nothing(tmp_path, marks):
    path = tmp_path / "trials.sqlite"
    first = driver(path, 8, 0.4)
    wait_for(marks, 4, first)  # so that two trials are finished when the second run begins
    for process in (first, driver(path, 8, 0.4)):
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "done" in out
    assert len(Store(path).outcomes()) == 8
    assert sum(runs(marks).values()) < 16


def test_the_first_finished_outcome_stays(store):
    (trial,) = trials(1)
    store.put(trial, Outcome("failed", error="e"))
    store.put(trial, Outcome("finished", {"score": 1.0}))
    store.put(trial, Outcome("finished", {"score": 2.0}))
    assert store.get(trial).metrics == {"score": 1.0}


VERSION_1 = """
CREATE TABLE meta (name VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
INSERT INTO meta VALUES ('schema_version', '1');
CREATE TABLE trials (
    "key" VARCHAR NOT NULL PRIMARY KEY, study VARCHAR NOT NULL, arm VARCHAR NOT NULL, scale VARCHAR NOT NULL,
    phase VARCHAR NOT NULL, settings VARCHAR NOT NULL, seed INTEGER NOT NULL, fingerprint VARCHAR NOT NULL,
    status VARCHAR NOT NULL, result VARCHAR NOT NULL, seconds FLOAT NOT NULL, peak_memory INTEGER, error VARCHAR
);
"""


def test_a_store_of_an_older_schema_is_brought_up_to_date_with_its_trials(tmp_path, marks):
    path = tmp_path / "old.sqlite"
    (trial,) = trials(1)
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1)
        values = (trial.key, "s", "a", "smoke", "evaluate", "{}", 1000, "f", "finished")
        result = '{"metrics": {"score": 5.0}, "curves": {}, "artifacts": {}}'
        old.execute(f"INSERT INTO trials VALUES ({','.join('?' * 13)})", (*values, result, 1.5, None, None))
    (outcome,) = run_trials([trial], work, Store(path), engine="serial")
    assert outcome.metrics == {"score": 5.0}
    assert outcome.attempts == 1
    assert not runs(marks)
    with sqlite3.connect(path) as new:
        assert new.execute("SELECT value FROM meta").fetchone() == (str(SCHEMA_VERSION),)


def test_newer_foreign_and_damaged_files_are_refused_with_the_reason(tmp_path):
    newer = tmp_path / "newer.sqlite"
    Store(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE meta SET value = '99'")
    with pytest.raises(StoreError, match="written by a newer wellposed"):
        Store(newer)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE songs (title)")
    with pytest.raises(StoreError, match="not a store of trials"):
        Store(foreign)
    text = tmp_path / "text.sqlite"
    text.write_text("this is no database, but a text long enough to be looked at as one" * 20)
    with pytest.raises(StoreError, match="not a readable store"):
        Store(text)


def test_after_the_deadline_no_trial_starts(store):
    assert run_trials(trials(2), work, store, engine="serial", deadline=time.monotonic() - 1) == [None, None]


def test_seeds_belong_to_tuning_or_to_evaluation():
    with pytest.raises(ValueError, match=r"a tuning seed must lie in \[0, 1000\), got 1000"):
        Trial("s", "a", "smoke", "tune", {}, 1000, "f")
    with pytest.raises(ValueError, match="an evaluation seed must be >= 1000, got 3"):
        Trial("s", "a", "smoke", "evaluate", {}, 3, "f")


def test_wrong_arguments_are_refused_by_name(store):
    with pytest.raises(ValueError, match="engine must be one of .*, got 'threads'"):
        run_trials([], work, store, engine="threads")
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        run_trials([], work, store, workers=0)


def test_workers_end_themselves_when_their_driver_was_killed(tmp_path, marks):
    process = driver(tmp_path / "trials.sqlite", 40, 0.3)
    wait_for(marks, 4, process)
    process.kill()  # the driver alone: it can tell its workers nothing
    process.wait()
    assert nobody_left(process.pid)


def test_ctrl_c_in_the_terminal_ends_long_trials_at_once_and_workers_say_nothing(tmp_path, marks):
    process = driver(tmp_path / "trials.sqlite", 4, 60)
    wait_for(marks, 2, process)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the driver and to every worker
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert nobody_left(process.pid)


def test_the_only_worker_may_die_without_the_driver(store):
    found = run_trials(trials(3), deadly, store, workers=1)
    assert [o.status for o in found] == ["finished", "failed", "finished"]


def test_a_trial_that_dies_beside_others_but_not_alone_is_finished(store, marks):
    found = run_trials(trials(4), deadly_once, store, workers=2)
    assert [o.status for o in found] == ["finished"] * 4
    assert runs(marks)["a-1001"] == 2


@pytest.mark.parametrize("engine", ["serial", "loky"])
def test_trials_that_leave_or_return_nonsense_fail_alone(store, engine):
    found = run_trials(trials(5), untidy, store, workers=2, engine=engine)
    assert [o.status for o in found] == ["finished", "failed", "failed", "failed", "finished"]
    for outcome, words in zip(
        found[1:4], ("SystemExit: 3", "must return a TrialResult", "artifact 'rows'"), strict=True
    ):
        assert words in outcome.error


def test_a_store_that_breaks_while_trials_run_ends_the_run_with_its_error(store, monkeypatch):
    calls, read = [], store.get

    def breaking(trial):
        calls.append(trial)
        if len(calls) > 16:  # the first twelve look ahead, the next are asked just before a trial starts
            raise StoreError("the store is gone")
        return read(trial)

    monkeypatch.setattr(store, "get", breaking)
    with pytest.raises(StoreError, match="the store is gone"):
        run_trials(trials(12), work, store, workers=2)


def test_each_trial_is_reported_once_in_the_callers_thread(store):
    seen = []

    def note(trial, outcome):
        seen.append((trial.seed, threading.current_thread() is threading.main_thread()))

    run_trials(trials(2), work, store, engine="serial")
    run_trials([*trials(5), *trials(5)], work, store, workers=2, on_done=note)
    assert sorted(seen) == [(1000 + i, True) for i in range(5)]


def test_what_another_run_finished_meanwhile_is_taken_over(store, marks):
    first, second = trials(2)

    def other_run(trial, outcome):
        store.put(second, Outcome("finished", {"score": -1.0}))

    found = run_trials([first, second], work, store, engine="serial", on_done=other_run)
    assert found[1].metrics == {"score": -1.0}
    assert set(runs(marks)) == {"a-1000"}


def test_failed_trials_are_given_up_until_asked_for(store):
    for _ in range(MAX_ATTEMPTS + 2):
        (found,) = run_trials(trials(2)[1:], sometimes, store, engine="serial")
    assert found.attempts == MAX_ATTEMPTS
    (again,) = run_trials(trials(2)[1:], work, store, engine="serial", retry_failed=True)
    assert (again.status, again.attempts) == ("finished", MAX_ATTEMPTS + 1)


def test_what_is_stored_is_returned_even_after_the_deadline(store):
    run_trials(trials(3)[2:], work, store, engine="serial")
    found = run_trials(trials(3), work, store, engine="serial", deadline=time.monotonic() - 1)
    assert [o is None for o in found] == [True, True, False]
