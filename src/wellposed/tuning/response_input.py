"""`ResponseState`: the response input of the present forward pass, which all response layers of a network share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ResponseState(nn.Module):
    """How far the hyperparameters are from where the network's weights are centred: one row for each example.

    The response layers of one network hold the same state, so that its own `forward` stays as it is; nothing is global.
    Between the steps of a tuner the response is at rest: nothing in a Delta-STN (`centred`), whose W0 are the weights;
    the present hyperparameters in an STN, whose W0 are the weights at its first ones.

    Args:
        size: n, the number of hyperparameters.
        centred: whether the response is zero at the present hyperparameters (Delta-STN).

    Attributes:
        k: (batch, n) or (1, n) in use, or None at rest.
        linearized: whether predictions are linearised in k around 0 (see `wellposed.tuning.convert`).
        reference: (n,) unconstrained values from which k counts in an STN.
        rest: (n,) response input at rest.

    Raises:
        ValueError: if size < 1.

    Example:
        >>> state = ResponseState(2)
        >>> with state.at(torch.ones(1, 2)):
        ...     print(state.current())
        tensor([[1., 1.]])
        >>> state.current() is None
        True
    """

    reference: Tensor
    rest: Tensor

    def __init__(self, size: int, centred: bool = True) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"ResponseState: size must be >= 1, got {size}")
        self.size, self.centred = size, centred
        self.register_buffer("reference", torch.zeros(size))
        self.register_buffer("rest", torch.zeros(size))
        self.k: Tensor | None = None
        self.linearized = False

    def current(self) -> Float[Tensor, "rows n"] | None:
        """The response input in use, that at rest, or None where there is no response."""
        if self.k is None and not self.centred:
            return self.rest[None]
        return self.k

    @contextmanager
    def at(self, k: Float[Tensor, "rows n"], linearized: bool = False) -> Iterator[None]:
        """Inside the block the network responds to `k`: one row for all examples, or one for each.

        Raises:
            ValueError: unless k has shape (rows, n).
        """
        if k.ndim != 2 or k.shape[1] != self.size:
            raise ValueError(f"ResponseState: k must have shape (rows, {self.size}), got {tuple(k.shape)}")
        before = self.k, self.linearized
        self.k, self.linearized = k, linearized
        try:
            yield
        finally:
            self.k, self.linearized = before

    def extra_repr(self) -> str:
        return f"size={self.size}, centred={self.centred}"
