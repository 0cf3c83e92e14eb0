"""Positions of examples through a Hugging Face trainer: from the data set, past the collator, into the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .trainer_batches import INDEX


def has_positions(dataset: Any) -> bool:
    """Whether each example's position is known: a data set with a length and items, or one with a column `index`."""
    columns = getattr(dataset, "column_names", None) or ()
    if INDEX in columns:
        return True
    is_stream = isinstance(dataset, IterableDataset) or type(dataset).__name__ == "IterableDataset"
    return not is_stream and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def with_positions(dataset: Any) -> Any:
    """The data set with an entry `index` in every example; one that has it already is returned as it is.

    Args:
        dataset: examples are dicts. Streams, which have no positions, are returned as they are.

    Example:
        >>> with_positions([{"label": 1}, {"label": 0}])[1]
        {'label': 0, 'index': 1}
    """
    if not has_positions(dataset) or INDEX in (getattr(dataset, "column_names", None) or ()):
        return dataset
    if len(dataset) and isinstance(first := dataset[0], Mapping) and INDEX in first:
        return dataset
    return PositionedDataset(dataset)


class PositionedDataset(Dataset[Any]):
    """Adds `index` to examples that are dicts.

    A wrapper and no column: adding a column to a `datasets.Dataset` that was shuffled or filtered copies it.

    Raises:
        TypeError: from an item that is no dict.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._with_index(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A whole batch at once, where the data set can do that."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if callable(fetch) else [self.dataset[i] for i in indices]
        return [self._with_index(sample, i) for sample, i in zip(samples, indices, strict=True)]

    def _with_index(self, sample: Any, index: int) -> dict[str, Any]:
        if not isinstance(sample, Mapping):
            raise TypeError(f"train_dataset: an example must be a dict, got {type(sample).__name__}")
        return {**sample, INDEX: int(index)}


class CarryingCollator:
    """Takes columns past a collator that would lose them or choke on them, and gives them back as tensors.

    Args:
        collator: receives the examples without these columns.
        columns: names of the columns; an example need not have them.
        keep: return them with the batch; else drop them, for evaluation.

    Raises:
        ValueError: naming a column whose values are no numbers, or do not have one shape.

    Example:
        >>> collate = CarryingCollator(lambda rows: {"n": len(rows)}, ["index"])
        >>> collate([{"index": 7, "x": 1}, {"index": 3, "x": 2}])
        {'n': 2, 'index': tensor([7, 3])}
    """

    def __init__(self, collator: Callable[[list[Any]], Any], columns: Sequence[str], keep: bool = True) -> None:
        self.collator, self.columns, self.keep = collator, tuple(columns), keep

    def __call__(self, examples: list[Any]) -> Any:
        if not examples or not isinstance(examples[0], Mapping):
            return self.collator(examples)
        bare = [{k: v for k, v in example.items() if k not in self.columns} for example in examples]
        batch = self.collator(bare)
        if self.keep:
            for name in self.columns:
                if name in examples[0]:
                    batch[name] = _as_tensor(name, [example[name] for example in examples])
        return batch


def _as_tensor(name: str, values: list[Any]) -> Tensor:
    try:
        tensor = torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"column {name!r}: values must be numbers, or tensors of one shape, got {values[0]!r} and others ({error})"
        ) from error
    if name == INDEX and (tensor.ndim != 1 or tensor.is_floating_point()):
        raise ValueError(f"column 'index': values must be integers, the position of each example, got {values[0]!r}")
    return tensor
