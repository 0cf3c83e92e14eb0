"""`fit`: a small, readable reference training loop that drives every hook of a `Regularizer`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from .accumulation import Accumulation
from .batching import as_batch, to_device, unwrap
from .bilevel import BilevelProblem
from .checkpoint import load_checkpoint, random_state, restore_random_state, save_atomically
from .compose import Compose
from .evaluation import Metric, evaluate
from .loading import as_loader, distributed, loader_state, rank, restore_loader, set_epoch
from .objective import Criterion, cross_entropy
from .parameters import apply_lr_factors, clip_gradients, parameter_groups, select_parameters, trainable_names
from .regularizer import Regularizer, check_requirements
from .step import DivergenceError, LoopServices, Step
from .tuner import Tuner
from .tuner_run import TunerRun, print_progress

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


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
        return _Run(options, regularizer).train()


class _Run:
    """One training run: everything that lives from the first step to the last."""

    def __init__(self, options: dict[str, Any], regularizer: Regularizer) -> None:
        self.options = options
        self.regularizer = regularizer
        self.criterion: Criterion = options["criterion"]
        self.epochs: int = options["epochs"]
        self.seed: int | None = options["seed"]
        self.loader = as_loader(options["data"], options["batch_size"], self.seed, shuffle=True)
        validation = options["validation"]
        self.validation = None if validation is None else as_loader(validation, 1024, None, shuffle=False)
        check_requirements(regularizer, self._provides(), "fit")
        self.total = self.epochs * len(self.loader)
        model = options["model"]
        if options["device"] is not None:
            model = model.to(options["device"])
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        # Moved before `attach` too, for methods that read the model's device there, and after it for their state.
        self.model = regularizer.to(self.device).attach(model).to(self.device)
        if distributed():
            self.model = DistributedDataParallel(self.model)
        self.optimizer = self._build_optimizer(options["optimizer"])
        make = options["scheduler"]
        self.scheduler = None if make is None else make(self.optimizer, self.total)
        amp = options["amp"]
        self.scaler = options["scaler"] or (
            torch.amp.GradScaler(self.device.type) if amp == torch.float16 else torch.amp.GradScaler(enabled=False)
        )
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if amp is None else partial(torch.autocast, self.device.type, dtype=amp)
        )
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if self.seed is None else self.seed)
        self.epoch = self.number = 0
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self._logged: dict[str, list[Any]] = {}
        self._validated: tuple[int, dict[str, float]] | None = None

    def train(self) -> FitResult:
        path = None if self.options["checkpoint"] is None else Path(self.options["checkpoint"])
        if path is not None and path.exists():
            self._resume(path)
        started = time.perf_counter()
        while self.epoch < self.epochs and self.stopped is None:
            self.regularizer.on_epoch(self._step())
            if self.stopped is not None:
                break
            self._train_epoch()
            if path is not None and rank() == 0:
                save_atomically(self._state(), path)
        self.epoch = self.epochs
        self.regularizer.on_epoch(self._step())
        model = self.regularizer.finish(unwrap(self.model))
        return FitResult(model, self.history, self.stopped, time.perf_counter() - started)

    def _train_epoch(self) -> None:
        started = time.perf_counter()
        set_epoch(self.loader, self.epoch)
        self.model.train()
        losses = []
        for sample in self.loader:
            losses.append(self._train_step(sample))
            self.number += 1
        if not losses:
            raise ValueError("fit: data yielded no batch")
        mean = float(torch.stack(losses).mean())
        if not mean - mean == 0.0:  # neither inf nor nan
            raise DivergenceError(
                f"fit: the training loss of epoch {self.epoch + 1} is {mean}; lower the learning rate"
            )
        self.epoch += 1
        entry = {"epoch": self.epoch, "loss": mean, **self._means()}
        # Validation is no part of the training time: an arm must not look slow because it is watched.
        entry["seconds"] = time.perf_counter() - started
        if self.validation is not None:
            entry |= {f"validation_{name}": value for name, value in self._validate().items()}
        self.history.append(entry)
        if self.options["on_epoch_end"] is not None:
            self.options["on_epoch_end"](self._step(), entry)
        if self.options["progress"] and rank() == 0:
            print_progress(self.history, self.epochs)

    def _train_step(self, sample: Any) -> Tensor:
        pool = self._step(sample)
        self.optimizer.zero_grad(set_to_none=True)
        self.regularizer.on_batch(pool)
        batch = Accumulation(
            pool,
            self.regularizer,
            self.criterion,
            self.options["accumulation"],
            backward=lambda loss: self.scaler.scale(loss).backward(),
            unscale=(lambda: 1.0 / self.scaler.get_scale()) if self.scaler.is_enabled() else None,
            synchronize=getattr(self.model, "no_sync", nullcontext),
        )
        loss = batch.run()
        self.scaler.unscale_(self.optimizer)
        if not self._will_skip():
            batch.on_gradients()
        if self.options["clip_norm"] is not None:
            clip_gradients(self.model, self.options["clip_norm"])
        skipped = self._will_skip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not skipped:
            self.regularizer.on_step(pool)
        if self.scheduler is not None:
            with warnings.catch_warnings():
                # A skipped first step is the scaler's business, not a wrong order of calls.
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
                self.scheduler.step()
        # A skipped step says nothing about divergence: the scaler lowers its scale and goes on.
        return torch.zeros_like(loss) if skipped else loss

    def _will_skip(self) -> bool:
        if not self.scaler.is_enabled():
            return False
        found = self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"]
        return any(bool(value) for value in found.values())

    def _step(self, sample: Any = None) -> Step:
        batch = None if sample is None else as_batch(to_device(sample, self.device))
        if batch is not None and batch.index is None and "index" in self.regularizer.requires:
            check_requirements(
                self.regularizer, self._provides() - {"index"}, "fit, with a loader that yields no index,"
            )
        step = Step(
            self.model,
            self.optimizer,
            epoch=self.epoch,
            epochs=self.epochs,
            number=self.number,
            total=self.total,
            generator=self.generator,
            validation=self.validation,
            services=LoopServices(
                log=self._log,
                validate=None if self.validation is None else self._validate,
                stop=self._stop,
                invalidate=self._invalidate,
                autocast=self.autocast,
            ),
        )
        if batch is not None:
            step.inputs, step.targets, step.index = batch.inputs, batch.targets, batch.index
            step.weights, step.extra = batch.weights, dict(batch.extra)
        return step

    def _provides(self) -> frozenset[str]:
        always = {"index", "closure", "gradients", "optimizer", "double_backward"}
        return frozenset(always | ({"validation"} if self.validation is not None else set()))

    def _build_optimizer(self, make: OptimizerFactory | Optimizer | None) -> Optimizer:
        wishes = self.regularizer.parameter_groups(unwrap(self.model))
        if isinstance(make, Optimizer):
            known = {id(p) for group in make.param_groups for p in group["params"]}
            unknown = [n for n, p in unwrap(self.model).named_parameters() if p.requires_grad and id(p) not in known]
            if wishes or unknown:
                reason = "asks for its own parameter groups" if wishes else f"added the parameter {unknown[0]!r}"
                raise ValueError(
                    f"fit: optimizer is already built, but the regularizer {reason}; pass a function instead, e.g. "
                    "optimizer=functools.partial(torch.optim.SGD, lr=0.1)"
                )
            return make
        optimizer = (make or torch.optim.AdamW)(parameter_groups(self.model, wishes))
        apply_lr_factors(optimizer)
        return optimizer

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        if self._validated is None or self._validated[0] != self.number:
            found = evaluate(self.model, self.validation, self.criterion, self.options["metrics"])
            self._validated = (self.number, found)
        return self._validated[1]

    def _invalidate(self) -> None:
        self._validated = None

    def _stop(self, reason: str) -> None:
        self.stopped = reason

    def _log(self, name: str, value: Any) -> None:
        self._logged.setdefault(name, []).append(value)

    def _means(self) -> dict[str, float]:
        means = {k: sum(float(v) for v in values) / len(values) for k, values in self._logged.items()}
        self._logged = {}
        return means

    def _description(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "steps": self.total,
            "accumulation": self.options["accumulation"],
            "regularizer": type(self.regularizer).__name__,
            "methods": [type(r).__name__ for r in self.regularizer] if isinstance(self.regularizer, Compose) else [],
        }

    def _state(self) -> dict[str, Any]:
        return {
            "run": self._description(),
            "model": unwrap(self.model).state_dict(),
            "trainable": trainable_names(self.model),
            "regularizer": self.regularizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "loader": loader_state(self.loader),
            "random": random_state(),
            "epoch": self.epoch,
            "number": self.number,
            "history": self.history,
            "validated": self._validated,
        }

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path, self._description())
        unwrap(self.model).load_state_dict(state["model"])
        if state["trainable"] != trainable_names(self.model):
            select_parameters(self.model, self.optimizer, state["trainable"])
        self.regularizer.load_state_dict(state["regularizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.epoch, self.number = state["epoch"], state["number"]
        self.history, self._validated = state["history"], state["validated"]
        restore_loader(self.loader, state["loader"])
        restore_random_state(state["random"])


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
