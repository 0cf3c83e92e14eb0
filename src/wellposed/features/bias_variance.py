"""The bias-variance decomposition of the loss of a classifier whose features are stochastic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class FeatureDecomposition(NamedTuple):
    """The three parts of the expected loss, each (batch,), in nats, >= 0; see `feature_decomposition`."""

    bias: Tensor
    variance: Tensor
    constant: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, the expected cross-entropy; (batch,)."""
        return self.bias + self.variance + self.constant


def feature_decomposition(
    log_probabilities: Float[Tensor, "draws batch classes"],
    labels: Float[Tensor, "batch classes"],
    weights: Float[Tensor, " draws"] | None = None,
) -> FeatureDecomposition:
    """Split `E_y E_z[-log q(y|z)]` into bias, variance and a constant (theorem 1 of arXiv 2206.13140).

    With the normalised geometric mean `g(y) = exp(E_z log q(y|z)) / Z`, `Z = sum_y exp(E_z log q(y|z)) <= 1`:

        E_y E_z[-log q(y|z)]  =  KL(p || g)  +  E_z KL(g || q(.|z))  +  H(p)
                                    bias             variance            constant

    and the variance equals `-log Z`, which is how it is computed. Under label noise p is the NOISY conditional: a bias
    of zero means that the noise is fitted, and compressed features trade it for variance.

    Args:
        log_probabilities: log q(y|z) for each draw (or each possible value) of the stochastic feature z, normalised over
            the classes; e.g. `prefix_logits(...).log_softmax(-1)` for nested dropout.
        labels: p(y|x): one-hot labels, or a conditional distribution.
        weights: q(z|x), probabilities of the draws; equal ones if None. For nested dropout, `layer.probabilities`.

    Raises:
        ValueError: if the weights are no distribution.

    Example:
        >>> q = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]])
        >>> parts = feature_decomposition(q.log(), torch.tensor([[1.0, 0.0]]))
        >>> torch.allclose(parts.total, -(q[0, :, 0].log() + q[1, :, 0].log()) / 2)
        True
    """
    if weights is None:
        mean = log_probabilities.mean(0)
    else:
        if not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1.0) > 1e-4:
            raise ValueError(
                f"feature_decomposition: weights must be >= 0 and sum to 1, got sum {float(weights.sum())}"
            )
        mean = torch.tensordot(weights.to(log_probabilities), log_probabilities, dims=1)
    log_z = mean.logsumexp(-1)
    p = labels.to(mean)
    # Classes that the label excludes count nothing, also where their log-probability is -inf.
    cross = -torch.where(p > 0, p * (mean - log_z[:, None]), 0.0).sum(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    return FeatureDecomposition(cross - entropy, -log_z, entropy)
