"""`TrainingObjective`: the training loss of a model under a method as a function of its parameters, for tuners.

A tuner evaluates the training loss several times a step, at several parameters, and differentiates it in the
hyperparameters; the hooks of a method that write state run only when the tuner says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batching import as_batch, batch_size, call_model, unwrap
from .objective import Criterion, objective
from .regularizer import Regularizer
from .step import (
    LoopServices,
    Step,
    collect_records,
    copied_buffers,
    mode,
    random_numbers,
    restore_random_numbers,
)


@dataclass
class Clock:
    """Where a run stands, as hooks see it: see `Step`."""

    epoch: int = 0
    epochs: int = 1
    number: int = 0
    total: int = 1


class TrainingObjective(nn.Module):
    """Model, method and task loss as one module, so that `functional_call` swaps the parameters for all of them.

    Args:
        model: the network, as the method's `attach` returned it.
        regularizer: the method.
        criterion: unreduced task loss.
        seed: of the method's random numbers.

    Attributes:
        clock: the loop's position; the loop advances it.
        last: the step of the last training evaluation, until `on_step`.
        services, validation, optimizer: what the loop lends to the hooks.

    Example:
        >>> from wellposed.objective import cross_entropy
        >>> whole = TrainingObjective(nn.Linear(2, 2), Regularizer(), cross_entropy)
        >>> whole((torch.zeros(1, 2), torch.tensor([0])), False).shape
        torch.Size([])
    """

    def __init__(self, model: nn.Module, regularizer: Regularizer, criterion: Criterion, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        # In a list, so that the regularizer's own parameters and buffers are not swapped.
        self._rest: list[Any] = [regularizer, criterion]
        self.clock = Clock()
        self.services = LoopServices()
        self.validation: Any = None
        self.optimizer: Any = None
        self.generator = torch.Generator().manual_seed(seed)
        self._draw = 0
        self.last: Step | None = None
        self._random: dict[str, Tensor] | None = None
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._replays = "on_gradients" in regularizer.acts_in
        self.begin()

    @property
    def regularizer(self) -> Regularizer:
        """The method."""
        return self._rest[0]  # type: ignore[no-any-return]

    def begin(self) -> None:
        """New random numbers for the method; until the next call, every evaluation of a batch draws the same."""
        self._draw = int(torch.randint(2**62, (), generator=self.generator))

    def step(self, sample: Any = None) -> Step:
        """The argument of a hook: this batch, or none, at the loop's present position."""
        clock = self.clock
        step = Step(
            self.model, self.optimizer, epoch=clock.epoch, epochs=clock.epochs, number=clock.number, total=clock.total,
            generator=torch.Generator().manual_seed(self._draw), validation=self.validation, services=self.services,
        )  # fmt: skip
        if sample is not None:
            batch = as_batch(sample)
            step.inputs, step.targets, step.index = batch.inputs, batch.targets, batch.index
            step.weights, step.extra = batch.weights, dict(batch.extra)
        return step

    def forward(self, sample: Any, training: bool) -> Tensor:
        """The scalar loss of a batch: under the method in training mode, or the plain task loss in evaluation mode."""
        regularizer, criterion = self._rest
        step = self.step(sample)
        if training:
            if self._replays:
                self._random = random_numbers(self._device)
            # Inside the evaluation, so that a strength which acts on inputs or targets has a derivative.
            regularizer.on_batch(step)
        with mode(self.model, training), collect_records() as records, step.services.autocast():
            step.outputs = call_model(self.model, step.inputs)
        step.records = records
        valid = step.valid
        step.num_examples = batch_size(step)
        step.normalizer = float(step.num_examples if valid is None else max(1, int(valid.sum())))
        if training:
            self.last = step
        return objective(step, regularizer if training else Regularizer(), criterion)

    def _last_step(self, owner: str) -> Step:
        if self.last is None:
            raise RuntimeError(f"{owner}: no training evaluation was made yet")
        return self.last

    @torch.no_grad()
    def write_state(self) -> None:
        """Run `on_backward` on the last training evaluation: tables are written once a training step."""
        step = self._last_step("TrainingObjective.write_state")
        self.regularizer.on_backward(step)
        # The graph is gone by now; let go of the activations that outputs and records hold.
        step.outputs, step.records = None, {}

    def on_gradients(self, evaluate: Callable[[], Tensor]) -> None:
        """Run `on_gradients` between the backward pass and the optimizer's step.

        Args:
            evaluate: the training loss of the same batch again, to call backward on; used by `step.closure()`.
        """
        if not self._replays:
            return
        step = self._last_step("TrainingObjective.on_gradients")
        start = self._random

        def closure() -> Tensor:
            for parameter in self.model.parameters():
                parameter.grad = None
            before = random_numbers(self._device)
            assert start is not None
            restore_random_numbers(start, self._device)
            with torch.enable_grad(), copied_buffers(self.model):
                loss = evaluate()
                loss.backward()  # type: ignore[no-untyped-call]
            restore_random_numbers(before, self._device)
            return loss.detach()

        self.services.closure = closure
        step.services = self.services
        try:
            self.regularizer.on_gradients(step)
        finally:
            self.services.closure = None

    def on_step(self) -> None:
        """Run `on_step` after the parameters moved, and forget the evaluation."""
        step = self._last_step("TrainingObjective.on_step")
        self.regularizer.on_step(step)
        self.last = None

    def on_epoch(self) -> None:
        """Run `on_epoch` at the start of an epoch, and once at the end."""
        self.regularizer.on_epoch(self.step())

    def run_state(self) -> dict[str, Any]:
        """The random numbers and the method's own state; the model is the loop's to save."""
        return {"regularizer": self.regularizer.state_dict(), "generator": self.generator.get_state()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Continue from `run_state`."""
        self.regularizer.load_state_dict(state["regularizer"])
        self.generator.set_state(state["generator"])


def bare(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of a model by name."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
