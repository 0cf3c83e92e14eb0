"""Learned weights of training examples: data cleaning as a bilevel problem."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..hyperparameter import Hyperparameter
from ..regularizer import Regularizer
from ..step import Step


def weighted_mean(losses: Float[Tensor, "batch ..."], weights: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the batch of `weight * loss`, divided by the number of examples and not by the sum of the weights.

    A batch of badly labelled examples then moves the network less, which is the point.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]))
        tensor(0.5000)
    """
    return (losses * weights.reshape(weights.shape + (1,) * (losses.ndim - 1))).mean()


class SampleWeights(Regularizer):
    """Data cleaning (hyper-cleaning): every training example has a weight of its own, and a tuner learns the weights.

    The inner loss is weighted, the outer one, on a few clean examples, is not; examples whose gradients point away from
    those of the clean set lose their weight. Without a tuner the weights stay as they are.

    Works in a plain loop (`criterion(losses, index)`), and as a Regularizer under `BilevelProblem.from_regularizer`.

    Args:
        n: size of the whole training set.
        init: weight of every example at the start, or one value each, strictly inside the range of the chart.
        chart: "sigmoid", weights in (0, high); "softplus" or "exp", weights in (0, infinity).
        high: largest weight of the sigmoid chart.

    Raises:
        ValueError: for an argument out of range; in use, without index, or for an index that does not fit.

    Example:
        >>> criterion = SampleWeights(4, init=0.5)
        >>> float(criterion(torch.tensor([1.0, 3.0]), torch.tensor([0, 2])))
        1.0
        >>> criterion.weights()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    requires = frozenset({"index"})

    def __init__(
        self,
        n: int,
        init: float | Tensor = 0.5,
        chart: Literal["sigmoid", "softplus", "exp"] = "sigmoid",
        high: float = 1.0,
    ) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"SampleWeights: n must be >= 1, got {n}")
        if chart not in ("sigmoid", "softplus", "exp"):
            raise ValueError(f"SampleWeights: chart must be 'sigmoid', 'softplus' or 'exp', got {chart!r}")
        upper = high if chart == "sigmoid" else math.inf
        self.weight = Hyperparameter(init, 0.0, upper, chart, shape=(n,), name="SampleWeights.weight")

    def forward(self, losses: Tensor, index: Tensor) -> Tensor:
        """Weighted mean loss, for a plain loop.

        Args:
            losses: (batch, ...), unreduced.
            index: (batch,) int64 positions in the training set.
        """
        return weighted_mean(losses, self._read(index).to(losses.dtype))

    def on_batch(self, step: Step) -> None:
        if not isinstance(step.index, Tensor):
            raise ValueError(
                "SampleWeights: step.index is missing; wrap the data set in IndexedDataset, or use TensorLoader, so that "
                "each example tells its position"
            )
        own = self._read(step.index)
        if step.weights is not None:
            own = own.reshape(own.shape + (1,) * (step.weights.ndim - 1)) * step.weights
        step.weights = own

    def weights(self) -> Float[Tensor, " examples"]:
        """The weight of every example."""
        return self.weight.value

    def suspects(self, share: float | None = None) -> Bool[Tensor, " examples"]:
        """Which examples the weights speak against.

        Args:
            share: of the examples, those of the smallest weights; None takes all below the middle between the
                smallest and the largest weight.

        Raises:
            ValueError: for a share outside of [0, 1].

        Example:
            >>> SampleWeights(3, init=torch.tensor([0.9, 0.1, 0.8])).suspects()
            tensor([False,  True, False])
        """
        weights = self.weights()
        if share is None:
            return weights < 0.5 * (weights.min() + weights.max())
        if not 0 <= share <= 1:
            raise ValueError(f"SampleWeights: share must lie in [0, 1], got {share}")
        chosen = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        chosen[weights.argsort()[: round(share * len(weights))]] = True
        return chosen

    def _read(self, index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        weights = self.weight.value
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(weights)):
            raise ValueError(
                f"SampleWeights: index must lie in [0, {len(weights)}), got {int(index.min())} to {int(index.max())}; "
                "n is the size of the whole training set"
            )
        return weights[index.to(weights.device)]
