"""`Accumulation`: one optimizer step's micro-batches, their first evaluation, and the closure that repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .batching import batch_size, call_model, cut
from .objective import Criterion, objective
from .regularizer import Regularizer
from .step import Step, collect_records, copied_buffers, random_numbers, restore_random_numbers


class Accumulation:
    """The micro-batches of one optimizer step. `fit` and every adapter drive a training step through it.

    The caller runs `on_batch`, builds an `Accumulation` of the pool, evaluates each micro-batch, and calls
    `on_gradients` before clipping.

    Args:
        pool: the step with the whole batch, after `on_batch`.
        regularizer: the method.
        criterion: the unreduced task loss, used where the method does not replace it.
        parts: number of micro-batches; fewer are made when the batch has fewer examples.
        backward: how to backpropagate a scalar (a gradient scaler's or an accelerator's way).
        unscale: multiplies gradients of a re-evaluation, where `backward` scales the loss; None for none.
        synchronize: context for each micro-batch but the last, e.g. `DistributedDataParallel.no_sync`.
        forward: how to get a micro-batch's outputs; None calls the model on its inputs.
        prepared: the micro-batches themselves, where they exist already (padded each to its own length) and the pool
            need not be cut; they share the pool's `services`.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> pool = Step(model, inputs=torch.eye(2), targets=torch.tensor([0, 1]))
        >>> from wellposed.objective import cross_entropy
        >>> batch = Accumulation(pool, Regularizer(), cross_entropy, parts=2)
        >>> loss = batch.run()
        >>> model.weight.grad.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        pool: Step,
        regularizer: Regularizer,
        criterion: Criterion,
        parts: int = 1,
        *,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        unscale: Callable[[], float] | None = None,
        synchronize: Callable[[], AbstractContextManager[Any]] = nullcontext,
        forward: Callable[[Step], Any] | None = None,
        prepared: Sequence[Step] | None = None,
    ) -> None:
        self.pool = pool
        self.regularizer = regularizer
        self.criterion = criterion
        self.backward = backward
        self.unscale = unscale
        self.synchronize = synchronize
        self.forward = forward or (lambda step: call_model(step.model, step.inputs))
        self.steps = micro_steps(pool, parts) if prepared is None else count_steps(pool, prepared)
        self._random: list[dict[str, Tensor]] = []
        self._device = next((p.device for p in pool.model.parameters()), torch.device("cpu"))

    def run(self) -> Tensor:
        """First evaluation of all micro-batches, with `on_backward`; returns the detached loss."""
        return torch.stack([self.evaluate(i) for i in range(len(self.steps))]).sum()

    def evaluate(self, number: int) -> Tensor:
        """First evaluation of micro-batch `number`: forward, loss, backward, `on_backward`."""
        # A re-evaluation must draw the same numbers whatever the hooks drew in between, so every micro-batch
        # keeps the random state from which it started.
        self._random.append(self._random_state())
        step = self.steps[number]
        loss = self._forward_backward(step, last=number == len(self.steps) - 1)
        with torch.no_grad():
            self.regularizer.on_backward(step)
        # The graph is gone; let go of the activations that outputs and records hold.
        step.outputs, step.records = None, {}
        return loss

    def on_gradients(self) -> None:
        """Call the hook, with `step.closure()` available inside."""
        self.pool.services.closure = self.closure
        try:
            self.regularizer.on_gradients(self.pool)
        finally:
            self.pool.services.closure = None

    def closure(self) -> Tensor:
        """Evaluate the same batch again from zero gradients; see `Step.closure`."""
        model = self.pool.model
        for parameter in model.parameters():
            parameter.grad = None
        before = self._random_state()
        losses = []
        with copied_buffers(model):
            for number, step in enumerate(self.steps):
                self._restore(self._random[number])
                losses.append(self._forward_backward(step, last=number == len(self.steps) - 1))
                step.outputs, step.records = None, {}
        self._restore(before)
        if self.unscale is not None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self.unscale())
        return torch.stack(losses).sum()

    def _forward_backward(self, step: Step, last: bool) -> Tensor:
        with nullcontext() if last else self.synchronize():
            with collect_records() as records, step.services.autocast():
                step.outputs = self.forward(step)
            step.records = records
            loss = objective(step, self.regularizer, self.criterion)
            self.backward(loss)
        return loss.detach()

    def _random_state(self) -> dict[str, Tensor]:
        state = random_numbers(self._device)
        if self.pool.generator is not None:
            state["generator"] = self.pool.generator.get_state()
        return state

    def _restore(self, state: dict[str, Tensor]) -> None:
        restore_random_numbers(state, self._device)
        if self.pool.generator is not None:
            self.pool.generator.set_state(state["generator"])


def micro_steps(pool: Step, parts: int) -> list[Step]:
    """Cut a pool into `parts` steps of nearly equal size, and count the whole batch (over all ranks) for them."""
    size = batch_size(pool)
    parts = max(1, min(parts, size))
    _count(pool, [pool])
    pool.micro_batches = parts
    return list(_cut_steps(pool, size, parts))


def count_steps(pool: Step, steps: Sequence[Step]) -> list[Step]:
    """Micro-batches that exist already, with the counts of the whole batch (over all ranks); the pool gets them too."""
    _count(pool, steps)
    pool.micro_batches = len(steps)
    counts = {name: getattr(pool, name) for name in ("normalizer", "num_examples", "micro_batches", "replicas")}
    return [dataclasses.replace(step, **counts) for step in steps]


def _count(pool: Step, steps: Sequence[Step]) -> None:
    """Examples and valid tokens of `steps`, over all ranks, written to the pool."""
    sizes = [batch_size(step) for step in steps]
    valid = [size if step.valid is None else int(step.valid.sum()) for size, step in zip(sizes, steps, strict=True)]
    counts = torch.tensor([sum(sizes), sum(valid)], dtype=torch.float64)
    pool.replicas = 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        device = next((p.device for p in pool.model.parameters()), torch.device("cpu"))
        counts = counts.to(device)
        dist.all_reduce(counts)
        pool.replicas = dist.get_world_size()
    pool.num_examples, pool.normalizer = (max(1.0, float(c)) for c in counts)


def _cut_steps(pool: Step, size: int, parts: int) -> Iterator[Step]:
    for i in range(parts):
        start, stop = i * size // parts, (i + 1) * size // parts
        part = {
            name: cut(getattr(pool, name), size, start, stop)
            for name in ("inputs", "targets", "index", "weights", "extra")
        }
        yield dataclasses.replace(pool, **part)
