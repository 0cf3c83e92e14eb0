"""Trials on a Ray cluster: this machine alone, or many that were joined by `ray start`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from .fingerprint import machine
from .trial import Outcome, Trial
from .worker import TrialFunction, run_one

MAX_DEATHS = 3
"""A trial whose worker or node dies this often is recorded as failed: the deaths of others may concern it, too."""

_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
     "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS"), "1",
)  # fmt: skip

_session: tuple[Any, ...] | None = None
"""What the connection was made for, where this module made it."""


def run_on_cluster(
    function: TrialFunction, trials: Iterable[Trial], workers: int
) -> Generator[tuple[str, Outcome], None, None]:
    """Run trials as Ray tasks of one core and one thread each; yields key and outcome as they arrive.

    A connection that the caller made with `ray.init` is used as it is. Otherwise the address in the variable
    RAY_ADDRESS is used; without one, a cluster of this machine alone is started, which ends with this process. Both
    ship this package and the module of `function` to the workers, so that every machine runs the caller's code. The
    other packages must be installed there; torch and numpy in the same versions, since results belong to them.

    Args:
        function: runs one trial; a top-level function.
        trials: drawn one by one, each just before it starts.
        workers: trials under way at once, over all machines.

    Raises:
        ValueError: if ray is not installed.
        RuntimeError: if a worker has another torch or numpy.
    """
    waiting = iter(trials)
    again = list(islice(waiting, 1))
    if not again:
        return
    ray = _ray()
    _connect(ray, function, workers)
    task = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": _ONE_THREAD})(_work)
    lost = tuple(
        getattr(ray.exceptions, name)
        for name in (
            "WorkerCrashedError",
            "NodeDiedError",
            "LocalRayletDiedError",
            "OutOfMemoryError",
            "ObjectLostError",
        )
    )
    running: dict[Any, Trial] = {}
    deaths: dict[str, int] = {}
    try:
        while True:
            room = workers - len(running)
            chosen = [again.pop(0) for _ in range(min(room, len(again)))]
            for trial in (*chosen, *islice(waiting, room - len(chosen))):
                running[task.remote(function, trial, _versions())] = trial
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(done)
            try:
                result = ray.get(done)
            except lost as error:
                deaths[trial.key] = deaths.get(trial.key, 0) + 1
                if deaths[trial.key] < MAX_DEATHS:
                    again.append(trial)
                    continue
                words = f"the worker process or its machine died {MAX_DEATHS} times while it ran this trial: {error}"
                result = trial.key, Outcome("failed", error=words)
            yield result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _work(function: TrialFunction, trial: Trial, versions: dict[str, str]) -> tuple[str, Outcome]:
    """One trial, in a worker on any machine."""
    if (found := _versions()) != versions:
        raise RuntimeError(f"a worker of the cluster has {found}, but the driver {versions}: install the same versions")
    return run_one(function, trial, in_driver=False)


def _versions() -> dict[str, str]:
    here = machine()
    return {name: here[name] for name in ("torch", "numpy")}


def _ray() -> Any:
    # Whether a study runs, and where, is nobody else's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ImportError as error:
        raise ValueError("run_trials: engine 'ray' needs it installed: pip install 'wellposed[ray]'") from error


def _connect(ray: Any, function: TrialFunction, workers: int) -> None:
    global _session
    address = os.environ.get("RAY_ADDRESS")
    wanted = (address, None if address else workers, *_modules(function))
    if ray.is_initialized():
        if _session is None or _session[0] != ray.get_runtime_context().get_job_id() or _session[1:] == wanted:
            return
        ray.shutdown()
    where = {"address": address} if address else {"address": "local", "num_cpus": workers, "include_dashboard": False}
    code = {"py_modules": list(_modules(function)), "excludes": ["**/__pycache__"]}
    ray.init(**where, runtime_env=code, log_to_driver=False, logging_level="warning")
    _session = (ray.get_runtime_context().get_job_id(), *wanted)


def _modules(function: Callable[..., Any]) -> tuple[str, ...]:
    """Files or folders of this package and of the top package that defines a function."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    found = []
    for name in sorted({__name__.split(".")[0], function.__module__.split(".")[0]} - {"__main__"}):
        path = Path(str(sys.modules[name].__file__))
        found.append(str(path.parent if path.name == "__init__.py" else path))
    return tuple(found)
