"""A training run that a `Tuner` owns: epochs, validation, the best epoch, checkpoints; what `fit(tuner=)` does."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .batching import to_device
from .bilevel import BilevelProblem
from .checkpoint import load_checkpoint, random_state, restore_random_state, save_atomically
from .evaluation import evaluate
from .loading import EndlessBatches, as_loader, distributed, loader_state, rank, restore_loader
from .regularizer import Regularizer, check_requirements
from .step import LoopServices
from .tuner import StepInfo, Tuner

_PLAIN_ONLY = {"optimizer": None, "scheduler": None, "accumulation": 1, "clip_norm": None, "amp": None, "scaler": None}


class TunerRun:
    """One run under a tuner: everything that lives from the first step to the last.

    Args:
        options: the arguments of `fit`.
        regularizer: the method.
        make: builds the tuner from the problem.

    Raises:
        ValueError: without validation data, or for an argument that belongs to plain training.
        RequirementError: if the method requires what a tuner's loop does not provide.
    """

    def __init__(
        self, options: dict[str, Any], regularizer: Regularizer, make: Callable[[BilevelProblem], Tuner]
    ) -> None:
        _check(options)
        self.options, self.regularizer = options, regularizer
        self.criterion = options["criterion"]
        seed, size = options["seed"], options["batch_size"]
        self.loader = as_loader(options["data"], size, seed, shuffle=True)
        self.validation_loader = as_loader(options["validation"], size, seed, shuffle=True)
        # Batches to learn from are shuffled; what is measured is all of it, in order.
        self.measured = as_loader(options["validation"], 1024, None, shuffle=False)
        model = options["model"] if options["device"] is None else options["model"].to(options["device"])
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        model = regularizer.to(device).attach(model).to(device)
        self.epochs: int = options["epochs"]
        self.problem = BilevelProblem.from_regularizer(model, regularizer, self.criterion, seed=seed or 0)
        self.tuner = make(self.problem)
        provides = {"index", "optimizer", "validation", "double_backward"}
        if "on_gradients" in self.tuner.drives:
            provides |= {"closure", "gradients"}
        check_requirements(regularizer, provides, f"fit with {type(self.tuner).__name__}")
        to = partial(to_device, device=device)
        self.train_batches = EndlessBatches(self.loader, "train", to)
        self.validation_batches = EndlessBatches(self.validation_loader, "validation", to)
        self.clock = self.problem.clock
        self.clock.epochs, self.clock.total = self.epochs, self.epochs * len(self.loader)
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.seconds = 0.0
        self.best: tuple[float, int, dict[str, Any]] | None = None
        self._logged: dict[str, list[Any]] = {}
        self._validated: tuple[int, dict[str, float]] | None = None
        objective = self.problem.objective
        assert objective is not None
        self.objective = objective
        objective.validation = self.measured
        objective.services = LoopServices(
            log=lambda name, value: self._logged.setdefault(name, []).append(value),
            validate=self._validate,
            stop=lambda reason: setattr(self, "stopped", reason),
            invalidate=lambda: setattr(self, "_validated", None),
        )

    def train(self) -> nn.Module:
        """Run to the end; returns the finished, plain model."""
        path = None if self.options["checkpoint"] is None else Path(self.options["checkpoint"])
        if path is not None and path.exists():
            self._resume(path)
        started = time.perf_counter()
        while self.clock.epoch < self.epochs and self.stopped is None:
            self._on_epoch()
            if self.stopped is not None:
                break
            self._train_epoch()
            if path is not None and rank() == 0:
                save_atomically(self._state(), path)
        self.seconds = time.perf_counter() - started
        if self.best is not None:
            self.tuner.load_state_dict(self.best[2])
        self.clock.epoch = self.epochs
        self._on_epoch()
        return self.regularizer.finish(self.tuner.export())

    def _on_epoch(self) -> None:
        if not self.tuner.owns_epochs:
            self.objective.on_epoch()

    def _train_epoch(self) -> None:
        started = time.perf_counter()
        self.problem.model.train()
        losses: list[float] = []
        info = StepInfo()
        end = (self.clock.epoch + 1) * len(self.loader)
        # Batches are counted, not steps: a tuner that takes several a step must not see more data than the others.
        while self.train_batches.taken < end:
            info = self.tuner.checked_step(self.train_batches, self.validation_batches)
            self.tuner.history.append(info)
            self.clock.number = self.train_batches.taken
            if info.inner_loss is not None:
                losses.append(info.inner_loss)
        self.clock.epoch += 1
        entry: dict[str, float] = {"epoch": self.clock.epoch, "loss": sum(losses) / max(1, len(losses))}
        entry |= {k: sum(float(v) for v in values) / len(values) for k, values in self._logged.items()}
        self._logged = {}
        entry |= {name: float(value.mean()) for name, value in self.tuner.values().items()}
        entry["seconds"] = time.perf_counter() - started
        entry |= {f"validation_{name}": value for name, value in self._validate().items()}
        self.history.append(entry)
        self._keep_best(entry["validation_loss"])
        if self.options["on_epoch_end"] is not None:
            self.options["on_epoch_end"](self.objective.step(), entry)
        if self.options["progress"] and rank() == 0:
            print_progress(self.history, self.epochs)

    def _keep_best(self, loss: float) -> None:
        patience = self.options["early_stopping"]
        if patience is None:
            return
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.clock.epoch, copy.deepcopy(self.tuner.state_dict()))
        elif self.clock.epoch - self.best[1] >= patience:
            self.stopped = f"no lower validation loss for {patience} epochs; epoch {self.best[1]} is kept"

    def _validate(self) -> dict[str, float]:
        if self._validated is None or self._validated[0] != self.clock.number:
            found = evaluate(self.problem.model, self.measured, self.criterion, self.options["metrics"])
            self._validated = (self.clock.number, found)
        return self._validated[1]

    def _description(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "steps": self.clock.total,
            "regularizer": type(self.regularizer).__name__,
            "tuner": type(self.tuner).__name__,
            "hyperparameters": sorted(self.problem.hypers),
        }

    def _state(self) -> dict[str, Any]:
        return {
            "run": self._description(),
            "tuner": self.tuner.state_dict(),
            "tuner_history": self.tuner.history,
            "epoch": self.clock.epoch,
            "taken": (self.train_batches.taken, self.validation_batches.taken),
            "loaders": (loader_state(self.loader), loader_state(self.validation_loader)),
            "random": random_state(),
            "history": self.history,
            "best": self.best,
            "validated": self._validated,
        }

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path, self._description())
        self.tuner.load_state_dict(state["tuner"])
        self.tuner.history[:] = state["tuner_history"]
        self.clock.epoch = state["epoch"]
        self.clock.number = state["taken"][0]
        self.history, self.best, self._validated = state["history"], state["best"], state["validated"]
        for loader, saved in zip((self.loader, self.validation_loader), state["loaders"], strict=True):
            restore_loader(loader, saved)
        for batches, taken in zip((self.train_batches, self.validation_batches), state["taken"], strict=True):
            batches.restore(taken)
        restore_random_state(state["random"])


def _check(options: dict[str, Any]) -> None:
    if options["validation"] is None:
        raise ValueError("fit: a tuner learns on validation data; pass validation=")
    for name, default in _PLAIN_ONLY.items():
        if options[name] != default:
            raise ValueError(
                f"fit: {name} belongs to plain training, got {options[name]!r}; a tuner trains with its own optimizers: "
                "pass it to the tuner, e.g. tuner=functools.partial(SelfTuner, weight_optimizer=...)"
            )
    if distributed():
        raise ValueError("fit: a tuner runs in one process; more than one is initialised")


def print_progress(history: list[dict[str, float]], epochs: int) -> None:
    """One line an epoch, with what is left, on standard error."""
    entry = history[-1]
    shown = [f"epoch {entry['epoch']}/{epochs}", f"loss {entry['loss']:.4f}"]
    shown += [f"{k.replace('_', ' ')} {v:.4f}" for k, v in entry.items() if k.startswith("validation_")]
    left = (epochs - len(history)) * sum(e["seconds"] for e in history) / len(history)
    print("  ".join([*shown, f"{entry['seconds']:.1f} s", f"left {left:.0f} s"]), file=sys.stderr, flush=True)
