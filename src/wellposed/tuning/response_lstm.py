"""An LSTM whose input-to-gates and hidden-to-gates maps respond to the hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .linearization import linearized_affine
from .response_functions import response_linear, spread
from .response_input import ResponseState
from .response_layers import Response, ResponseLayer


class LSTMResponse(nn.Module):
    """The responses of all maps of an LSTM: `maps["ih_l0"]` belongs to `weight_ih_l0` and `bias_ih_l0`.

    Args:
        state: shared by the network.
        layer: the LSTM.
        name: of the layer, for messages.
        generator: of the initial numbers.
    """

    def __init__(self, state: ResponseState, layer: nn.LSTM, name: str, generator: torch.Generator) -> None:
        super().__init__()
        self.state, self.name = state, name
        self.maps = nn.ModuleDict()
        for key in map_names(layer):
            bias = getattr(layer, f"bias_{key}", None)
            # torch draws all LSTM weights with the fan-in of the hidden state.
            self.maps[key] = Response(
                state, getattr(layer, f"weight_{key}"), bias, f"{name}.{key}", generator, layer.hidden_size
            )

    def squared_norm(self, k: Tensor | None, name: str, general: Tensor) -> Tensor:
        """Squared norm of one of the LSTM's tensors under `k`."""
        kind, _, key = name.partition("_")
        return self.maps[key].squared_norm(k, kind, general)  # type: ignore[operator, no-any-return]

    def collapsed(self, k: Tensor, name: str, general: Tensor) -> Tensor:
        """One of the LSTM's tensors at one response input (n,)."""
        kind, _, key = name.partition("_")
        return self.maps[key].collapsed(k, kind, general)  # type: ignore[operator, no-any-return]


def map_names(layer: nn.LSTM) -> list[str]:
    """Names of the maps of an LSTM, as torch numbers its weights.

    Example:
        >>> map_names(nn.LSTM(2, 3, bidirectional=True))
        ['ih_l0', 'hh_l0', 'ih_l0_reverse', 'hh_l0_reverse']
    """
    ways = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"{kind}_l{i}{way}" for i in range(layer.num_layers) for way in ways for kind in ("ih", "hh")]


class ResponseLSTM(ResponseLayer, nn.LSTM):
    """An LSTM of response linears; at rest torch's own fused LSTM.

    Under a response the time steps run one by one: the input-to-gates map of all of them at once, then the
    hidden-to-gates map of each. Takes tensors (length, batch, inputs), or (batch, length, inputs) with `batch_first`.
    """

    @property
    def tensors(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the tensors that respond, as torch orders them."""
        return tuple(name for names in self._all_weights for name in names)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As `nn.LSTM`: outputs, and the last (h, c).

        Raises:
            TypeError: under a response, for a packed sequence.
            ValueError: under a response, for a sequence without batch dimension.
        """
        state = self.response.state
        if state.current() is None:
            return super().forward(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"{self.response.name}: a response LSTM takes padded tensors, not {type(input).__name__}")
        if input.ndim != 3:
            raise ValueError(f"{self.response.name}: a response LSTM takes batches, got {input.ndim} dimensions")
        x = input if self.batch_first else input.transpose(0, 1)
        ways = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * ways, len(x), self.hidden_size)
        first = (zeros, zeros) if hx is None else hx
        last: tuple[list[Tensor], list[Tensor]] = [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for way in range(ways):
                index = layer * ways + way
                key = f"l{layer}{'_reverse' if way else ''}"
                y, h, c = self._run(x, first[0][index], first[1][index], key, backwards=way == 1)
                outputs.append(y)
                last[0].append(h)
                last[1].append(c)
            x = torch.cat(outputs, -1) if ways == 2 else outputs[0]
        final = torch.stack(last[0]), torch.stack(last[1])
        return (x if self.batch_first else x.transpose(0, 1)), final

    def _run(
        self, x: Float[Tensor, "batch length inputs"], h: Tensor, c: Tensor, key: str, backwards: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        from_inputs = self._mapped(x, f"ih_{key}").unbind(1)
        outputs: list[Tensor] = []
        for gates in reversed(from_inputs) if backwards else from_inputs:
            i, f, g, o = (gates + self._mapped(h, f"hh_{key}")).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs, 1), h, c

    def _mapped(self, x: Tensor, key: str) -> Tensor:
        r: Response = self.response.maps[key]
        k = r.state.current()
        assert k is not None
        weight, bias = getattr(self, f"weight_{key}"), getattr(self, f"bias_{key}", None)
        if not r.state.linearized:
            return response_linear(x, k, weight, bias, r.weight, r.bias, r.scale, r.bias_scale, r.name)
        shift = None
        if r.bias is not None and r.bias_scale is not None:
            shift = spread((k @ r.bias_scale.T) * r.bias, x, -1, r.name)
        factor = spread(k @ r.scale.T, x, -1, r.name)
        return linearized_affine(F.linear, x, weight, bias, r.weight, factor, shift)
