"""A Llama-like language model of a quarter of a million parameters: RMSNorm, four attention matrices, SwiGLU."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class RootMeanSquareNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension.

    Example:
        >>> RootMeanSquareNorm(2)(torch.tensor([[3.0, 3.0]]))
        tensor([[1.0000, 1.0000]], grad_fn=<MulBackward0>)
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        # torch's own function takes longer on a CPU.
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class LlamaBlock(nn.Module):
    """Attention and a gated feed-forward layer, each behind a norm, under the names of Llama's matrices."""

    def __init__(self, width: int, heads: int, factor: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm, self.post_attention_layernorm = RootMeanSquareNorm(width), RootMeanSquareNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, factor * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(factor * width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "tokens width"], batch: int, rows: int, mask: Float[Tensor, "queries keys"]
    ) -> Float[Tensor, "outputs width"]:
        """All tokens of a batch in one table; outputs for the last `rows` positions of each sequence.

        Args:
            x: `batch` sequences one after the other.
            batch: number of sequences.
            rows: number of last positions that are asked for.
            mask: of one pack of sequences, see `packed_mask`.
        """
        length = len(x) // batch
        normed = self.input_layernorm(x)
        key, value = self.k_proj(normed), self.v_proj(normed)
        if rows < length:  # keys and values of all positions, everything else for those that are asked for
            x, normed = _last(x, batch, rows), _last(normed, batch, rows)
        packs = batch * rows // len(mask)
        query, key, value = (self._by_head(part, packs) for part in (self.q_proj(normed), key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch * rows, -1)
        x = x + self.o_proj(mixed)
        normed = self.post_attention_layernorm(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return out

    def _by_head(self, x: Tensor, packs: int) -> Tensor:
        return x.view(packs, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)


@cache
def packed_mask(length: int, rows: int, pack: int) -> Float[Tensor, "queries keys"]:
    """0 where one of the last `rows` positions sees a key, minus infinity elsewhere, for `pack` sequences in one table.

    Attention over two short sequences at once takes half as long as over each by itself; the mask keeps them apart.

    Example:
        >>> packed_mask(2, 1, 2)
        tensor([[0., 0., -inf, -inf],
                [-inf, -inf, 0., 0.]])
    """
    keys = torch.arange(pack * length)
    queries = keys.view(pack, length)[:, length - rows :].reshape(-1, 1)
    seen = (queries // length == keys // length) & (keys <= queries)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


class TinyLlama(nn.Module):
    """A stack of `LlamaBlock`s with learned positions, that answers at the last positions of its input.

    Args:
        vocabulary: number of tokens.
        length: longest sequence.
        width: of the hidden states, divisible by `heads`.
        heads: attention heads.
        layers: number of blocks.
        seed: of the initialisation, which is torch's own.

    Raises:
        ValueError: if the width is not divisible by the heads.

    Example:
        >>> model = TinyLlama(vocabulary=8, length=6, width=8, heads=2, layers=2)
        >>> model(torch.zeros(3, 5, dtype=torch.long), answers=2).shape
        torch.Size([3, 2, 8])
    """

    def __init__(
        self, vocabulary: int, length: int, width: int = 64, heads: int = 4, layers: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"TinyLlama: width must be divisible by heads={heads}, got {width}")
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(vocabulary, width)
            self.embed_positions = nn.Embedding(length, width)
            self.layers = nn.ModuleList(LlamaBlock(width, heads) for _ in range(layers))
            self.norm = RootMeanSquareNorm(width)
            self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Int[Tensor, "batch length"], answers: int) -> Float[Tensor, "batch answers vocabulary"]:
        """Logits of what follows each of the last `answers` positions."""
        batch, length = tokens.shape
        x = (self.embed_tokens(tokens) + self.embed_positions.weight[:length]).view(batch * length, -1)
        pack = 1 if batch % 2 else 2
        for number, block in enumerate(self.layers):
            rows = answers if number == len(self.layers) - 1 else length
            x = block(x, batch, rows, packed_mask(length, rows, pack).to(x))
        logits: Tensor = self.lm_head(self.norm(x))
        return logits.view(batch, answers, -1)


def _last(x: Tensor, batch: int, rows: int) -> Tensor:
    return x.view(batch, -1, x.shape[-1])[:, -rows:].reshape(batch * rows, -1)
