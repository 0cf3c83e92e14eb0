"""A mixture of ten sources of very different sizes, each with a labelling rule of its own: who gains from a large batch?

Sizes are such that, as in MathInstruct, the six small sources hold 27 % of a random pool and, if all of their examples
are kept, 54 % of the half that trains. They are large enough not to be memorised in an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...batching import Batch
from ...indexed_dataset import epoch_seed

SIZES = (10_000, 8_000, 6_000, 5_000, 3_400, 2_700, 2_000, 1_400, 800, 500)
"""Training examples of each source; the first four are large (above the mean)."""

BIG = 4
FEATURES, CLASSES = 32, 10
VALIDATION, TEST = 1_000, 2_000
"""Validation and test examples of EACH source."""


@dataclass(frozen=True)
class Mixture:
    """One draw: training examples with the number of their source, and held-out examples source by source."""

    train: Float[Tensor, "train features"]
    labels: Int[Tensor, " train"]
    source: Int[Tensor, " train"]
    validation: Float[Tensor, "sources validation features"]
    validation_labels: Int[Tensor, "sources validation"]
    test: Float[Tensor, "sources test features"]
    test_labels: Int[Tensor, "sources test"]

    @property
    def shares(self) -> Float[Tensor, " sources"]:
        """Share of each source in the training data."""
        counts = torch.bincount(self.source).double()
        return counts / counts.sum()


@lru_cache(maxsize=2)
def source_mixture(seed: int, scale: float = 1.0) -> Mixture:
    """`x ~ N(mu_q, I)`, `y = argmax((x - mu_q / 2) W_q' + 1.5 noise)`, `mu_q ~ 1.2 N(0, I)`, `W_q = W_0 + N(0, 1)`.

    Args:
        seed: re-draws means, labelling rules and all examples.
        scale: factor on all numbers of examples, for quick checks.

    Example:
        >>> mixture = source_mixture(0, scale=0.01)
        >>> mixture.train.shape, mixture.test.shape
        (torch.Size([398, 32]), torch.Size([10, 20, 32]))
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, 0))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    common = normal(CLASSES, FEATURES)
    means = [1.2 * normal(FEATURES) for _ in SIZES]
    rules = [common + normal(CLASSES, FEATURES) for _ in SIZES]

    def draw(source: int, count: int) -> tuple[Tensor, Tensor]:
        x = means[source] + normal(count, FEATURES)
        scores = (x - means[source] / 2) @ rules[source].T + 1.5 * normal(count, CLASSES)
        return x, scores.argmax(1)

    sizes = [max(1, round(scale * size)) for size in SIZES]
    train = [draw(q, size) for q, size in enumerate(sizes)]
    validation = [draw(q, max(1, round(scale * VALIDATION))) for q in range(len(SIZES))]
    test = [draw(q, max(1, round(scale * TEST))) for q in range(len(SIZES))]
    return Mixture(
        torch.cat([x for x, _ in train]),
        torch.cat([y for _, y in train]),
        torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(sizes)),
        torch.stack([x for x, _ in validation]),
        torch.stack([y for _, y in validation]),
        torch.stack([x for x, _ in test]),
        torch.stack([y for _, y in test]),
    )


class Pools:
    """A fixed number of pools of equal size, drawn epoch after epoch without replacement, with their sources.

    Args:
        mixture: whose training examples are drawn.
        size: examples of a pool.
        steps: number of pools.
        seed: of the order.

    Example:
        >>> pools = list(Pools(source_mixture(0, scale=0.01), size=128, steps=4, seed=0))
        >>> [len(pool.targets) for pool in pools], pools[0].extra["source"].shape
        ([128, 128, 128, 128], torch.Size([128]))
    """

    def __init__(self, mixture: Mixture, size: int, steps: int, seed: int) -> None:
        if not 1 <= size <= len(mixture.labels):
            raise ValueError(f"Pools: size must lie in [1, {len(mixture.labels)}], the training set, got {size}")
        self.mixture, self.size, self.steps, self.seed = mixture, size, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        mixture = self.mixture
        per_epoch = len(mixture.labels) // self.size
        for number in range(self.steps):
            epoch, place = divmod(number, per_epoch)
            if place == 0:
                generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
                order = torch.randperm(len(mixture.labels), generator=generator)
            rows = order[place * self.size : (place + 1) * self.size]
            yield Batch(mixture.train[rows], mixture.labels[rows], rows, None, {"source": mixture.source[rows]})
