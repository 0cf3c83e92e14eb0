"""Dropout layers with a tuned rate, for networks that one writes oneself."""

from __future__ import annotations

from torch import Tensor, nn

from ..hyperparameter import Hyperparameter, check_strength
from ..numerics.dropout_masks import dropout_rows


class HyperDropout(nn.Module):
    """Dropout whose rate is a `Hyperparameter`, under a tuner possibly another one for each example.

    Keep its range below 0.9 or so: 1 / (1 - p) explodes. No gradient reaches the rate through the mask.

    Args:
        rate: probability that a unit is dropped.

    Raises:
        TypeError: for anything but a Hyperparameter; `torch.nn.Dropout` has a fixed rate.
        ValueError: if its range reaches out of [0, 1].

    Example:
        >>> import torch
        >>> layer = HyperDropout(Hyperparameter(0.5, 0.0, 0.9))
        >>> sorted(layer(torch.ones(1, 100)).unique().tolist()), layer.eval()(torch.ones(1, 2)).tolist()
        ([0.0, 2.0], [[1.0, 1.0]])
    """

    channels = False

    def __init__(self, rate: Hyperparameter) -> None:
        super().__init__()
        owner = type(self).__name__
        if not isinstance(rate, Hyperparameter):
            raise TypeError(f"{owner}: rate must be a Hyperparameter, got {type(rate).__name__}; see torch.nn.Dropout")
        check_strength(owner, "rate", rate, 0.0, 1.0)
        self.rate = rate

    def forward(self, input: Tensor) -> Tensor:
        """Same shape as the input (batch, ...)."""
        return dropout_rows(input, self.rate(), self.channels) if self.training else input


class HyperDropout2d(HyperDropout):
    """`HyperDropout` of whole channels: inputs (batch, channels, ...).

    Example:
        >>> import torch
        >>> dropped = HyperDropout2d(Hyperparameter(0.5, 0.0, 0.9))(torch.ones(1, 50, 3, 3))
        >>> bool((dropped.amax((2, 3)) == dropped.amin((2, 3))).all())
        True
    """

    channels = True
