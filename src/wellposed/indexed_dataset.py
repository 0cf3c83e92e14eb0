"""Data with positions: `IndexedDataset` for any dataset, `TensorLoader` for data that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batching import Batch, map_tensors


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch of a seeded run; neighbouring seeds and epochs do not meet.

    Example:
        >>> epoch_seed(0, 1) != epoch_seed(1, 0)
        True
    """
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class IndexedDataset(Dataset[Any]):
    """Adds each example's position: `(inputs, targets)` becomes `(inputs, targets, index)`.

    A sample that is a dict gets an entry `"index"`.

    Args:
        dataset: any map-style dataset.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
        >>> IndexedDataset(data)[2]
        (tensor([0., 0.]), tensor(0), 2)
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"IndexedDataset: dataset must have a length and items, got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._with_index(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A whole batch at once, where the dataset can do that."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if callable(fetch) else [self.dataset[i] for i in indices]
        return [self._with_index(sample, i) for sample, i in zip(samples, indices, strict=True)]

    def _with_index(self, sample: Any, index: int) -> Any:
        if isinstance(sample, Mapping):
            return {**sample, "index": index}
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            return (*sample, index)
        raise TypeError(
            "IndexedDataset: a sample must be (inputs, targets) or a dict, got "
            f"{type(sample).__name__}{f' of length {len(sample)}' if isinstance(sample, (tuple, list)) else ''}"
        )


class TensorLoader:
    """Batches of tensors in memory by one indexing operation each, with their positions.

    The order is a function of (seed, epoch) alone, so that a resumed epoch repeats exactly.

    Args:
        inputs: a tensor (examples, ...), or a tuple or dict of such.
        targets: (examples, ...).
        batch_size: examples in a batch.
        shuffle: draw a new order for every epoch.
        drop_last: leave out a last batch that is smaller.
        seed: of the order.
        weights: (examples,) weight of each example in the loss.
        index: (examples,) position of each example in a larger data set; 0, 1, ... by default.
        transform: `transform(inputs, generator)` on each batch of inputs, e.g. augmentation.

    Raises:
        ValueError: if lengths differ, or batch_size < 1.

    Example:
        >>> loader = TensorLoader(torch.arange(5.0), torch.arange(5), batch_size=2, shuffle=True)
        >>> sorted(i for batch in loader for i in batch.index.tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        inputs: Any,
        targets: Tensor,
        *,
        batch_size: int = 64,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        weights: Tensor | None = None,
        index: Tensor | None = None,
        transform: Callable[[Any, torch.Generator], Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"TensorLoader: batch_size must be >= 1, got {batch_size}")
        self.num_examples = len(targets)

        def check(tensor: Tensor) -> Tensor:
            if len(tensor) != self.num_examples:
                raise ValueError(
                    f"TensorLoader: inputs, weights and index must hold {self.num_examples} examples like targets, "
                    f"got {len(tensor)}"
                )
            return tensor

        map_tensors(check, (inputs, weights, index))
        if self.num_examples == 0:
            raise ValueError("TensorLoader: targets is empty")
        if drop_last and batch_size > self.num_examples:
            raise ValueError(
                f"TensorLoader: batch_size {batch_size} with drop_last leaves none of {self.num_examples} examples"
            )
        self.inputs, self.targets, self.weights, self.index = inputs, targets, weights, index
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.seed, self.transform = seed, transform
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (0 if self.drop_last or rest == 0 else 1)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        self.epoch += 1  # a loop that never calls set_epoch must not see one order for ever
        count = self.num_examples
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for number in range(len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            inputs = map_tensors(lambda t, i=rows: t[i.to(t.device)], self.inputs)
            if self.transform is not None:
                inputs = self.transform(inputs, generator)
            weights = None if self.weights is None else self.weights[rows.to(self.weights.device)]
            index = rows if self.index is None else self.index[rows]
            yield Batch(inputs, self.targets[rows.to(self.targets.device)], index, weights)
