"""Data hyper-cleaning: one weight for each training example is the upper level, softmax regression the lower one.

scikit-learn's digits, 40 % of the training labels changed to another class, 50 clean validation examples. The oracles
are those of `SampleWeights` under softmax regression, hand-derived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ...bilevel import BilevelProblem
from ...hyperparameter import Hyperparameter
from .noisy_digits import corrupted

PIXELS, CLASSES = 64, 10
PENALTY, BATCH, RATE = 1e-3, 64, 0.4
SIZES = (1000, 50, 247, 500)
START = 0.7310585786300049
"""Weight of every example at the start: the sigmoid of 1, as in the authors' code."""


@dataclass(frozen=True)
class CleaningData:
    """One draw. Inputs (examples, 65), the last column a one; targets one-hot.

    Attributes:
        train, labels, truth: training inputs, given and true targets.
        validation, validation_labels: the clean examples of the upper level.
        selection, selection_labels: clean examples that no level sees, for tuning.
        test, test_labels: clean.
        wrong: which training labels were changed.
    """

    train: Float[Tensor, "train features"]
    labels: Float[Tensor, "train classes"]
    truth: Float[Tensor, "train classes"]
    validation: Float[Tensor, "validation features"]
    validation_labels: Float[Tensor, "validation classes"]
    selection: Float[Tensor, "selection features"]
    selection_labels: Float[Tensor, "selection classes"]
    test: Float[Tensor, "test features"]
    test_labels: Float[Tensor, "test classes"]
    wrong: Bool[Tensor, " train"]


def cleaning_data(seed: int, rate: float = RATE, sizes: tuple[int, int, int, int] = SIZES) -> CleaningData:
    """Split and corrupt the digits.

    Args:
        seed: re-draws the split and the noise.
        rate: share of training labels that are changed to another class.
        sizes: training, validation, selection and test examples.

    Example:
        >>> data = cleaning_data(0)
        >>> len(data.train), len(data.validation), float(data.wrong.float().mean())
        (1000, 50, 0.4...)
    """
    from sklearn.datasets import load_digits

    inputs, truth = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(truth))
    bounds = np.cumsum([0, *sizes])
    rows = [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    given = corrupted(truth[rows[0]], rate, "other", generator)
    extended = F.pad(torch.tensor(inputs / 16, dtype=torch.float32), (0, 1), value=1.0)

    def hot(labels: np.ndarray) -> Tensor:
        return F.one_hot(torch.tensor(labels), CLASSES).float()

    train, validation, selection, test = ((extended[part], hot(truth[part])) for part in rows)
    wrong = torch.tensor(given != truth[rows[0]])
    return CleaningData(train[0], hot(given), train[1], *validation, *selection, *test, wrong)


class HyperCleaning(BilevelProblem):
    """The bilevel problem. A training batch is the rows of its examples, a validation batch anything.

    Upper level: a logit for each training example, its weight the sigmoid. Lower level: softmax regression (10, 65)
    from 0. Inner loss: mean of weight times cross-entropy, + 1e-3 |y|^2; outer: cross-entropy of all 50 clean examples.

    Example:
        >>> problem = HyperCleaning(cleaning_data(0))
        >>> problem.weights.shape, problem.params["head"].shape
        (torch.Size([1000]), torch.Size([10, 65]))
    """

    def __init__(self, data: CleaningData) -> None:
        self.data = data
        self.weight = Hyperparameter(START, 0.0, 1.0, "sigmoid", shape=(len(data.train),), name="weight")
        head = {"head": torch.zeros(CLASSES, PIXELS + 1, requires_grad=True)}
        super().__init__(None, self._inner, self._outer, head, {"weight": self.weight}, strong_convexity=2 * PENALTY)
        self.head = head["head"]

    @property
    def weights(self) -> Float[Tensor, " train"]:
        """The weight of every training example."""
        return self.weight.value

    def _inner(self, params: dict[str, Tensor], hypers: dict[str, Tensor], rows: Tensor) -> Tensor:
        x, t = self.data.train[rows], self.data.labels[rows]
        losses = -(t * (x @ params["head"].T).log_softmax(-1)).sum(-1)
        return (hypers["weight"][rows] * losses).mean() + PENALTY * params["head"].square().sum()

    def _outer(self, params: dict[str, Tensor], hypers: dict[str, Tensor], batch: Any) -> Tensor:
        log_p = (self.data.validation @ params["head"].T).log_softmax(-1)
        return -(self.data.validation_labels * log_p).sum(-1).mean()

    @torch.no_grad()
    def inner_value_and_grad(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.counts.inner_grad += 1
        x, t, weights = self.data.train[batch], self.data.labels[batch], self._weights_of(batch)
        log_p = (x @ self.head.T).log_softmax(-1)
        value = -(weights @ (t * log_p).sum(-1)) / len(x) + PENALTY * self.head.square().sum()
        residual = (log_p.exp() - t) * weights[:, None]
        return value, {"head": torch.addmm(self.head, residual.T, x, beta=2 * PENALTY, alpha=1 / len(x))}

    @torch.no_grad()
    def hvp(self, vector: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        self.counts.hvp += 1
        x, v = self.data.train[batch], vector["head"]
        p, change = (x @ self.head.T).softmax(-1), x @ v.T
        weighted = p * change
        change = (weighted - p * weighted.sum(-1, keepdim=True)) * self._weights_of(batch)[:, None]
        return {"head": torch.addmm(v, change.T, x, beta=2 * PENALTY, alpha=1 / len(x))}

    @torch.no_grad()
    def mixed_vjp(self, vector: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        self.counts.mixed_vjp += 1
        x, t = self.data.train[batch], self.data.labels[batch]
        residual = (x @ self.head.T).softmax(-1) - t
        weights = self._weights_of(batch)
        slopes = (residual * (x @ vector["head"].T)).sum(-1) * weights * (1.0 - weights) / len(x)
        return {"weight": torch.zeros_like(self.weight.raw).index_add_(0, batch, slopes)}

    def second_derivatives(self, vector: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.hvp(vector, batch), self.mixed_vjp(vector, batch)

    @torch.no_grad()
    def outer_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        self.counts.outer_grads += 1
        x, t = self.data.validation, self.data.validation_labels
        log_p = (x @ self.head.T).log_softmax(-1)
        by_head = (log_p.exp() - t).T @ x / len(x)
        return -(t * log_p).sum() / len(x), {"head": by_head}, {"weight": torch.zeros_like(self.weight.raw)}

    def _weights_of(self, rows: Tensor) -> Tensor:
        return self.weight.from_raw(self.weight.raw[rows])


def training_rows(count: int, seed: int) -> Iterator[Tensor]:
    """Rows of shuffled batches of 64 without end, from `seed` alone.

    Example:
        >>> len(next(training_rows(1000, seed=0)))
        64
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            if len(rows) == BATCH:
                yield rows


def area_under_roc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Probability that a positive example has a larger score than a negative one; ties count half.

    Example:
        >>> area_under_roc(torch.tensor([0.1, 0.4, 0.8]), torch.tensor([False, False, True]))
        1.0
    """
    from scipy.stats import rankdata

    mask = positive.numpy()
    ranks = rankdata(scores.double().numpy())
    count = int(mask.sum())
    return float((ranks[mask].sum() - count * (count + 1) / 2) / (count * (len(mask) - count)))
