"""Separate projections in `nn.MultiheadAttention`, so that low-rank adapters (or anything else) can act on q, k and v.

`nn.MultiheadAttention` keeps the three input projections in one matrix, and hands it to a fused function: an adapter must
either change all three at once, or merge itself into the matrix in every forward pass. Split, they are ordinary linear
layers, which `wellposed.weights.low_rank` adapts by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """The same function as an `nn.MultiheadAttention`, with linear layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    Takes the arguments of `nn.MultiheadAttention.forward`. Weights are copied, and keep whether they train.

    Args:
        attention: what it replaces.

    Raises:
        TypeError: if it is no `nn.MultiheadAttention`.
        ValueError: for learned or zero rows added to keys and values (`add_bias_kv`, `add_zero_attn`).

    Example:
        >>> attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
        >>> torch.allclose(SplitAttention(attention)(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(
                f"SplitAttention: attention must be an nn.MultiheadAttention, got {type(attention).__name__}"
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("SplitAttention: add_bias_kv and add_zero_attn are not supported")
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.dropout, self.batch_first = attention.head_dim, attention.dropout, attention.batch_first
        whole = attention.in_proj_weight
        weights = (
            whole.chunk(3)
            if whole is not None
            else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
        bias = attention.in_proj_bias
        parts = (None,) * 3 if bias is None else bias.chunk(3)
        trained = (attention.in_proj_weight if whole is not None else attention.q_proj_weight).requires_grad
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(w, b, trained, bias is not None and bias.requires_grad) for w, b in zip(weights, parts, strict=True)
        )
        # A plain layer: the one of nn.MultiheadAttention only tells quantisation to keep away.
        out = attention.out_proj
        bias_trains = out.bias is not None and out.bias.requires_grad
        self.out_proj = _linear(out.weight, out.bias, out.weight.requires_grad, bias_trains)
        # nn.TransformerEncoderLayer asks for these before it takes its fused path in evaluation, which must not be taken.
        self._qkv_same_embed_dim = False
        self.in_proj_weight = self.in_proj_bias = None
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention; see `nn.MultiheadAttention`.

        Returns:
            The output, and the weights of attention (None without `need_weights`).

        Raises:
            ValueError: for `is_causal` without a mask, as in torch.
        """
        if is_causal and attn_mask is None:
            raise ValueError("SplitAttention: is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        single = query.ndim == 2
        first = 0 if self.batch_first else 1
        if single:
            query, key, value = (t.unsqueeze(first) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            self._heads(project(t)) for project, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            output, weights = output.squeeze(first), None if weights is None else weights.squeeze(0)
        return output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, width) to (batch, heads, length, width of a head)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        found = None
        if attn_mask is not None:
            found = _additive(attn_mask, q.dtype)
            if found.ndim == 3:  # (batch * heads, target, source)
                found = found.view(len(q), self.num_heads, *found.shape[1:])
        if padding is not None:
            hidden = _additive(padding, q.dtype)[:, None, None, :]
            found = hidden if found is None else found + hidden
        return found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool, bias_trained: bool) -> nn.Linear:
    layer = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    layer.weight.requires_grad_(trained)
    if bias is not None:
        layer.bias.requires_grad_(bias_trained)
    return layer


def split_attention(
    model: nn.Module, targets: Sequence[str] | Callable[[str, nn.Module], bool] | None = None
) -> list[str]:
    """Replace every `nn.MultiheadAttention` of a model by a `SplitAttention`, in place.

    Afterwards `add_low_rank(model, rank, targets=["q_proj", "v_proj"])` adapts what it names, without merging in the
    forward pass; `merge_low_rank` and `join_attention` lead back.

    Args:
        model: must hold an attention layer, and not be one.
        targets: which: None for all, name endings, or a predicate `(name, module) -> bool`.

    Returns:
        Names of the layers replaced.

    Raises:
        ValueError: if there is none, or an ending matches none.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank, merge_low_rank
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> split_attention(model), add_low_rank(model, rank=2, targets=["q_proj", "v_proj"])
        (['self_attn'], ['self_attn.q_proj', 'self_attn.v_proj'])
        >>> join_attention(merge_low_rank(model))
        ['self_attn']
    """
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.MultiheadAttention)]
    found = _chosen(found, targets)
    made: dict[int, SplitAttention] = {}
    for name, part in found:
        if id(part) not in made:
            made[id(part)] = SplitAttention(part)
        _put(model, name, made[id(part)])
    for stack in _stacks(model):
        # In evaluation a stack would hand nested tensors to its layers' fused path.
        stack.use_nested_tensor, stack.nested_before_split = False, stack.use_nested_tensor
    return [name for name, _ in found]


def _stacks(model: nn.Module) -> list[Any]:
    """Stacks of torch's encoder layers that hold split attention and were not told yet."""
    stacks: list[Any] = [part for part in model.modules() if isinstance(part, nn.TransformerEncoder)]
    return [
        stack
        for stack in stacks
        if stack.use_nested_tensor and any(isinstance(part, SplitAttention) for part in stack.modules())
    ]


def join_attention(model: nn.Module) -> list[str]:
    """Turn every `SplitAttention` of a model back into an `nn.MultiheadAttention`, in place.

    Returns:
        Names of the layers replaced.

    Raises:
        ValueError: if there is none, or one still holds adapters: merge those first (`merge_low_rank`).

    Example:
        >>> model = nn.Sequential(SplitAttention(nn.MultiheadAttention(4, 2)))
        >>> join_attention(model), type(model[0]).__name__
        (['0'], 'MultiheadAttention')
    """
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SplitAttention)]
    if not found:
        raise ValueError("join_attention: model holds no SplitAttention; it was joined before, or never split")
    made: dict[int, nn.MultiheadAttention] = {}
    for name, part in found:
        if id(part) not in made:
            made[id(part)] = _joined(name, part)
        _put(model, name, made[id(part)])
    for stack in model.modules():
        if hasattr(stack, "nested_before_split"):
            stack.use_nested_tensor = stack.nested_before_split
            del stack.nested_before_split
    return [name for name, _ in found]


def _joined(name: str, part: SplitAttention) -> nn.MultiheadAttention:
    layers = [part.q_proj, part.k_proj, part.v_proj, part.out_proj]
    for own, layer in zip(("q_proj", "k_proj", "v_proj", "out_proj"), layers, strict=True):
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"join_attention: {name}.{own} is a {type(layer).__name__}; merge adapters first (merge_low_rank)"
            )
    q, k, v, out = layers
    joined = nn.MultiheadAttention(
        part.embed_dim, part.num_heads, part.dropout, bias=q.bias is not None, kdim=k.in_features, vdim=v.in_features,
        batch_first=part.batch_first, device=q.weight.device, dtype=q.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        if joined.in_proj_weight is not None:
            joined.in_proj_weight.copy_(torch.cat([layer.weight for layer in (q, k, v)]))
        else:
            for target, layer in zip(
                (joined.q_proj_weight, joined.k_proj_weight, joined.v_proj_weight), (q, k, v), strict=True
            ):
                target.copy_(layer.weight)
        joined.out_proj.weight.copy_(out.weight)
        if q.bias is not None:
            joined.in_proj_bias.copy_(torch.cat([layer.bias for layer in (q, k, v)]))
            joined.out_proj.bias.copy_(out.bias)
    for name_of, parameter in joined.named_parameters():
        source = out if name_of.startswith("out_proj") else q
        parameter.requires_grad_((source.bias if "bias" in name_of else source.weight).requires_grad)
    return joined.train(part.training)


def _chosen(found: Sequence[tuple[str, Any]], targets: Any) -> list[tuple[str, Any]]:
    if not found:
        raise ValueError("split_attention: model holds no nn.MultiheadAttention")
    if any(not name for name, _ in found):
        raise ValueError("split_attention: model is an nn.MultiheadAttention itself; use SplitAttention(model)")
    if callable(targets):
        chosen = [(name, part) for name, part in found if targets(name, part)]
    elif targets is None:
        chosen = list(found)
    else:
        ends = {ending: [e for e in found if f".{e[0]}".endswith(f".{ending}")] for ending in targets}
        if without := [ending for ending, matching in ends.items() if not matching]:
            raise ValueError(
                f"split_attention: targets names {without[0]!r}, but the attention layers are {[n for n, _ in found]}"
            )
        chosen = [e for e in found if any(e in matching for matching in ends.values())]
    if not chosen:
        raise ValueError("split_attention: targets leaves no attention layer")
    return chosen


def _put(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, part)
