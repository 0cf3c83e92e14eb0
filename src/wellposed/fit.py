"""`fit`: a small, readable reference training loop that drives every hook of a `Regularizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from .bilevel import BilevelProblem
from .checkpoint import random_state, restore_random_state
from .compose import Compose
from .evaluation import Metric
from .objective import Criterion, cross_entropy
from .regularizer import Regularizer
from .step import Step
from .training_run import OptimizerFactory, SchedulerFactory, TrainingRun
from .tuner import Tuner
from .tuner_run import TunerRun


@dataclass
class FitResult:
    """What training left behind.

    Attributes:
        model: the finished, plain model.
        history: one dict an epoch: `epoch` (from 1), `loss` (training objective), `seconds`, `validation_*`
            metrics, and whatever methods logged.
        stopped: why training ended before its last epoch, or None.
        seconds: wall time of the training epochs run by this call.
        tuner: the tuner that trained, with its history and schedule; None in plain training.
    """

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0
    tuner: Tuner | None = None


def fit(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    *,
    epochs: int,
    regularizer: Regularizer | None = None,
    criterion: Criterion = cross_entropy,
    optimizer: OptimizerFactory | Optimizer | None = None,
    scheduler: SchedulerFactory | None = None,
    batch_size: int = 64,
    accumulation: int = 1,
    clip_norm: float | None = None,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    validation: Dataset[Any] | Iterable[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    early_stopping: int | None = None,
    device: torch.device | str | None = None,
    seed: int | None = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    on_epoch_end: Callable[[Step, dict[str, float]], None] | None = None,
    tuner: Callable[[BilevelProblem], Tuner] | None = None,
) -> FitResult:
    """Train `model` on `data` under a regularizer.

    Args:
        model: any module; the regularizer's `attach` may replace it.
        data: a map-style dataset (it is indexed, shuffled by `seed` and batched here), or a loader with a length
            that yields `(inputs, targets)`, `(inputs, targets, index)` or a dict with these names.
        epochs: number of passes over the data, at least 1.
        regularizer: the method, or a `Compose` of several; None for plain training.
        criterion: unreduced task loss `(outputs, targets) -> (batch,) or (batch, length)`; cross-entropy by
            default, `wellposed.squared_error` for regression.
        optimizer: a function of parameter groups, e.g. `partial(torch.optim.SGD, lr=0.1)`; AdamW by default. An
            optimizer that is already built is accepted where no method changes the model or its groups.
        scheduler: a function `(optimizer, total_steps) -> scheduler`, stepped after every optimizer step.
        batch_size: examples per optimizer step where `data` is a dataset.
        accumulation: micro-batches into which each batch is cut; gradients do not depend on it.
        clip_norm: largest global gradient norm, applied after `on_gradients`; per network of a `Pair`.
        amp: autocast dtype, `torch.bfloat16` or `torch.float16` (with a gradient scaler).
        scaler: a gradient scaler of your own.
        validation: dataset or loader; its metrics enter the history as `validation_*`.
        metrics: further metrics by name, `(outputs, targets) -> number`.
        early_stopping: keep the weights with the lowest validation loss, and stop after this many epochs
            without a lower one.
        device: where to train; the model's own device by default.
        seed: of the order of a dataset, of dropout and of the methods; the caller's random state is given back.
            None: use the global random state as it is.
        progress: print one line an epoch.
        checkpoint: file written after every epoch; if it exists, the run continues from it, bit for bit.
        on_epoch_end: called with the step and the epoch's history entry.
        tuner: a function `BilevelProblem -> Tuner`, e.g. `wellposed.tuning.SelfTuner`. The tuner then trains the
            parameters with its own optimizers and learns the regularizer's hyperparameters on `validation`, which it
            needs; it takes as many training batches as plain training would. What it learned is in
            `result.tuner` and, by epoch, in the history. With `early_stopping`, the best epoch is kept with its
            hyperparameters. `optimizer`, `scheduler`, `accumulation`, `clip_norm`, `amp` and `scaler` belong to
            plain training and are refused.

    Returns:
        `FitResult`, with the finished model.

    Raises:
        ValueError: for an argument out of range, naming it.
        RequirementError: if the regularizer requires what this call does not provide.
        DivergenceError: after an epoch whose training loss was not finite.
        CheckpointError: if a checkpoint cannot be written or continued.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator ...>
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 5), torch.arange(64) % 2)
        >>> result = fit(nn.Linear(5, 2), data, epochs=2, batch_size=16)
        >>> [entry["epoch"] for entry in result.history]
        [1, 2]
    """
    options = dict(locals())
    _check(options)
    if tuner is not None:
        with _seeded(seed):
            run = TunerRun(options, regularizer or Regularizer(), tuner)
            return FitResult(run.train(), run.history, run.stopped, run.seconds, run.tuner)
    regularizer = _with_early_stopping(regularizer or Regularizer(), early_stopping)
    with _seeded(seed):
        plain = TrainingRun(options, regularizer)
        return FitResult(plain.train(), plain.history, plain.stopped, plain.seconds)


def _check(options: dict[str, Any]) -> None:
    for name in ("epochs", "batch_size", "accumulation"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ValueError(f"fit: {name} must be an integer >= 1, got {options[name]!r}")
    if options["clip_norm"] is not None and not options["clip_norm"] > 0:
        raise ValueError(f"fit: clip_norm must be > 0, got {options['clip_norm']!r}")
    if options["amp"] not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"fit: amp must be None, torch.bfloat16 or torch.float16, got {options['amp']!r}")
    patience = options["early_stopping"]
    if patience is not None and (patience < 1 or options["validation"] is None):
        raise ValueError(f"fit: early_stopping must be >= 1 and needs validation=, got {patience!r}")
    regularizer = options["regularizer"]
    if regularizer is not None and not isinstance(regularizer, Regularizer):
        raise TypeError(f"fit: regularizer must be a Regularizer, got {type(regularizer).__name__}")
    if regularizer is not None and regularizer.coupled and options["accumulation"] > 1:
        warnings.warn(
            f"{type(regularizer).__name__} couples the examples of a batch; with accumulation="
            f"{options['accumulation']} it sees each micro-batch by itself",
            stacklevel=3,
        )


def _with_early_stopping(regularizer: Regularizer, patience: int | None) -> Regularizer:
    if patience is None:
        return regularizer
    from .weights import EarlyStopping

    return Compose(regularizer, EarlyStopping(patience=patience))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seeded global random state inside the block, the caller's own after it."""
    if seed is None:
        yield
        return
    before = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        restore_random_state(before)
