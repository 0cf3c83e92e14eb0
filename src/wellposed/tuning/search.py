"""`Search`: whole trainings under proposed hyperparameters, the best of which is kept; the base of search tuners."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..bilevel import BilevelProblem
from ..parameters import select_parameters, trainable_names
from ..step import DivergenceError
from ..training_objective import Clock
from ..tuner import STATE_HOOKS, StepInfo, Tuner
from .search_box import choose_boxes, proposed_value
from .search_trial import SearchTrial, Status
from .snapshot import Snapshot
from .training_step import OptimizerFactory, SchedulerFactory, build_optimizer, training_step
from .validation_loss import pass_length, validation_loss

Checkpoint = tuple[float, int, int, Snapshot]
"""Validation loss, number of the trial, training steps, state."""


class Search(Tuner):
    """Trains again and again from the same initial state, each time under other hyperparameters; keeps the best.

    Every `step` is one training step of the trial under way, with one training batch. A trial begins with the initial
    parameters, buffers and state of the method, a new optimizer, and what `propose` returns; the first begins with
    the hyperparameters' initial values, so that a search never does worse on validation data than leaving them alone.
    The method's hooks see the trial's own clock: epochs and steps count from 0 in every trial.

    After every `evaluate_every` steps, and after the last, the validation loss is measured; the checkpoint with the
    lowest is the trial's result, so that every trial is stopped early for free. `export` (which `fit` calls) loads the
    best checkpoint of all trials: parameters, buffers, state of the method, and hyperparameters. A trial whose loss is
    not finite ends there and counts as the worst.

    Args:
        problem: both losses.
        steps_per_trial: training steps of a whole training.
        weight_optimizer: makes the optimizer of the parameters; AdamW by default.
        boxes: name -> (low, high) or (low, high, log), where proposals lie; a hyperparameter's own range by default.
            An infinite range needs a box. See `search_box.choose_boxes`.
        evaluate_every: training steps between evaluations; at the end of a trial only by default.
        validation_batches: batches of an evaluation; all of the loader's by default, or 1 where it does not tell.
        weight_scheduler: `(optimizer, steps) -> scheduler`, stepped after every training step.
        clip_norm: largest global norm of the gradient.

    Attributes:
        trials: all trials so far, the one under way included.

    Raises:
        ValueError: for an argument out of range, naming it.
        DivergenceError: from `export`, if every trial diverged.
    """

    drives = frozenset(STATE_HOOKS)
    owns_epochs = True

    def __init__(
        self,
        problem: BilevelProblem,
        steps_per_trial: int,
        *,
        weight_optimizer: OptimizerFactory | None = None,
        boxes: Mapping[str, tuple[Any, ...]] | None = None,
        evaluate_every: int | None = None,
        validation_batches: int | None = None,
        weight_scheduler: SchedulerFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        owner = type(self).__name__
        for name, count in (("steps_per_trial", steps_per_trial), ("evaluate_every", evaluate_every),
                            ("validation_batches", validation_batches)):  # fmt: skip
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{owner}: {name} must be an integer >= 1, got {count!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"{owner}: clip_norm must be > 0, got {clip_norm!r}")
        super().__init__(problem)
        self.boxes = choose_boxes(problem.hypers, boxes, owner)
        self.steps_per_trial = steps_per_trial
        self.evaluate_every = evaluate_every or steps_per_trial
        self.validation_batches = validation_batches
        self.clip_norm = clip_norm
        self._factories = weight_optimizer, weight_scheduler
        self.trials: list[SearchTrial] = []
        self.clock = Clock()
        self._epoch_steps = steps_per_trial
        self._stopped = self._exported = False
        self._initial = Snapshot.take(problem)
        self._best: Checkpoint | None = None
        self._best_of_trial: Checkpoint | None = None
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None

    @abstractmethod
    def propose(self, history: Sequence[SearchTrial]) -> dict[str, Tensor]:
        """Values inside `boxes` for the next trial: one tensor for each hyperparameter, of its shape."""

    def observe(self, trial: SearchTrial) -> None:
        """Learn from a trial that has ended, whether finished, pruned or diverged."""

    def prune(self, trial: SearchTrial) -> bool:
        """Whether to end a trial early, asked after each of its evaluations but the last."""
        return False

    def proposer_state(self) -> Any:
        """What an exact continuation of the proposals needs beside the trials."""
        return None

    def load_proposer_state(self, state: Any) -> None:
        """Continue from `proposer_state`."""

    @property
    def best(self) -> SearchTrial | None:
        """The trial with the lowest validation loss so far."""
        found = self._best_so_far()
        return None if found is None else self.trials[found[1]]

    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        with self._own_clock():
            self._exported = False
            moved = not self._running
            trial = self.trials[-1] if self._running else self._begin_trial(train)
            self._begin_epoch(trial)
            if self._stopped:
                outer = self._evaluate(trial, validation)
                return self._end_trial(trial, "diverged" if outer is None else "finished", None, outer, moved)
            loss = self._train_step(next(train))
            trial.steps += 1
            self.clock.number = trial.steps
            if not math.isfinite(loss):
                return self._end_trial(trial, "diverged", None, None, moved)
            last = trial.steps == self.steps_per_trial
            if not last and trial.steps % self.evaluate_every:
                return self._info(trial, loss, None, moved)
            outer = self._evaluate(trial, validation)
            if outer is None:
                return self._end_trial(trial, "diverged", loss, None, moved)
            if last or self.prune(trial):
                return self._end_trial(trial, "finished" if last else "pruned", loss, outer, moved)
            return self._info(trial, loss, outer, moved)

    def _train_step(self, batch: Any) -> float:
        assert self.optimizer is not None
        try:
            loss = training_step(self.problem, self.optimizer, batch, self.clip_norm)
        except DivergenceError:  # a method saw it first
            return math.inf
        if self.scheduler is not None:
            self.scheduler.step()
        return float(loss)

    @property
    def _running(self) -> bool:
        return bool(self.trials) and self.trials[-1].status == "running"

    def _begin_trial(self, train: Iterator[Any]) -> SearchTrial:
        number = len(self.trials)
        proposed = self.propose(self.trials) if number else None
        self._initial.restore(self.problem)
        if proposed is not None:
            for name, h in self.problem.hypers.items():
                h.set_(proposed_value(h, proposed[name]))
        # Continuous values, also of a discrete hyperparameter.
        values = {n: h.from_raw(h.raw).detach().cpu().clone() for n, h in self.problem.hypers.items()}
        self.trials.append(SearchTrial(number, values))
        self._best_of_trial, self._stopped = None, False
        self._epoch_steps = pass_length(train) or self.steps_per_trial
        self.clock.epoch, self.clock.number, self.clock.total = 0, 0, self.steps_per_trial
        self.clock.epochs = max(1, math.ceil(self.steps_per_trial / self._epoch_steps))
        self._build_optimizer()
        return self.trials[-1]

    def _build_optimizer(self) -> None:
        make, schedule = self._factories
        self.optimizer = build_optimizer(self.problem, make)
        self.scheduler = None if schedule is None else schedule(self.optimizer, self.steps_per_trial)

    def _begin_epoch(self, trial: SearchTrial) -> None:
        """Run the method's `on_epoch` where an epoch of the trial begins; it may stop the trial, not the search."""
        if (objective := self.problem.objective) is None or trial.steps % self._epoch_steps:
            return
        self.clock.epoch = trial.steps // self._epoch_steps
        services = objective.services
        if services.invalidate is not None:
            services.invalidate()  # what the loop measured may belong to another trial
        objective.services = replace(services, stop=lambda reason: setattr(self, "_stopped", trial.steps > 0))
        try:
            objective.on_epoch()
        finally:
            objective.services = services

    def _end_trial(
        self, trial: SearchTrial, status: Status, inner: float | None, outer: float | None, moved: bool
    ) -> StepInfo:
        trial.status = status
        if status != "diverged":
            self._best = self._best_so_far()
        self._best_of_trial = None
        self.observe(trial)
        return self._info(trial, inner, outer, moved)

    def _info(self, trial: SearchTrial, inner: float | None, outer: float | None, moved: bool) -> StepInfo:
        extra = {"trial": float(trial.number)} | ({"diverged": 1.0} if trial.status == "diverged" else {})
        return StepInfo(inner, outer, self.recorded_values() if moved else {}, extra)

    def _evaluate(self, trial: SearchTrial, validation: Iterator[Any]) -> float | None:
        """Validation loss, None if not finite; keeps the checkpoint if it is the trial's best."""
        found = validation_loss(self.problem, validation, self.validation_batches)
        if not math.isfinite(found):
            return None
        trial.losses.append((trial.steps, found))
        if self._best_of_trial is None or found < self._best_of_trial[0]:
            self._best_of_trial = (found, trial.number, trial.steps, Snapshot.take(self.problem))
        return found

    def _best_so_far(self) -> Checkpoint | None:
        return min(filter(None, (self._best, self._best_of_trial)), key=lambda best: best[0], default=None)

    def export(self) -> nn.Module:
        """Load the best checkpoint, run the method's closing `on_epoch` on it, and return the network.

        A trial under way ends here: the next `step` begins a new one.

        Raises:
            DivergenceError: if every trial diverged.
            RuntimeError: before the first evaluation.
        """
        if self._exported:
            return self.problem.model
        best = self._best_so_far()
        if best is None:
            if self.trials and all(trial.status == "diverged" for trial in self.trials):
                raise DivergenceError(f"{type(self).__name__}: all {len(self.trials)} trials diverged")
            raise RuntimeError(
                f"{type(self).__name__}.export: no trial was evaluated yet; take at least {self.evaluate_every} steps"
            )
        if self._running:
            self._end_trial(self.trials[-1], "pruned", None, None, False)
        best[3].restore(self.problem)
        if self.problem.objective is not None:
            with self._own_clock():
                self.clock.epoch, self.clock.number = self.clock.epochs, best[2]
                if (invalidate := self.problem.objective.services.invalidate) is not None:
                    invalidate()
                self.problem.objective.on_epoch()
        self._exported = True
        return self.problem.model

    @contextmanager
    def _own_clock(self) -> Iterator[None]:
        """Inside the block the method's hooks see the trial's position, not that of the search."""
        if (objective := self.problem.objective) is None:
            yield
            return
        loops, objective.clock = objective.clock, self.clock
        try:
            yield
        finally:
            objective.clock = loops

    def extra_state(self) -> dict[str, Any]:
        """Trials, snapshots and the optimizer of the trial under way."""
        return {
            "trials": copy.deepcopy(self.trials),
            "initial": self._initial,
            "best": self._best,
            "best_of_trial": self._best_of_trial,
            "proposer": self.proposer_state(),
            "clock": copy.copy(self.clock),
            "epoch_steps": self._epoch_steps,
            "optimizer": None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            "trainable": trainable_names(self.problem.model),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from `extra_state`, in the middle of a trial."""
        self.trials = copy.deepcopy(state["trials"])
        self._initial, self._best, self._best_of_trial = state["initial"], state["best"], state["best_of_trial"]
        self.load_proposer_state(state["proposer"])
        self.clock = copy.copy(state["clock"])
        self._epoch_steps = state["epoch_steps"]
        self._stopped = self._exported = False
        if state["optimizer"] is not None:
            self._build_optimizer()
            assert self.optimizer is not None
            if trainable_names(self.problem.model) != state["trainable"]:
                select_parameters(self.problem.model, self.optimizer, state["trainable"])
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
