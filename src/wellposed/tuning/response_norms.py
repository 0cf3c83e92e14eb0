"""Normalisation layers whose gain and bias respond; running statistics are those of the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from .response_functions import spread
from .response_input import ResponseState
from .response_layers import ResponseLayer, scales


class NormResponse(nn.Module):
    """G and H of gain + G k and bias + H k: they are affine in k already, and need no second gain or bias.

    Args:
        state: shared by the network.
        weight, bias: gain and bias of the layer.
        name: of the layer, for messages.
        generator: of the initial numbers.
    """

    def __init__(
        self, state: ResponseState, weight: Tensor, bias: Tensor | None, name: str, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.state, self.name = state, name
        self.scale = scales(state, weight, weight.numel(), generator)
        self.bias_scale = None if bias is None else scales(state, bias, bias.numel(), generator)

    def squared_norm(self, k: Tensor | None, name: str, general: Tensor) -> Tensor:
        """Squared norm of gain or bias under `k`: a scalar, or one number for each row."""
        if k is None:
            return general.square().sum()
        found = (general.flatten() + k @ self._scale(name).T).square().sum(-1)
        return found[0] if len(found) == 1 else found

    def collapsed(self, k: Tensor, name: str, general: Tensor) -> Tensor:
        """The tensor itself at one response input (n,)."""
        return general + (self._scale(name) @ k).reshape(general.shape)

    def _scale(self, name: str) -> Tensor:
        scale = self.scale if name == "weight" else self.bias_scale
        assert scale is not None
        return scale


class _ResponseNorm(ResponseLayer):
    """Normalise without gain and bias, then apply those of each example."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape as the input."""
        r = self.response
        k = r.state.current()
        if k is None:
            return super().forward(input)  # type: ignore[misc, no-any-return]
        layer: Any = self
        normalised = self._normalised(input)
        gain = self._shaped(k @ r.scale.T, normalised)
        shift = None if layer.bias is None else self._shaped(k @ r.bias_scale.T, normalised)
        weight = self._shaped(layer.weight.flatten()[None], normalised)
        bias = None if layer.bias is None else self._shaped(layer.bias.flatten()[None], normalised)
        if not r.state.linearized:
            y = normalised * (weight + gain)
            return y if bias is None or shift is None else y + (bias + shift)
        primal, tangent = forward_ad.unpack_dual(normalised)
        y, moved = primal * weight, primal * gain
        if bias is not None and shift is not None:
            y, moved = y + bias, moved + shift
        return forward_ad.make_dual(y, moved if tangent is None else moved + tangent * weight)

    def _normalised(self, input: Tensor) -> Tensor:
        """The input normalised, with gain 1 and bias 0; writes running statistics just as the layer itself would."""
        raise NotImplementedError

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        return spread(rows, like, 1, self.response.name)


class _ResponseBatchNorm(_ResponseNorm):
    """Statistics over the batch, or the running ones."""

    def _normalised(self, input: Tensor) -> Tensor:
        layer: Any = self
        layer._check_input_dim(input)
        share = layer.momentum
        if layer.training and layer.track_running_stats:
            layer.num_batches_tracked.add_(1)
            if share is None:  # the cumulative average
                share = 1.0 / float(layer.num_batches_tracked)
        from_batch = layer.training or layer.running_mean is None
        kept = not layer.training or layer.track_running_stats
        mean, variance = (layer.running_mean, layer.running_var) if kept else (None, None)
        return F.batch_norm(input, mean, variance, None, None, from_batch, share or 0.0, layer.eps)


class _ResponseInstanceNorm(_ResponseNorm):
    """Statistics over the places of each example."""

    def _normalised(self, input: Tensor) -> Tensor:
        layer: Any = self
        layer._check_input_dim(input)
        from_input = layer.training or not layer.track_running_stats
        return F.instance_norm(
            input, layer.running_mean, layer.running_var, None, None, from_input, layer.momentum or 0.0, layer.eps
        )


class _OverLastDimensions(_ResponseNorm):
    """Layer norm and root-mean-square norm: a gain for each place of the last dimensions."""

    def _normalised(self, input: Tensor) -> Tensor:
        layer: Any = self
        function: Callable[..., Tensor] = F.layer_norm if isinstance(self, nn.LayerNorm) else F.rms_norm
        none = (None, None) if isinstance(self, nn.LayerNorm) else (None,)
        return function(input, layer.normalized_shape, *none, layer.eps)

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        shape = getattr(self, "normalized_shape")  # noqa: B009 - the attribute is of the class mixed in
        flat = spread(rows, like.flatten(like.ndim - len(shape)), -1, self.response.name)
        return flat.reshape(*flat.shape[:-1], *shape)


class ResponseBatchNorm1d(_ResponseBatchNorm, nn.BatchNorm1d):
    """Batch normalization whose gain and bias respond."""


class ResponseBatchNorm2d(_ResponseBatchNorm, nn.BatchNorm2d):
    """Batch normalization whose gain and bias respond."""


class ResponseBatchNorm3d(_ResponseBatchNorm, nn.BatchNorm3d):
    """Batch normalization whose gain and bias respond."""


class ResponseInstanceNorm1d(_ResponseInstanceNorm, nn.InstanceNorm1d):
    """Instance normalization whose gain and bias respond."""


class ResponseInstanceNorm2d(_ResponseInstanceNorm, nn.InstanceNorm2d):
    """Instance normalization whose gain and bias respond."""


class ResponseInstanceNorm3d(_ResponseInstanceNorm, nn.InstanceNorm3d):
    """Instance normalization whose gain and bias respond."""


class ResponseGroupNorm(_ResponseNorm, nn.GroupNorm):
    """Group normalization whose gain and bias respond."""

    def _normalised(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, None, None, self.eps)


class ResponseLayerNorm(_OverLastDimensions, nn.LayerNorm):
    """Layer normalization whose gain and bias respond."""


class ResponseRMSNorm(_OverLastDimensions, nn.RMSNorm):
    """Root-mean-square normalization whose gain responds."""

    tensors = ("weight",)
    bias = None
