"""Loaders: data sets shuffled by a seed and an epoch alone, and batches without end whose position can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .indexed_dataset import IndexedDataset, epoch_seed


def as_loader(data: Any, batch_size: int, seed: int | None, shuffle: bool) -> Any:
    """A loader of a data set (indexed, shuffled by `seed`), or the loader itself.

    Raises:
        ValueError: for an empty data set.
        TypeError: for what is neither, or for training batches without a length.
    """
    if isinstance(data, Dataset):
        if len(data) == 0:  # type: ignore[arg-type]
            raise ValueError("fit: data is empty")
        dataset = data if isinstance(data, IndexedDataset) else IndexedDataset(data)
        if distributed() and shuffle:
            sampler: DistributedSampler[Any] = DistributedSampler(dataset, seed=seed or 0)
            return DataLoader(dataset, batch_size=batch_size, sampler=sampler)
        generator = torch.Generator() if seed is not None and shuffle else None
        return EpochSeeded(DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator), seed)
    if not hasattr(data, "__iter__"):
        raise TypeError(f"fit: data must be a Dataset or an iterable of batches, got {type(data).__name__}")
    if shuffle and not hasattr(data, "__len__"):
        raise TypeError(f"fit: data must have a length (batches an epoch); {type(data).__name__} has none")
    return data


class EpochSeeded:
    """A loader whose order is a function of (seed, epoch) alone, so that a resumed epoch repeats exactly."""

    def __init__(self, loader: DataLoader[Any], seed: int | None) -> None:
        self.loader, self.seed = loader, seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        if self.loader.generator is not None and self.seed is not None:
            self.loader.generator.manual_seed(epoch_seed(self.seed, epoch))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class EndlessBatches:
    """Batches of a loader without end, epoch after epoch; `taken` says how many were taken, and can be restored.

    Args:
        loader: yields batches; `set_epoch` is called where it exists.
        name: shown in errors.
        prepare: applied to each batch, e.g. to move it to a device.

    Raises:
        ValueError: from `next`, if the loader yields no batch.

    Example:
        >>> batches = EndlessBatches([1, 2, 3], "train")
        >>> [next(batches) for _ in range(4)], batches.taken
        ([1, 2, 3, 1], 4)
    """

    def __init__(self, loader: Iterable[Any], name: str, prepare: Callable[[Any], Any] = lambda batch: batch) -> None:
        self.loader, self.name, self.prepare = loader, name, prepare
        self.taken = 0
        self._epoch = 0
        self._current: Iterator[Any] | None = None

    def __iter__(self) -> EndlessBatches:
        return self

    def __next__(self) -> Any:
        for fresh in (False, True):
            if self._current is None:
                set_epoch(self.loader, self._epoch)
                self._current = iter(self.loader)
                self._epoch += 1
                fresh = True
            batch = next(self._current, None)
            if batch is not None:
                self.taken += 1
                return self.prepare(batch)
            self._current = None
            if fresh:
                break
        raise ValueError(f"the {self.name} loader yielded no batch")

    def restore(self, taken: int) -> None:
        """Go to the position after `taken` batches of a loader with a length; those of the last epoch are drawn again."""
        self._epoch, rest = divmod(taken, len(self.loader))  # type: ignore[arg-type]
        self._current = None
        for _ in range(rest):
            next(self)
        self.taken = taken


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader, or its sampler, which epoch begins, where it wants to know."""
    for target in (loader, getattr(loader, "sampler", None)):
        if callable(choose := getattr(target, "set_epoch", None)):
            choose(epoch)


def loader_state(loader: Any) -> Tensor | None:
    """The random state of a loader with a generator of its own."""
    generator = getattr(loader, "generator", None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


def restore_loader(loader: Any, state: Tensor | None) -> None:
    """Continue from `loader_state`."""
    if state is not None:
        loader.generator.set_state(state)


def distributed() -> bool:
    """Whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if distributed() else 0
