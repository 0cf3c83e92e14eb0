"""What a batch is: calling a model on it, counting it, and cutting it into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Target value that marks a position without a target, as in `torch.nn.functional.cross_entropy`."""


class Paired(NamedTuple):
    """Different inputs (or targets) for the two networks of a `wellposed.Pair`."""

    a: Any
    b: Any


@dataclass
class Batch:
    """One batch as the training loop understands it.

    `inputs` is a tensor (batch, ...), or a tuple or dict of such; `index` is each example's position in the data
    set; `extra` holds whatever else the data set yields under its own name.
    """

    inputs: Any
    targets: Any
    index: Tensor | None = None
    weights: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def as_batch(sample: Any) -> Batch:
    """Read what a loader yields: a `Batch`, `(inputs, targets[, index])`, or a dict.

    A dict holds `inputs` and `targets`, optionally `index` and `weights`; every other entry goes to `extra`.

    Raises:
        TypeError: for anything else, naming what was given.

    Example:
        >>> batch = as_batch((torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([7, 8])))
        >>> batch.index.tolist()
        [7, 8]
    """
    if isinstance(sample, Batch):
        return sample
    if isinstance(sample, Mapping) and "inputs" in sample and "targets" in sample:
        rest = {k: v for k, v in sample.items() if k not in ("inputs", "targets", "index", "weights")}
        return Batch(sample["inputs"], sample["targets"], sample.get("index"), sample.get("weights"), rest)
    if isinstance(sample, Sequence) and len(sample) in (2, 3):
        return Batch(sample[0], sample[1], sample[2] if len(sample) == 3 else None)
    kind = f"a dict with keys {sorted(sample)}" if isinstance(sample, Mapping) else type(sample).__name__
    raise TypeError(
        "fit: a loader must yield (inputs, targets), (inputs, targets, index) or a dict with 'inputs' and "
        f"'targets', got {kind}"
    )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)` for a dict, `model(*inputs)` for a tuple, `model(inputs)` else (also for `Paired`)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, Paired):
        return model(*inputs)
    return model(inputs)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a data-parallel wrapper or `torch.compile`, or the module itself."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def map_tensors(function: Any, value: Any) -> Any:
    """Apply `function` to every tensor in nested tuples, lists and mappings; leave the rest as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, v) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(function, v) for k, v in value.items()}
    return value


def batch_size(batch: Any) -> int:
    """Number of examples: the length of `index`, of `targets`, or of the first tensor among the inputs."""
    for value in (batch.index, batch.targets, batch.inputs):
        found: list[int] = []
        map_tensors(lambda t, found=found: found.append(len(t)) if t.ndim else None, value)
        if found:
            return found[0]
    raise ValueError("fit: a batch holds no tensor with a batch dimension")


def cut(value: Any, size: int, start: int, stop: int) -> Any:
    """Rows `start:stop` of every tensor whose first dimension is `size`, through nested containers.

    Tensors of another length (a permutation matrix, a constant) belong to the whole batch and are kept whole.
    """
    return map_tensors(lambda t: t[start:stop] if t.ndim and len(t) == size else t, value)


def valid_positions(targets: Any, extra: Mapping[str, Any]) -> Bool[Tensor, "batch length"] | None:
    """Which positions of a batch of sequences count: `extra["valid"]`, or integer targets that are not ignored.

    None for targets that are not sequences.
    """
    mask = extra.get("valid")
    if mask is not None:
        return mask.bool()  # type: ignore[no-any-return]
    if isinstance(targets, Tensor) and targets.ndim == 2 and not targets.is_floating_point():
        return targets != IGNORE_INDEX
    return None


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nested batch, asynchronously where the memory is pinned."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), value)
