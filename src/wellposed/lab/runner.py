"""`run_trials`: run what is not finished yet, in worker processes, and store every outcome as it arrives."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from .cluster import run_on_cluster
from .store import Store
from .trial import Outcome, Trial
from .worker import TrialFunction, run_one, settle_in

ENGINES = ("loky", "serial", "ray")
MAX_ATTEMPTS = 3
"""A trial that failed this often is not tried again, unless asked for."""

_DIED = "the worker process died while it ran this trial alone (killed, out of memory, or a crash in native code)"


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
    retry_failed: bool = False,
) -> list[Outcome | None]:
    """Run trials that the store does not hold, and store each outcome the moment it is there.

    A trial that raises is recorded with its traceback; an exception with an attribute `diverged = True` is recorded
    as "diverged". A worker that dies takes nothing with it: the others go on, and a trial that kills its worker
    again when it runs alone is recorded as failed. Failed trials are tried again by the next run, `MAX_ATTEMPTS`
    times in all (a full disk or a killed worker is no property of a trial; an error in its code is, and three
    tracebacks show it as well as thirty).

    Args:
        trials: what to run, in this order.
        function: runs one; a top-level function, so that worker processes can import it.
        store: where outcomes go; written by this process only.
        workers: processes, over all machines of a cluster; each uses one thread.
        engine: "loky" (processes), "serial" (this process, for debugging), "ray" (a cluster: see `run_on_cluster`).
        on_done: called in this thread after each trial is stored, also for those that were stored before.
        deadline: `time.monotonic()` value after which no trial is started.
        commit: recorded with each outcome.
        retry_failed: try failed trials again, however often they failed.

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
    run = _Run(function, store, workers, engine, on_done, deadline, commit, retry_failed)
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
        retry_failed: bool,
    ) -> None:
        self.function, self.store, self.workers, self.engine = function, store, workers, engine
        self.on_done, self.deadline, self.commit, self.retry_failed = on_done, deadline, commit, retry_failed
        self.outcomes: dict[str, Outcome] = {}
        self.attempts: dict[str, int] = {}
        self.elsewhere: list[tuple[Trial, Outcome]] = []

    def go(self, trials: Sequence[Trial]) -> None:
        waiting = list({trial.key: trial for trial in trials}.values())
        for trial in waiting:
            known = self._known(trial)
            if known is not None:
                self._report(trial, known)
        if self.engine == "serial":
            for trial in self._open(waiting):
                self._keep(trial, run_one(self.function, trial)[1])
            self._report_elsewhere()
        elif self.engine == "ray":
            self._on_cluster({trial.key: trial for trial in waiting})
        else:
            self._in_processes(waiting)

    def _on_cluster(self, waiting: Mapping[str, Trial]) -> None:
        # Closing ends what still runs, whatever ends this run.
        with contextlib.closing(
            run_on_cluster(self.function, self._open(list(waiting.values())), self.workers)
        ) as ended:
            for key, outcome in ended:
                self._keep(waiting[key], outcome)
                self._report_elsewhere()
        self._report_elsewhere()

    def _in_processes(self, waiting: Sequence[Trial]) -> None:
        with tempfile.TemporaryDirectory(prefix="wellposed-") as folder:
            marks = Path(folder)
            suspects = self._parallel(waiting, marks, self.workers)
            while suspects is not None:
                # Some worker died and took the pool with it. Those that were running are tried alone, one by one,
                # so that the guilty one is known; then the rest goes on side by side. Every turn settles a trial.
                for trial in suspects:
                    if self._parallel([trial], marks, 1) is not None:
                        self._keep(trial, Outcome("failed", error=_DIED))
                suspects = self._parallel(waiting, marks, self.workers)

    def _parallel(self, trials: Sequence[Trial], marks: Path, workers: int) -> list[Trial] | None:
        """Run trials side by side; after the death of a worker, the trials that were running then, else None."""
        waiting = {trial.key: trial for trial in trials if trial.key not in self.outcomes}
        if not waiting:
            return None
        for mark in marks.iterdir():
            mark.unlink()
        tasks = (delayed(run_one)(self.function, trial, marks) for trial in self._open(list(waiting.values())))
        try:
            for key, outcome in self._pool(workers)(tasks):
                self._keep(waiting[key], outcome)
                self._report_elsewhere()
        except BrokenProcessPool:
            running = [waiting[m.name] for m in marks.iterdir() if m.name in waiting and m.name not in self.outcomes]
            # A worker that dies between two trials leaves no mark: the first that is open is tried alone then.
            return running or [trial for key, trial in waiting.items() if key not in self.outcomes][:1] or None
        except BaseException:
            _kill_workers()
            raise
        self._report_elsewhere()
        return None

    def _pool(self, workers: int) -> Parallel:
        # Only the configuration, not Parallel itself, hands the limit of threads on to the processes.
        backend = {"inner_max_num_threads": 1, "initializer": settle_in, "initargs": (os.getpid(),)}
        with parallel_config(backend="loky", **backend):
            return Parallel(
                # joblib runs a single job in the driver itself, where a crash would take everything: two processes
                # at least, and as many trials under way as workers were asked for.
                n_jobs=max(2, workers),
                return_as="generator_unordered",
                # One trial at a time to each worker, so that the store is asked just before it starts.
                pre_dispatch=1 if workers == 1 else workers + 1,
                batch_size=1,
            )

    def _open(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """The trials that must run, asked one by one: a second run on the same store may have finished some.

        joblib draws from here in a thread of its own, so that nothing is reported from here.
        """
        for trial in trials:
            if trial.key in self.outcomes:
                continue
            if self.deadline is not None and time.monotonic() > self.deadline:
                return
            known = self._known(trial)
            if known is not None:
                self.elsewhere.append((trial, known))
            else:
                yield trial

    def _known(self, trial: Trial) -> Outcome | None:
        """The stored outcome of a trial that need not run."""
        known = self.store.get(trial)
        if known is None:
            return None
        if known.done or (known.attempts >= MAX_ATTEMPTS and not self.retry_failed):
            return known
        self.attempts[trial.key] = known.attempts
        return None

    def _keep(self, trial: Trial, outcome: Outcome) -> None:
        outcome.attempts = self.attempts.get(trial.key, 0) + 1
        outcome.commit = self.commit
        self._report(trial, self.store.put(trial, outcome))

    def _report_elsewhere(self) -> None:
        while self.elsewhere:
            self._report(*self.elsewhere.pop())

    def _report(self, trial: Trial, outcome: Outcome) -> None:
        self.outcomes[trial.key] = outcome
        if self.on_done is not None:
            self.on_done(trial, outcome)


def _kill_workers() -> None:
    # loky keeps its processes for the next call; asking for them by its own function could start new ones instead.
    executor = reusable_executor._executor
    if executor is not None:
        with contextlib.suppress(Exception):
            executor.shutdown(wait=True, kill_workers=True)
