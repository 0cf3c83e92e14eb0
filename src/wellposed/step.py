"""`Step`: the one argument of every hook, and `record`, by which a module publishes what its forward pass learned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .batching import call_model, unwrap, valid_positions
from .parameters import select_parameters

_local = threading.local()


class DivergenceError(ArithmeticError):
    """Training left the finite numbers. The laboratory counts such a run as the worst value, never drops it."""

    diverged = True


def record(name: str, value: Tensor) -> None:
    """Publish `value` from inside a module's `forward`; hooks read it as `step.records[name]`.

    Does nothing outside of a training loop, so that a module which records stays usable anywhere.

    Example:
        >>> with collect_records() as records:
        ...     record("error", torch.tensor(0.5))
        >>> records["error"]
        [tensor(0.5000)]
    """
    stack = getattr(_local, "stack", None)
    if stack:
        stack[-1].setdefault(name, []).append(value)


@contextmanager
def collect_records() -> Iterator[dict[str, list[Tensor]]]:
    """Collect what modules `record` inside the block; an inner block hides its records from the outer one."""
    if not hasattr(_local, "stack"):
        _local.stack = []
    records: dict[str, list[Tensor]] = {}
    _local.stack.append(records)
    try:
        yield records
    finally:
        _local.stack.pop()


@contextmanager
def copied_buffers(module: nn.Module) -> Iterator[None]:
    """Let `module` work on copies of its buffers inside the block.

    Copies, and not a restore afterwards: writing the old values back in place would bump the version counter of
    tensors that a graph built inside the block may have saved, and its backward pass would fail.
    """
    copies: dict[int, Tensor] = {}
    originals: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                originals.append((part._buffers, name, buffer))
                # A buffer that two modules share must stay shared among the copies.
                part._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in originals:
            owner[name] = buffer


@contextmanager
def mode(module: nn.Module, training: bool | None) -> Iterator[None]:
    """Training or evaluation mode inside the block; every submodule gets its own mode back (None: no change)."""
    if training is None:
        yield
        return
    before = [(part, part.training) for part in module.modules()]
    # A module's attributes are slow to set, and in most steps they already are what is asked for.
    if any(was != training for _, was in before):
        module.train(training)
    try:
        yield
    finally:
        for part, was in before:
            if part.training != was:
                part.training = was


def random_numbers(device: torch.device) -> dict[str, Tensor]:
    """The random state of the CPU and of a device, by which an evaluation can be repeated."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_numbers(state: dict[str, Tensor], device: torch.device) -> None:
    """Continue from `random_numbers`."""
    torch.set_rng_state(state["cpu"])
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


@contextmanager
def forked_rng(module: nn.Module) -> Iterator[None]:
    """Give the random state back after the block, on the CPU and on the module's device."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    devices = [] if device.type == "cpu" or device.index is None else [device.index]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


@dataclass
class LoopServices:
    """What a loop or an adapter lends to its steps. `closure` is set only while `on_gradients` runs."""

    closure: Callable[[], Tensor] | None = None
    log: Callable[[str, Any], None] = lambda name, value: None
    validate: Callable[[], dict[str, float]] | None = None
    stop: Callable[[str], None] | None = None
    invalidate: Callable[[], None] | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Step:
    """Everything a hook may read, rewrite or call, for one optimizer step or one of its micro-batches.

    Attributes:
        model: the network that trains, as `attach` returned it (possibly wrapped for data parallelism).
        optimizer: the optimizer, or None under a tuner.
        inputs, targets: tensors (batch, ...), or tuples and dicts of tensors.
        index: (batch,) int64, position of each example in the data set; None if the loader does not tell, `Paired` where
            a method gave each network of a `Pair` a batch of its own.
        weights: (batch,) or (batch, length) weight of each example or token in the loss; None means 1.
        extra: what else the batch carries (source ids, rollout tensors). Tensors whose first dimension is the
            batch are cut into micro-batches with it.
        outputs: what the model returned (set for `loss`, `penalty`, `on_backward`).
        records: what modules published with `record` in the main forward pass.
        epoch, epochs: current epoch from 0, and their planned number; at the closing `on_epoch` they are equal.
        number, total: current optimizer step from 0, and their planned number.
        generator: explicit source of randomness for methods (on the CPU).
        validation: loader of validation batches, or None.
        normalizer: examples, or valid tokens, of the whole accumulated batch over all ranks.
        num_examples: examples of the whole accumulated batch over all ranks.
        micro_batches, replicas: into how many parts the batch was cut, and on how many ranks it runs.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    inputs: Any = None
    targets: Any = None
    index: Tensor | Any | None = None
    weights: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    outputs: Any = None
    records: dict[str, list[Tensor]] = field(default_factory=dict)
    epoch: int = 0
    epochs: int = 1
    number: int = 0
    total: int = 1
    generator: torch.Generator | None = None
    validation: Iterable[Any] | None = None
    normalizer: float = 1.0
    num_examples: float = 1.0
    micro_batches: int = 1
    replicas: int = 1
    services: LoopServices = field(default_factory=LoopServices, repr=False)

    @property
    def progress(self) -> float:
        """Share of the planned optimizer steps that are done, in [0, 1]; exactly 1 at the closing `on_epoch`."""
        return 1.0 if self.finished else min(1.0, self.number / max(1, self.total))

    @property
    def finished(self) -> bool:
        """Whether training is over: true only in the closing `on_epoch`."""
        return self.epoch >= self.epochs

    @property
    def logits(self) -> Tensor:
        """The outputs as one tensor: themselves, or the `logits` of a model output or dict.

        Raises:
            TypeError: if the outputs hold no such tensor (two networks in a `Pair` return two).
        """
        outputs = self.outputs
        if isinstance(outputs, Tensor):
            return outputs
        found = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
        if isinstance(found, Tensor):
            return found
        raise TypeError(f"Step.logits: the model returned {type(outputs).__name__}, which holds no 'logits' tensor")

    @property
    def valid(self) -> Tensor | None:
        """(batch, length) bool: which tokens count, or None where targets are not sequences."""
        return valid_positions(self.targets, self.extra)

    def log(self, name: str, value: Any) -> None:
        """Report a number (or a scalar tensor, which is not synchronised here); the loop keeps its epoch mean."""
        self.services.log(name, value.detach() if isinstance(value, Tensor) else value)

    def forward(
        self,
        inputs: Any = None,
        model: nn.Module | None = None,
        grad: bool = True,
        training: bool | None = None,
    ) -> Any:
        """Another forward pass (a teacher, a probe, a scoring pass) that leaves no trace.

        It works on copies of the buffers, gives the random state back, and keeps its records to itself.

        Args:
            inputs: other inputs than this step's.
            model: another module than this step's.
            grad: build a graph.
            training: training or evaluation mode; None keeps each module's own.
        """
        module = unwrap(self.model if model is None else model)
        with (
            copied_buffers(module),
            mode(module, training),
            forked_rng(module),
            torch.set_grad_enabled(grad),
            self.services.autocast(),
            collect_records(),
        ):
            return call_model(module, self.inputs if inputs is None else inputs)

    def closure(self) -> Tensor:
        """Zero the gradients and run forward, loss and backward again over ALL micro-batches of this step.

        Same batch, same random numbers, buffers left as before, no `on_*` hook runs. Returns the (detached) loss.

        Raises:
            RuntimeError: outside of `on_gradients`.
        """
        if self.services.closure is None:
            raise RuntimeError("Step.closure: may be called only inside on_gradients")
        return self.services.closure()

    def validate(self) -> dict[str, float]:
        """Metrics of the current model on `validation`, computed once an epoch and shared by all methods.

        Raises:
            RuntimeError: if the loop has no validation data.
        """
        if self.services.validate is None:
            raise RuntimeError("Step.validate: this loop has no validation data; pass validation= to fit")
        return self.services.validate()

    def invalidate(self) -> None:
        """Say that a hook changed what the model predicts (a prefix, a threshold): the next `validate` measures anew."""
        if self.services.invalidate is not None:
            self.services.invalidate()

    def stop(self, reason: str) -> None:
        """Ask the loop to end training here (from `on_epoch`: before the epoch that would begin)."""
        if self.services.stop is None:
            raise RuntimeError("Step.stop: this loop cannot be stopped early")
        self.services.stop(reason)

    def replace_parameters(self, names: Collection[str]) -> None:
        """Train exactly the parameters called `names`; see `wellposed.parameters.select_parameters`."""
        if self.optimizer is None:
            raise RuntimeError("Step.replace_parameters: this loop has no optimizer")
        select_parameters(self.model, self.optimizer, names)
