"""One plain training run: steps, epochs, validation, checkpoints; what `fit` does without a tuner."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .accumulation import Accumulation
from .batching import as_batch, to_device, unwrap
from .checkpoint import load_checkpoint, random_state, restore_random_state, save_atomically
from .compose import Compose
from .evaluation import evaluate
from .loading import as_loader, distributed, loader_state, rank, restore_loader, set_epoch
from .objective import Criterion
from .parameters import apply_lr_factors, clip_gradients, parameter_groups, select_parameters, trainable_names
from .regularizer import Regularizer, check_requirements
from .step import DivergenceError, LoopServices, Step
from .tuner_run import print_progress

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class TrainingRun:
    """One plain run: everything that lives from the first step to the last.

    Args:
        options: the arguments of `fit`.
        regularizer: the method.

    Attributes:
        history: one dict an epoch.
        stopped: why training ended before its last epoch, or None.
        seconds: wall time of the epochs run by this object.

    Raises:
        ValueError: for an optimizer that is already built where the method changes the model or its groups.
        RequirementError: if the method requires what the arguments do not provide.
    """

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
        self.seconds = 0.0
        self._logged: dict[str, list[Any]] = {}
        self._validated: tuple[int, dict[str, float]] | None = None

    def train(self) -> nn.Module:
        """Train to the end, or go on from the checkpoint; returns the finished model.

        Raises:
            DivergenceError: after an epoch whose training loss was not finite.
            CheckpointError: if a checkpoint cannot be written or continued.
        """
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
        self.seconds = time.perf_counter() - started
        return model

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
