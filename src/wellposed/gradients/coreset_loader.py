"""Coresets in a training loop of your own: a loader that yields the chosen part of each pool, and a batch sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, default_collate

from ..batching import Batch, as_batch, to_device
from ..indexed_dataset import epoch_seed
from ..loading import set_epoch
from ..step import Step
from .mini_batch_coreset import MiniBatchCoreset


class CoresetDataLoader:
    """Draws pools from a loader and yields what a `MiniBatchCoreset` chooses of each, at the model's present weights.

    Args:
        loader: yields pools: `(inputs, targets)`, or dicts with 'inputs', 'targets' and 'source'.
        coreset: the selection. Its state moves on when the next batch is asked for: train on each before that.
        model: whose gradients are compared; pools are moved to its device.
        optimizer: needed where the coreset reads Adam's moments.

    Raises:
        ValueError: if the coreset reads Adam's moments and there is no optimizer.

    Example:
        >>> data = {"inputs": torch.randn(8, 3), "targets": torch.arange(8) % 2, "source": torch.arange(8) // 6}
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for batch in CoresetDataLoader([data], MiniBatchCoreset(ratio=0.5), model, optimizer):
        ...     loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        >>> len(batch.targets), batch.extra["source"].tolist()
        (4, [0, 0, 1, 1])
    """

    def __init__(
        self, loader: Iterable[Any], coreset: MiniBatchCoreset, model: nn.Module, optimizer: Optimizer | None = None
    ) -> None:
        _check_optimizer("CoresetDataLoader", coreset, optimizer)
        self.loader, self.coreset, self.model, self.optimizer = loader, coreset, model, optimizer
        self.epoch = self.number = 0

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the loader."""
        self.epoch = epoch
        set_epoch(self.loader, epoch)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        for sample in self.loader:
            batch = as_batch(to_device(sample, device))
            step = Step(
                self.model, self.optimizer, batch.inputs, batch.targets, batch.index, batch.weights, dict(batch.extra),
                number=self.number, total=max(1, len(self)) if isinstance(self.loader, Sized) else 1,
            )  # fmt: skip
            self.coreset.on_batch(step)
            yield Batch(step.inputs, step.targets, step.index, step.weights, step.extra)
            self.coreset.on_step(step)
            self.number += 1


class CoresetBatchSampler(Sampler[list[int]]):
    """Positions of the chosen examples of each pool, for `DataLoader(dataset, batch_sampler=...)`.

    Pools are read from the data set here, and the chosen examples once more by the loader. Use no worker processes:
    they ask for batches ahead, and would choose by weights that are some steps old.

    Args:
        dataset: map-style, yields what `collate` turns into a batch, with 'source' where the coreset asks for labels.
        pool_size: examples of a pool; a last, smaller one is left out.
        coreset: the selection, with uniform weights: positions carry none.
        model: whose gradients are compared.
        optimizer: needed where the coreset reads Adam's moments.
        collate: from a list of samples to a batch.
        seed: of the order.

    Raises:
        ValueError: for a pool_size out of range, weights that are not uniform, or a missing optimizer.

    Example:
        >>> rows = [{"inputs": torch.randn(3), "targets": i % 2, "source": i // 6} for i in range(8)]
        >>> coreset = MiniBatchCoreset(ratio=0.5, ranking="random", small_sources=[1])
        >>> sampler = CoresetBatchSampler(rows, 8, coreset, nn.Linear(3, 2))
        >>> [len(batch["targets"]) for batch in torch.utils.data.DataLoader(rows, batch_sampler=sampler)]
        [4]
        >>> {6, 7} <= set(next(iter(sampler)))
        True
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        pool_size: int,
        coreset: MiniBatchCoreset,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        seed: int = 0,
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if not isinstance(pool_size, int) or not 1 <= pool_size <= size:
            raise ValueError(f"CoresetBatchSampler: pool_size must lie in [1, {size}], the data set, got {pool_size!r}")
        if coreset.weights != "uniform":
            raise ValueError(
                f"CoresetBatchSampler: yields positions without weights, and the coreset's are {coreset.weights!r}; use "
                "CoresetDataLoader"
            )
        _check_optimizer("CoresetBatchSampler", coreset, optimizer)
        self.dataset, self.pool_size, self.coreset, self.model = dataset, pool_size, coreset, model
        self.optimizer, self.collate, self.seed, self.epoch = optimizer, collate, seed, 0
        self.size = size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.pool_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        self.epoch += 1
        order = torch.randperm(self.size, generator=generator)
        device = next(self.model.parameters()).device
        for number, pool in enumerate(order[: len(self) * self.pool_size].split(self.pool_size)):
            sample = self.collate([self.dataset[i] for i in pool.tolist()])
            batch = as_batch(to_device(sample, device))
            step = Step(
                self.model, self.optimizer, batch.inputs, batch.targets, pool, extra=dict(batch.extra),
                number=number, total=len(self),
            )  # fmt: skip
            self.coreset.on_batch(step)
            assert isinstance(step.index, torch.Tensor)
            yield step.index.tolist()
            self.coreset.on_step(step)


def _check_optimizer(owner: str, coreset: MiniBatchCoreset, optimizer: Optimizer | None) -> None:
    if "optimizer" in coreset.requires and optimizer is None:
        raise ValueError(
            f"{owner}: optimizer is missing: the coreset normalises by Adam's own moments (history='optimizer'); pass "
            "optimizer=, or use history='selected'"
        )
