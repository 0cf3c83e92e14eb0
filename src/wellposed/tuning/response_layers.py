"""Linear, convolutional and embedding layers that respond to the hyperparameters.

A layer is converted in place: its class becomes the response class, its weight and bias keep their names (W0, b0), and
a child `response` holds what the response needs. Hooks, parametrizations and references to the layer stay valid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from .linearization import linearized_affine
from .response_functions import response_linear, response_squared_norm, response_weight, spread
from .response_input import ResponseState

NORMAL_SCALE = 0.01
"""Standard deviation of V and C at the start of an STN; a Delta-STN starts with zeros."""


class Response(nn.Module):
    """What one layer adds to respond: W1 and b1 beside its own weights, and V and C that scale them.

    Args:
        state: shared by the network.
        weight, bias: of the layer; shapes, types and devices are theirs.
        name: of the layer, for messages.
        generator: of the initial numbers.
        fan_in: inputs of one output unit; W1 and b1 ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
        columns: whether the columns respond and not the rows (an embedding).

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> response = Response(ResponseState(4), layer.weight, layer.bias, "fc", torch.Generator(), fan_in=3)
        >>> {name: tuple(p.shape) for name, p in response.named_parameters()}
        {'weight': (2, 3), 'scale': (2, 4), 'bias': (2,), 'bias_scale': (2, 4)}
    """

    def __init__(
        self,
        state: ResponseState,
        weight: Tensor,
        bias: Tensor | None,
        name: str,
        generator: torch.Generator,
        fan_in: float,
        columns: bool = False,
    ) -> None:
        super().__init__()
        self.state = state
        self.name, self.columns = name, columns
        bound = 1.0 / math.sqrt(fan_in)
        channels = weight.shape[1 if columns else 0]
        self.weight = drawn(weight, weight.shape, generator, bound)
        self.scale = scales(state, weight, channels, generator)
        self.bias: nn.Parameter | None = None
        self.bias_scale: nn.Parameter | None = None
        if bias is not None:
            self.bias = drawn(bias, bias.shape, generator, bound)
            self.bias_scale = scales(state, bias, channels, generator)

    def squared_norm(self, k: Tensor | None, name: str, general: Tensor) -> Tensor:
        """||W||^2 or ||b||^2 under `k`: a scalar, or one number for each row."""
        if k is None:
            return general.square().sum()
        if name == "weight":
            matrices = [w.T if self.columns else w.flatten(1) for w in (general, self.weight)]
            found = response_squared_norm(k, matrices[0], matrices[1], self.scale)
        else:
            assert self.bias is not None and self.bias_scale is not None
            found = torch.addcmul(general, k @ self.bias_scale.T, self.bias).square().sum(-1)
        return found[0] if len(found) == 1 else found

    def collapsed(self, k: Tensor, name: str, general: Tensor) -> Tensor:
        """The tensor itself at one response input (n,)."""
        if name == "weight":
            return response_weight(k, general, self.weight, self.scale, 1 if self.columns else 0)
        assert self.bias is not None and self.bias_scale is not None
        return torch.addcmul(general, self.bias_scale @ k, self.bias)


def drawn(like: Tensor, shape: Any, generator: torch.Generator, bound: float) -> nn.Parameter:
    """A parameter ~ U(-bound, bound) of the type and on the device of `like`; drawn on the CPU, in float32."""
    numbers = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(numbers.to(like))


def scales(state: ResponseState, like: Tensor, channels: int, generator: torch.Generator) -> nn.Parameter:
    """V or C at the start: zeros for a Delta-STN, N(0, 0.01^2) for an STN, in which zeros would not learn W1 at all."""
    if state.centred:
        return nn.Parameter(like.detach().new_zeros(channels, state.size))
    return nn.Parameter(NORMAL_SCALE * torch.randn(channels, state.size, generator=generator).to(like))


class ResponseLayer(nn.Module):
    """What the converted layers share; mixed in before the class that the layer had.

    Attributes:
        response: see `Response`.
        tensors: names of the tensors that respond.
    """

    response: Any
    tensors: tuple[str, ...] = ("weight", "bias")

    def squared_norm(self, name: str) -> Tensor:
        """||W||^2 or ||b||^2 as the network uses it now: a scalar, or (batch,) under a response of each example.

        The protocol of `wellposed.weights.WeightDecay`: it asks a layer that offers this for the norms of its tensors.
        """
        return self.response.squared_norm(self.response.state.current(), name, getattr(self, name))  # type: ignore[no-any-return]

    def collapsed(self, k: Tensor) -> dict[str, Tensor]:
        """The tensors that respond, at one response input (n,)."""
        own = {name: getattr(self, name) for name in self.tensors}
        return {name: self.response.collapsed(k, name, t) for name, t in own.items() if t is not None}


class ResponseLinear(ResponseLayer, nn.Linear):
    """A linear layer whose rows respond; see `response_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, ..., inputs) -> (batch, ..., outputs)."""
        r = self.response
        k = r.state.current()
        if k is None:
            return F.linear(input, self.weight, self.bias)
        if not r.state.linearized:
            return response_linear(input, k, self.weight, self.bias, r.weight, r.bias, r.scale, r.bias_scale, r.name)
        shift = None if r.bias is None else spread((k @ r.bias_scale.T) * r.bias, input, -1, r.name)
        factor = spread(k @ r.scale.T, input, -1, r.name)
        return linearized_affine(F.linear, input, self.weight, self.bias, r.weight, factor, shift)


class _ResponseConvolution(ResponseLayer):
    """One scale for each output channel, for all places alike."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, ...) -> (batch, channels, ...)."""
        layer: Any = self
        r = self.response
        k = r.state.current()
        if k is None:
            return layer._conv_forward(input, layer.weight, layer.bias)  # type: ignore[no-any-return]
        if input.ndim != layer.weight.ndim:
            raise ValueError(
                f"{r.name}: a convolution responds to batches only, got an input of {input.ndim} dimensions"
            )
        factor = spread(k @ r.scale.T, input, 1, r.name)
        shift = None if r.bias is None else spread((k @ r.bias_scale.T) * r.bias, input, 1, r.name)
        if r.state.linearized:
            return linearized_affine(layer._conv_forward, input, layer.weight, layer.bias, r.weight, factor, shift)
        general = layer._conv_forward(input, layer.weight, layer.bias)
        y = torch.addcmul(general, factor, layer._conv_forward(input, r.weight, None))
        return y if shift is None else y + shift.to(y.dtype)


class ResponseConv1d(_ResponseConvolution, nn.Conv1d):
    """A convolution whose output channels respond."""


class ResponseConv2d(_ResponseConvolution, nn.Conv2d):
    """A convolution whose output channels respond."""


class ResponseConv3d(_ResponseConvolution, nn.Conv3d):
    """A convolution whose output channels respond."""


class ResponseEmbedding(ResponseLayer, nn.Embedding):
    """An embedding whose dimensions respond: E0[i] + (k V') * E1[i]."""

    tensors = ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, ...) of indices -> (batch, ..., dimensions)."""
        r = self.response
        k = r.state.current()
        general = self._look_up(input, self.weight)
        if k is None:
            return general
        moved = spread(k @ r.scale.T, general, -1, r.name) * self._look_up(input, r.weight)
        return forward_ad.make_dual(general, moved) if r.state.linearized else general + moved

    def _look_up(self, input: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )
