"""Trials on real Ray clusters: one of this machine alone, and one of two nodes that was started separately."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from trial_functions import deadly, deadly_once, noted, slow_once, sometimes, threads, trials, where, work

from wellposed.lab import cluster
from wellposed.lab.runner import run_trials
from wellposed.lab.store import Store

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Said before ray is imported: else only those processes ask for a token in which `ray.init` started a cluster.
os.environ["RAY_AUTH_MODE"] = "token"
ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
# One after another: clusters that start side by side on one host get into each other's way.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def marks(tmp_path_factory, monkeypatch):
    """One folder for all tests of this file: a cluster keeps the environment that it was started with."""
    folder = tmp_path_factory.getbasetemp() / "marks"
    folder.mkdir(exist_ok=True)
    for mark in folder.iterdir():
        mark.unlink()
    monkeypatch.setenv("WELLPOSED_TEST_MARKS", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "trials.sqlite")


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left():
    command = [str(Path(sys.executable).with_name("ray")), "get-auth-token", "--generate"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    yield
    ray.shutdown()


def runs(marks):
    return {path.name: len(path.read_text()) for path in marks.iterdir()}


def content(outcome):
    return outcome.status, outcome.metrics, outcome.curves, outcome.artifacts


def driver(path):
    command = [sys.executable, str(SUPPORT / "trial_functions.py"), str(path), "4", "600", "ray"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(path):
    for _ in range(1200):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path.name}: the trial did not begin")


def all_end(pids):
    """Whether processes end. Ray's own helpers of a killed driver look only once a minute whether it lives."""
    alive = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            alive.append(psutil.Process(pid))
    for _ in range(1500):
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_a_cluster_of_this_machine_gives_what_the_serial_engine_gives_and_runs_nothing_twice(store, tmp_path, marks):
    serial = run_trials(trials(4), work, Store(tmp_path / "serial.sqlite"), engine="serial")
    assert [o.metrics["score"] for o in serial] == [1000, 1001, 1002, 1003]
    first = run_trials(trials(3), work, store, workers=2, engine="ray")
    again = run_trials(trials(4), work, store, workers=2, engine="ray")
    assert [content(o) for o in again] == [content(o) for o in serial]
    assert [content(o) for o in first] == [content(o) for o in serial[:3]]
    assert runs(marks) == {"a-1000": 2, "a-1001": 2, "a-1002": 2, "a-1003": 2}  # one of them serial


def test_a_trial_that_raises_on_a_cluster_is_recorded_with_its_traceback(store):
    found = run_trials(trials(5), sometimes, store, workers=2, engine="ray")
    assert [o.status for o in found] == ["finished", "failed", "diverged", "finished", "finished"]
    assert "Traceback" in found[1].error
    assert "this trial is broken" in found[1].error


def test_a_trial_that_kills_every_worker_fails_alone_and_one_that_kills_once_is_finished(store, marks):
    found = run_trials(trials(4), deadly, store, workers=2, engine="ray")
    assert [o.status for o in found] == ["finished", "failed", "finished", "finished"]
    assert f"died {cluster.MAX_DEATHS} times" in found[1].error
    found = run_trials(trials(4, arm="b"), deadly_once, store, workers=2, engine="ray")
    assert [o.status for o in found] == ["finished"] * 4


@pytest.mark.parametrize("variable", ["1", "2"])
def test_workers_of_a_cluster_use_one_thread_whatever_the_driver_uses(store, monkeypatch, variable):
    ray.shutdown()  # the cluster starts anew with this environment
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    (found,) = run_trials(trials(1), threads, store, engine="ray")
    assert found.metrics == {"threads": 1.0, "omp": 1.0}


def test_a_connection_of_the_caller_is_used_and_left_open(store):
    ray.shutdown()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"py_modules": [str(SUPPORT / "trial_functions.py")]},
    )
    job = ray.get_runtime_context().get_job_id()
    found = run_trials(trials(2), work, store, workers=2, engine="ray")
    assert [o.status for o in found] == ["finished"] * 2
    assert ray.get_runtime_context().get_job_id() == job
    ray.shutdown()


def test_workers_with_other_versions_are_refused(store, monkeypatch):
    monkeypatch.setattr(cluster, "_versions", lambda: {"torch": "0.1", "numpy": "0.1"})
    with pytest.raises(RuntimeError, match="a worker of the cluster has .*, but the driver .*'torch': '0.1'"):
        run_trials(trials(2), work, store, workers=2, engine="ray")
    assert store.outcomes() == []


def test_an_error_in_the_driver_ends_the_trials_that_run(store, marks):
    def stop(trial, outcome):
        wait_for(marks / "pid-b-1000")
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        both = [*trials(1, arm="b", seconds=600), *trials(1)]
        run_trials(both, noted, store, workers=2, engine="ray", on_done=stop)
    assert ray.is_initialized()
    assert all_end([int(wait_for(marks / "pid-b-1000"))])


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_is_interrupted_or_killed_takes_its_own_cluster_with_it(tmp_path, marks, sent):
    process = driver(tmp_path / "trials.sqlite")
    for seed in (1000, 1001):
        wait_for(marks / f"pid-a-{seed}")
    cluster_processes = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(cluster_processes) > 3
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal sends it
    else:
        process.kill()
    _, errors = process.communicate(timeout=240)
    assert sent == signal.SIGKILL or errors.count("KeyboardInterrupt") == 1
    assert all_end(cluster_processes)


# A cluster that was started separately: a head without cores and two nodes of one core each, as on three machines.


class Nodes:
    """The nodes of a cluster on this host, each started by a `ray start` of its own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.started = folder, []
        self.start("--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false")
        for number in (1, 2):
            self.start(f"--address={self.address}", "--num-cpus=1", f"--node-name=node{number}")

    def start(self, *arguments):
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *arguments]
        log = self.folder / f"node{len(self.started)}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        common = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        with log.open("w") as out:
            process = subprocess.Popen([*command, *common], env=environment, stdout=out, stderr=subprocess.STDOUT)
        self.started.append(process)
        for _ in range(900):
            if "Ray runtime started" in log.read_text():
                return
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    def lose(self, pid):
        """The machine on which a process runs falls silent: its node manager, and with it all its workers."""
        raylet = next(parent for parent in psutil.Process(pid).parents() if parent.name() == "raylet")
        ours = [child.pid for process in self.started for child in psutil.Process(process.pid).children()]
        assert raylet.pid in ours
        raylet.kill()

    def end(self):
        for process in reversed(self.started):
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(timeout=60)
            for member in psutil.wait_procs(family, timeout=20)[1]:
                member.kill()


@pytest.fixture
def nodes(marks, tmp_path, monkeypatch):
    ray.shutdown()
    with contextlib.ExitStack() as stack:
        found = Nodes(tmp_path)
        stack.callback(found.end)
        stack.callback(ray.shutdown)
        monkeypatch.setenv("RAY_ADDRESS", found.address)
        yield found


def test_two_nodes_share_the_trials_and_give_what_one_process_gives(nodes, store, tmp_path, marks):
    wanted = trials(6, seconds=0.5)
    found = run_trials(wanted, where, store, workers=2, engine="ray")
    assert [o.metrics for o in found] == [{"score": 1000.0 + i, "threads": 1.0, "omp": 1.0} for i in range(6)]
    names = {o.artifacts["node"] for o in found}
    assert len(names) == 2
    assert len({o.artifacts["pid"] for o in found}) >= 2
    assert set(runs(marks).values()) == {1}


def test_the_trial_of_a_lost_node_is_run_again_on_another(nodes, store, marks):
    watcher = threading.Thread(target=lambda: nodes.lose(int(wait_for(marks / "pid-a-1000"))))
    watcher.start()
    found = run_trials(trials(4), slow_once, store, workers=2, engine="ray")
    watcher.join()
    assert [o.status for o in found] == ["finished"] * 4
    assert runs(marks)["a-1000"] == 2
    # The trial may be done before the cluster has given the node up.
    for _ in range(600):
        if (alive := sum(node["Alive"] for node in ray.nodes())) == 2:
            break
        time.sleep(0.1)
    assert alive == 2


def test_a_driver_that_is_interrupted_or_killed_leaves_no_trial_on_the_cluster(nodes, tmp_path, marks):
    for sent in (signal.SIGINT, signal.SIGKILL):
        for mark in marks.iterdir():
            mark.unlink()
        process = driver(tmp_path / f"{sent}.sqlite")
        pids = [int(wait_for(marks / f"pid-a-{seed}")) for seed in (1000, 1001)]
        process.send_signal(sent)
        _, errors = process.communicate(timeout=240)
        assert process.returncode != 0
        assert sent == signal.SIGKILL or errors.count("KeyboardInterrupt") == 1
        assert all_end(pids)
        assert all(node.poll() is None for node in nodes.started)
