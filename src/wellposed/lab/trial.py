"""`Trial`: one training run to do, and `Outcome`: what became of it."""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Setting = str | int | float | bool
Phase = Literal["tune", "evaluate"]
FIRST_EVALUATION_SEED = 1000
"""Seeds below belong to pilots and tuning, evaluation starts here: no seed serves both."""


@dataclass(frozen=True)
class Trial:
    """One run of one arm with one configuration and one seed.

    Attributes:
        study: what is studied, e.g. the digest of a data set and its options.
        arm: name of the method or control.
        scale: "smoke", "laptop", "paper", or "compare".
        phase: "tune" (validation data only) or "evaluate".
        settings: the configuration, by name.
        seed: re-draws everything random.
        fingerprint: of the code and the versions that the result depends on.

    Example:
        >>> a = Trial("digits", "plain", "smoke", "tune", {"epochs": 1}, seed=0, fingerprint="f")
        >>> b = Trial("digits", "plain", "smoke", "tune", {"epochs": 1.0}, seed=0, fingerprint="f")
        >>> a.key == b.key, a.key == Trial("digits", "plain", "smoke", "tune", {"epochs": 2}, 0, "f").key
        (True, False)
    """

    study: str
    arm: str
    scale: str
    phase: Phase
    settings: Mapping[str, Setting]
    seed: int
    fingerprint: str

    def __post_init__(self) -> None:
        if self.phase == "tune" and not 0 <= self.seed < FIRST_EVALUATION_SEED:
            raise ValueError(f"Trial: a tuning seed must lie in [0, {FIRST_EVALUATION_SEED}), got {self.seed}")
        if self.phase == "evaluate" and self.seed < FIRST_EVALUATION_SEED:
            raise ValueError(f"Trial: an evaluation seed must be >= {FIRST_EVALUATION_SEED}, got {self.seed}")
        if self.phase not in ("tune", "evaluate"):
            raise ValueError(f"Trial: phase must be 'tune' or 'evaluate', got {self.phase!r}")
        for name, value in self.settings.items():
            if not isinstance(value, (str, bool, numbers.Real)):
                raise TypeError(f"Trial: setting {name!r} must be a text, a number or a truth value, got {value!r}")

    @property
    def key(self) -> str:
        """SHA-256 of everything that defines the trial; equal numbers give equal keys, whatever their type."""
        content = {
            "study": self.study,
            "arm": self.arm,
            "scale": self.scale,
            "phase": self.phase,
            "settings": {name: _canonical(value) for name, value in self.settings.items()},
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _canonical(value: Setting) -> Setting:
    # 1 and 1.0, 0.0 and -0.0 and their NumPy kin are one setting, and must not be run twice.
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)


@dataclass
class TrialResult:
    """What the function that runs a trial returns.

    Attributes:
        metrics: numbers by name.
        curves: one number an epoch, by name.
        artifacts: anything else that JSON can hold.
    """

    metrics: dict[str, float]
    curves: dict[str, list[float]] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)


def checked_result(result: Any) -> TrialResult:
    """A result in plain Python numbers, as the store can hold it.

    Args:
        result: what the function of a trial returned; numbers may be NumPy's or scalar tensors.

    Raises:
        TypeError: if it is no `TrialResult`, or holds what JSON cannot hold, naming it.

    Example:
        >>> import numpy as np
        >>> checked_result(TrialResult({"score": np.float32(0.5)})).metrics
        {'score': 0.5}
    """
    if not isinstance(result, TrialResult):
        raise TypeError(f"the function of a trial must return a TrialResult, got {type(result).__name__}")
    metrics = {name: _number(value, f"metric {name!r}") for name, value in result.metrics.items()}
    curves = {name: [_number(v, f"curve {name!r}") for v in curve] for name, curve in result.curves.items()}
    for name, value in result.artifacts.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"artifact {name!r} must be what JSON can hold: {error}") from error
    return TrialResult(metrics, curves, result.artifacts)


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be a number, got {value!r}") from error


@dataclass
class Outcome:
    """What became of a trial.

    Attributes:
        status: "finished", "diverged" (training left the finite numbers) or "failed".
        metrics, curves, artifacts: as in `TrialResult`.
        seconds: wall time of the trial.
        peak_memory: largest resident memory of the process in bytes, or None where it cannot be told.
        error: traceback, or None.
        attempts: how often the trial was tried.
        commit: version of the code, for the record.
    """

    status: Literal["finished", "diverged", "failed"]
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int | None = None
    error: str | None = None
    attempts: int = 1
    commit: str | None = None

    @property
    def done(self) -> bool:
        """Whether the trial need not run again: a diverged run would diverge again, a failed one may not fail."""
        return self.status != "failed"
