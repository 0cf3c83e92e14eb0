"""Batches of a Hugging Face trainer as this library reads them: labels aligned, micro-batches pooled and trimmed again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ..batching import IGNORE_INDEX, Batch, batch_size
from ..step import Step

INDEX = "index"
"""Column that holds each example's position in the training data."""

WEIGHTS = "weights"
"""Extra column that becomes the weight of each example in the loss."""


def shift_labels(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Labels of a causal language model, moved so that entry t is what the logits at t predict; -100 at the end.

    Example:
        >>> shift_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def unshift_labels(targets: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Back from `shift_labels`; the first label, which no logit predicts, is -100.

    Example:
        >>> unshift_labels(torch.tensor([[6, 7, -100]]))
        tensor([[-100,    6,    7]])
    """
    return F.pad(targets[:, :-1], (1, 0), value=IGNORE_INDEX)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a transformers model shifts the labels itself when it computes its loss, as causal language models do."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    name = getattr(model, "loss_type", None) or type(model).__name__
    if name in LOSS_MAPPING:
        return LOSS_MAPPING[name] is ForCausalLMLoss
    return name.endswith(("ForCausalLM", "LMHeadModel")) and "Masked" not in name


def read_batch(inputs: Mapping[str, Any], label_names: Sequence[str], extra: Collection[str], shift: bool) -> Batch:
    """Take apart what a collator returns: model inputs, targets, index, weights and extra columns.

    Args:
        inputs: by name, tensors with the batch dimension first.
        label_names: entries that are labels. One alone becomes the targets; several become a dict.
        extra: entries that go to `Batch.extra` and not to the model; one called "weights" weighs the examples.
        shift: align the labels of a causal language model with its logits; labels that the collator has already
            shifted (`shift_labels`) are taken as they are.

    Example:
        >>> batch = read_batch({"input_ids": torch.ones(1, 2), "labels": torch.tensor([[3, 4]])}, ["labels"], (), True)
        >>> batch.targets, list(batch.inputs)
        (tensor([[   4, -100]]), ['input_ids'])
    """
    rest = dict(inputs)
    index = rest.pop(INDEX, None)
    carried = {name: rest.pop(name) for name in extra if name in rest}
    labels = {name: rest.pop(name) for name in label_names if name in rest}
    targets: Any = None
    if shift and "shift_labels" in rest:
        targets = rest.pop("shift_labels")
    elif len(labels) == 1:
        targets = next(iter(labels.values()))
        if shift:
            targets = shift_labels(targets)
    elif labels:
        targets = labels
    return Batch(rest, targets, index, carried.pop(WEIGHTS, None), carried)


def join_batches(batches: Sequence[Batch], pad_token: int = 0) -> tuple[Batch, bool]:
    """One pool from the micro-batches of an optimizer step, padded to the longest.

    Args:
        batches: as `read_batch` returns them.
        pad_token: fills `input_ids`; masks and everything else are filled with 0, targets with -100.

    Returns:
        The pool, and whether anything was padded.

    Raises:
        ValueError: if an entry is missing in one of them, if entries that are no batch differ, or if lengths differ
            and no attention mask tells padding from tokens.
    """
    if len(batches) == 1:
        return batches[0], False
    sizes = [batch_size(b) for b in batches]
    join = _Join(sizes, left=any(_padded_left(b) for b in batches))
    inputs = join.mapping("inputs", [b.inputs for b in batches], {"input_ids": pad_token})
    targets = join.value("targets", [b.targets for b in batches], IGNORE_INDEX)
    index = join.value(INDEX, [b.index for b in batches], 0)
    weights = join.value(WEIGHTS, [b.weights for b in batches], 0)
    extra = join.mapping("extra", [b.extra for b in batches], {})
    if join.padded and "attention_mask" not in inputs:
        raise ValueError(
            "join_batches: the micro-batches have different lengths and no attention_mask, so that padding would count "
            "as tokens; let the collator return an attention_mask, or pad to one length"
        )
    return Batch(inputs, targets, index, weights, extra), join.padded


class _Join:
    """Concatenates entries along the batch, and remembers whether any had to be padded."""

    def __init__(self, sizes: Sequence[int], left: bool) -> None:
        self.sizes, self.left = sizes, left
        self.padded = False

    def mapping(self, where: str, values: Sequence[Mapping[str, Any]], fill: Mapping[str, int]) -> dict[str, Any]:
        names = list(values[0])
        for other in values[1:]:
            if missing := set(names) ^ set(other):
                raise ValueError(f"join_batches: {where} {sorted(missing)[0]!r} is in some micro-batches only")
        return {name: self.value(name, [v[name] for v in values], fill.get(name, 0)) for name in names}

    def value(self, name: str, values: Sequence[Any], fill: int) -> Any:
        if isinstance(values[0], Mapping):
            return self.mapping(name, values, dict.fromkeys(values[0], fill))
        rows = [isinstance(v, Tensor) and v.ndim > 0 and len(v) == n for v, n in zip(values, self.sizes, strict=True)]
        if all(rows):
            return torch.cat(self._same_shape(name, values, fill))
        first = values[0]
        same = all(torch.equal(first, v) if isinstance(first, Tensor) else first == v for v in values[1:])
        if not same:
            raise ValueError(
                f"join_batches: {name!r} has no batch dimension and differs between the micro-batches of one step"
            )
        return first

    def _same_shape(self, name: str, values: Sequence[Tensor], fill: int) -> list[Tensor]:
        if len({v.ndim for v in values}) > 1:
            raise ValueError(f"join_batches: {name!r} has different numbers of dimensions: {[v.ndim for v in values]}")
        longest = [max(v.shape[d] for v in values) for d in range(1, values[0].ndim)]
        padded = []
        for value in values:
            missing = [n - have for n, have in zip(longest, value.shape[1:], strict=True)]
            if any(missing):
                self.padded = True
                sides = [(m, 0) if self.left else (0, m) for m in reversed(missing)]
                value = F.pad(value, [n for side in sides for n in side], value=fill)
            padded.append(value)
        return padded


def _padded_left(batch: Batch) -> bool:
    mask = batch.inputs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim in (2, 3) and bool((mask[..., 0] == 0).any())


def trim_padding(step: Step) -> None:
    """Cut away, in place of the step's fields, columns that are padding in every row of this micro-batch.

    The inverse of the padding of `join_batches`, so that a pooled and cut batch costs what the loader's batches cost.
    """
    # A method that gave each network of a `Pair` inputs of its own keeps their common width.
    mask = step.inputs.get("attention_mask") if isinstance(step.inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or mask.shape[-1] == 0:
        return
    used = mask.reshape(-1, mask.shape[-1]).ne(0).any(0).nonzero().flatten()
    if len(used) == 0:
        return
    rows, width, dimension = len(mask), mask.shape[-1], mask.ndim - 1
    start, stop = int(used[0]), int(used[-1]) + 1
    if stop - start == width:
        return

    def trim(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: trim(v) for name, v in value.items()}
        is_sequence = isinstance(value, Tensor) and value.ndim > dimension and len(value) == rows
        if is_sequence and value.shape[dimension] == width:
            return value.narrow(dimension, start, stop - start)
        return value

    for name in ("inputs", "targets", "weights", "extra"):
        setattr(step, name, trim(getattr(step, name)))
