"""`run_trials`: run what is not finished yet, in worker processes, and store every outcome as it arrives."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from .memory import PeakMemory
from .store import Store
from .trial import Outcome, Trial, TrialResult

TrialFunction = Callable[[Trial], TrialResult]
ENGINES = ("loky", "serial", "ray")
MAX_ATTEMPTS = 3
"""A trial that failed this often is not tried again."""


def run_trials(
    trials: Sequence[Trial],
    function: TrialFunction,
    store: Store,
    *,
    workers: int = 1,
    engine: str = "loky",
    on_done: Callable[[Trial, Outcome], None] | None = None,
    deadline: float | None = None,
    commit: str | None = None,
) -> list[Outcome | None]:
    """Run trials that the store does not hold, and store each outcome the moment it is there.

    A trial that raises is recorded with its traceback; an exception with an attribute `diverged = True` is recorded
    as "diverged". A worker that dies takes nothing with it: the others go on, and a trial that kills its worker
    again when it runs alone is recorded as failed. Failed trials are tried again by the next run, `MAX_ATTEMPTS`
    times in all.

    Args:
        trials: what to run, in this order.
        function: runs one; a top-level function, so that worker processes can import it.
        store: where outcomes go; written by this process only.
        workers: processes; each uses one thread.
        engine: "loky" (processes), "serial" (this process, for debugging), "ray" (a cluster).
        on_done: called after each trial is stored, also for those that were stored before.
        deadline: `time.monotonic()` value after which no trial is started.
        commit: recorded with each outcome.

    Returns:
        The outcome of each trial; None where the deadline came first.

    Raises:
        ValueError: for an unknown engine or workers < 1.
        StoreError: if an outcome cannot be stored.
        KeyboardInterrupt: after Ctrl-C; everything finished is stored, the workers are gone.
    """
    if engine not in ENGINES:
        raise ValueError(f"run_trials: engine must be one of {list(ENGINES)}, got {engine!r}")
    if workers < 1:
        raise ValueError(f"run_trials: workers must be >= 1, got {workers}")
    run = _Run(function, store, workers, engine, on_done, deadline, commit)
    run.go(trials)
    return [run.outcomes.get(trial.key) for trial in trials]


class _Run:
    def __init__(
        self,
        function: TrialFunction,
        store: Store,
        workers: int,
        engine: str,
        on_done: Callable[[Trial, Outcome], None] | None,
        deadline: float | None,
        commit: str | None,
    ) -> None:
        self.function, self.store, self.workers, self.engine = function, store, workers, engine
        self.on_done, self.deadline, self.commit = on_done, deadline, commit
        self.outcomes: dict[str, Outcome] = {}
        self.attempts: dict[str, int] = {}

    def go(self, trials: Sequence[Trial]) -> None:
        waiting = list({trial.key: trial for trial in trials}.values())
        if self.engine == "serial":
            for trial in self._open(waiting):
                self._keep(trial, run_one(self.function, trial, None))
            return
        with tempfile.TemporaryDirectory(prefix="wellposed-") as folder:
            marks = Path(folder)
            suspects = self._parallel(waiting, marks, self.workers)
            while suspects is not None:
                # Some worker died and took the pool with it. Those that were running are tried alone, one by one,
                # so that the guilty one is known; then the rest goes on side by side.
                for trial in suspects:
                    if self._parallel([trial], marks, 1) is not None:
                        self._keep(trial, Outcome("failed", error=_DIED))
                suspects = self._parallel(waiting, marks, self.workers)

    def _parallel(self, trials: Sequence[Trial], marks: Path, workers: int) -> list[Trial] | None:
        """Run trials side by side; after the death of a worker, the trials that were running then, else None."""
        by_key = {trial.key: trial for trial in trials}
        for mark in marks.iterdir():
            mark.unlink()
        tasks = (delayed(run_one)(self.function, trial, marks) for trial in self._open(trials))
        try:
            with _quiet_workers(), self._pool(workers) as parallel:
                for key, outcome in parallel(tasks):
                    self._keep(by_key[key], outcome)
        except BrokenProcessPool:
            running = [by_key[m.name] for m in marks.iterdir() if m.name in by_key and m.name not in self.outcomes]
            # A worker that dies between two trials leaves no mark: the first that is open is tried alone then.
            return running or [trial for trial in trials if trial.key not in self.outcomes][:1]
        except BaseException:
            _kill_workers()
            raise
        return None

    def _pool(self, workers: int) -> Parallel:
        if self.engine == "ray":
            return _ray_pool(workers)
        return Parallel(
            # joblib runs a single job in the driver itself, where a crash would take everything: two processes at
            # least, and as many trials under way as workers were asked for.
            n_jobs=max(2, workers),
            backend="loky",
            return_as="generator_unordered",
            # One trial at a time to each worker, so that the store is asked just before it starts.
            pre_dispatch=1 if workers == 1 else workers + 1,
            batch_size=1,
            inner_max_num_threads=1,
            timeout=None,
        )

    def _open(self, trials: Iterable[Trial]) -> Iterator[Trial]:
        """The trials that must run, asked one by one: a second run on the same store may have finished some."""
        for trial in trials:
            if trial.key in self.outcomes:
                continue
            known = self.store.get(trial)
            if known is not None and (known.done or known.attempts >= MAX_ATTEMPTS):
                self._report(trial, known)
                continue
            if self.deadline is not None and time.monotonic() > self.deadline:
                return
            self.attempts[trial.key] = known.attempts if known is not None else 0
            yield trial

    def _keep(self, trial: Trial, found: Outcome | tuple[str, Outcome]) -> None:
        outcome = found[1] if isinstance(found, tuple) else found
        outcome.attempts = self.attempts.get(trial.key, 0) + 1
        outcome.commit = self.commit
        self.store.put(trial, outcome)
        self._report(trial, outcome)

    def _report(self, trial: Trial, outcome: Outcome) -> None:
        self.outcomes[trial.key] = outcome
        if self.on_done is not None:
            self.on_done(trial, outcome)


_DIED = "the worker process died while it ran this trial alone (killed, out of memory, or a crash in native code)"


def run_one(function: TrialFunction, trial: Trial, marks: Path | None) -> tuple[str, Outcome]:
    """Run one trial in this process, timed and guarded; what a worker executes."""
    mark = None if marks is None else marks / trial.key
    if mark is not None:
        mark.touch()
    if "torch" in sys.modules:
        import torch

        if marks is not None:
            torch.set_num_threads(1)
    memory = PeakMemory()
    memory.start()
    started = time.perf_counter()
    try:
        result = function(trial)
        seconds = time.perf_counter() - started
        outcome = Outcome(
            "finished", result.metrics, result.curves, result.artifacts, seconds, peak_memory=memory.read()
        )
    except Exception as error:
        status = "diverged" if getattr(error, "diverged", False) else "failed"
        outcome = Outcome(status, seconds=time.perf_counter() - started, error=traceback.format_exc())  # type: ignore[arg-type]
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    return trial.key, outcome


@contextlib.contextmanager
def _quiet_workers() -> Iterator[None]:
    """Workers ignore Ctrl-C (the driver decides) and each uses one thread, from their first import on."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _kill_workers() -> None:
    with contextlib.suppress(Exception):
        get_reusable_executor().shutdown(wait=False, kill_workers=True)


def _ray_pool(workers: int) -> Any:
    try:
        from joblib import parallel_config
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ValueError("run_trials: engine 'ray' needs it installed: pip install 'wellposed[ray]'") from error
    register_ray()
    parallel_config(backend="ray")
    return Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
