"""Averages of weights along training: exponential moving averages (EMA), their ramps, and WeightAverage.

Note:
    ``torch.optim.swa_utils.AveragedModel`` keeps a deep copy of the whole model. It is the reference of our tests, and
    the same fused operation does the work here; we keep our own container because a deep copy also duplicates
    what does not train (the frozen base under an adapter), averages half-precision weights in half precision
    (where a decay of 0.999 rounds every update away), and cannot be swapped into the live model for evaluation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batching import unwrap

Ramp = Callable[[int, float], float]


@torch.no_grad()
def exponential_moving_average_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """In place: ``average <- decay * average + (1 - decay) * value``, all tensors in one fused operation.

    A value of another dtype or device is converted to its average's: keep averages of half-precision weights in
    float32.

    Raises:
        ValueError: if ``decay`` is not in [0, 1], or the two lists differ in length.

    Example:
        >>> average = torch.tensor([0.0, 4.0])
        >>> exponential_moving_average_([average], [torch.tensor([1.0, 0.0])], decay=0.75)
        >>> average
        tensor([0.2500, 3.0000])
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"exponential_moving_average_: decay must lie in [0, 1], got {decay}")
    if len(averages) != len(values):
        raise ValueError(
            f"exponential_moving_average_: need one value an average, got {len(averages)} and {len(values)}"
        )
    if averages:
        converted = [value.to(average) for average, value in zip(averages, values, strict=True)]
        torch._foreach_lerp_(list(averages), converted, 1 - decay)


def constant(step: int, decay: float) -> float:
    """No ramp: ``decay`` at every update."""
    return decay


def sigmoid_ramp(step: float, length: float) -> float:
    """``exp(-5 (1 - min(step, length) / length) ** 2)``: from 0.0067 at 0 up to 1 at ``length``, then 1.

    A factor for any strength (Laine and Aila 2017; ELR+ ramps its decay and its strength by it).

    Raises:
        ValueError: for ``length <= 0`` or ``step < 0``.

    Example:
        >>> [round(sigmoid_ramp(step, length=40), 4) for step in (0, 20, 40, 99)]
        [0.0067, 0.2865, 1.0, 1.0]
    """
    if not length > 0 or not step >= 0:
        raise ValueError(f"sigmoid_ramp: need length > 0 and step >= 0, got length {length} and step {step}")
    return math.exp(-5.0 * (1.0 - min(step, length) / length) ** 2)


def sigmoid_decay(step: int, decay: float, length: float) -> float:
    """ELR+'s decay on CIFAR at update ``step`` = 1, 2, ...: ``decay * sigmoid_ramp(step + 1, length)``.

    As a ramp: ``functools.partial(sigmoid_decay, length=40_000)``. In a short run ``length`` must be scaled with it
    (the paper's is 57 % of training), else the average is the live model throughout.
    """
    return decay * sigmoid_ramp(step + 1, length)


def inverse_ramp(step: int, decay: float) -> float:
    """``min(1 - 1 / (step + 1), decay)``: nearly the plain mean of the first updates, then exponential.

    Example:
        >>> [round(inverse_ramp(step, decay=0.9), 3) for step in (1, 2, 3, 100)]
        [0.5, 0.667, 0.75, 0.9]
    """
    return min(1.0 - 1.0 / (step + 1), decay)


class WeightAverage(nn.Module):
    """Averaged copies of a model's trainable parameters, and of its buffers.

    Args:
        model: whose weights are averaged; the average starts at their values. Not kept. Wrappers (data parallel,
            ``torch.compile``) may come and go between calls.
        decay: of the exponential average, in [0, 1].
        ramp: ``(number of this update = 1, 2, ..., decay) -> decay to use``: :func:`constant`, :func:`inverse_ramp`, or
            :func:`sigmoid_decay` with its length.
        buffers: ``"copy"`` keeps the latest (BatchNorm's statistics are averages already), ``"average"`` averages
            those of floating dtype too, ``"ignore"`` leaves buffers out.

    A parameter that becomes trainable later is averaged from the update that first finds it so. Averages are at least
    float32, whatever the model's dtype. The state dict has one entry a tensor, with "/" for the dots of its name.

    Attributes:
        updates: how many updates were made.

    Raises:
        ValueError: for a decay outside [0, 1], an unknown ``buffers``, or a model that lacks an averaged tensor.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 0.0)
        >>> average = WeightAverage(model, decay=0.5)
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> average.update(model)
        >>> with average.swapped(model):
        ...     model.weight.item()
        0.5
        >>> model.weight.item()
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        ramp: Ramp = constant,
        *,
        buffers: Literal["copy", "average", "ignore"] = "copy",
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"WeightAverage: decay must lie in [0, 1], got {decay}")
        if buffers not in ("copy", "average", "ignore"):
            raise ValueError(f"WeightAverage: buffers must be 'copy', 'average' or 'ignore', got {buffers!r}")
        self.decay, self.ramp, self.buffer_rule = decay, ramp, buffers
        self.updates = 0
        self._track(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average (after an optimizer step)."""
        self.updates += 1
        decay = self.ramp(self.updates, self.decay)
        # Tensors that were not tracked start at their present value; averaging them with it changes nothing.
        self._track(model)
        averaged: list[tuple[Tensor, Tensor]] = []
        for average, live, is_parameter in self._pairs(model):
            if is_parameter or (self.buffer_rule == "average" and live.is_floating_point()):
                averaged.append((average, live))
            else:
                average.copy_(live)
        exponential_moving_average_([a for a, _ in averaged], [v.detach() for _, v in averaged], decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights (and buffers, unless ignored) by the averages, in place."""
        for average, live, _ in self._pairs(model):
            live.copy_(average)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the ``with`` the model has the averaged weights; afterwards its own, bit for bit."""
        kept = [(live, live.detach().clone()) for _, live, _ in self._pairs(model)]
        self.copy_to(model)
        try:
            yield model
        finally:
            with torch.no_grad():
                for live, own in kept:
                    live.copy_(own)

    def module(self, model: nn.Module) -> nn.Module:
        """Return a deep copy of ``model`` (unwrapped, without gradients) with the averaged weights."""
        averaged = copy.deepcopy(unwrap(model))
        averaged.zero_grad(set_to_none=True)
        self.copy_to(averaged)
        return averaged

    def averages(self) -> dict[str, Tensor]:
        """The averaged tensors by the model's own names; not copies."""
        return {name.replace("/", "."): buffer for name, buffer in self.named_buffers()}

    def _track(self, model: nn.Module) -> None:
        for name, live, _ in self._wanted(unwrap(model)):
            key = name.replace(".", "/")
            if key not in self._buffers:
                dtype = torch.promote_types(live.dtype, torch.float32) if live.is_floating_point() else live.dtype
                self.register_buffer(key, live.detach().to(dtype, copy=True))

    def _wanted(self, model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.replace(".", "/") in self._buffers:
                yield name, parameter, True
        if self.buffer_rule != "ignore":
            for name, buffer in model.named_buffers():
                yield name, buffer, False

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor, bool]]:
        """``(average, live tensor, whether it is a parameter)`` for every tracked tensor."""
        live = {n.replace(".", "/"): (t, is_parameter) for n, t, is_parameter in self._wanted(unwrap(model))}
        if absent := [key for key in self._buffers if key not in live]:
            raise ValueError(f"WeightAverage: the model has no {absent[0].replace('/', '.')!r}, which is averaged")
        return [(average, *live[key]) for key, average in self._buffers.items() if average is not None]

    def get_extra_state(self) -> Tensor:
        """The number of updates, for the state dict."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of updates."""
        self.updates = int(state)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **keywords: Any
    ) -> None:
        # A checkpoint may hold averages of parameters that became trainable during the run that wrote it.
        device = next((buffer.device for buffer in self.buffers()), None)
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and "." not in name and name != "_extra_state" and name not in self._buffers:
                self.register_buffer(name, torch.empty_like(value, device=device))
        # And it may hold fewer than this average tracks: those start anew at the update that finds them trainable.
        for name in [name for name in self._buffers if prefix + name not in state_dict]:
            del self._buffers[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments, **keywords)
