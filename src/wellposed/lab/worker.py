"""What runs inside a worker process: one trial, timed, guarded, and gone when its driver is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from .memory import PeakMemory
from .trial import Outcome, Trial, TrialResult, checked_result

TrialFunction = Callable[[Trial], TrialResult]

_LOOK_EVERY = 0.5
"""Seconds between two looks at whether the driver still lives."""


def settle_in(driver: int) -> None:
    """Prepare a worker process, before its first trial.

    Ctrl-C reaches every process of a terminal, but only the driver may decide what it ends: a worker ignores it.
    A driver that was killed cannot end anything: a worker that has lost it ends itself, in the middle of a trial.

    Args:
        driver: process id of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(driver,), daemon=True).start()


def _leave_with(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(_LOOK_EVERY)
    os._exit(1)


def run_one(
    function: TrialFunction, trial: Trial, marks: Path | None = None, in_driver: bool | None = None
) -> tuple[str, Outcome]:
    """Run one trial in this process; never raises, except KeyboardInterrupt in the driver itself.

    Args:
        function: runs the trial.
        trial: what to run.
        marks: folder of a worker process: holds a file named after the trial for as long as it runs, so that the
            driver can tell whom the death of a worker concerns.
        in_driver: whether this process is the driver; None: it is, unless there are marks.

    Returns:
        The trial's key and its outcome.
    """
    in_driver = marks is None if in_driver is None else in_driver
    mark = None if marks is None else marks / trial.key
    if mark is not None:
        mark.touch()
    if not in_driver:
        _one_thread()
    outcome = _guarded(function, trial, in_driver)
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    return trial.key, outcome


def _guarded(function: TrialFunction, trial: Trial, in_driver: bool) -> Outcome:
    memory = PeakMemory()
    memory.start()
    started = time.perf_counter()
    try:
        result = function(trial)
        seconds = time.perf_counter() - started
        result = checked_result(result)
        peak = memory.read()
        return Outcome("finished", result.metrics, result.curves, result.artifacts, seconds, peak_memory=peak)
    except BaseException as error:
        # sys.exit() in a trial, too, ends that trial only; Ctrl-C in the driver ends the run.
        if in_driver and isinstance(error, KeyboardInterrupt):
            raise
        seconds = time.perf_counter() - started
        diverged = bool(getattr(error, "diverged", False))
        return Outcome("diverged" if diverged else "failed", seconds=seconds, error=traceback.format_exc())


def _one_thread() -> None:
    # The environment holds BLAS and OpenMP to one thread; a torch that a caller's code configured is held here.
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
