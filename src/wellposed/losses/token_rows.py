"""Rows of tokens: where the k-th target token of an example lies in a table of all tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def first_rows(num_examples: int, lengths: int | Int[Tensor, " examples"]) -> Int[Tensor, " examples_and_one"]:
    """Row of each example's first token in a table of all tokens; the last entry is their number.

    Raises:
        ValueError: if `lengths` does not hold one number >= 0 for each example.

    Example:
        >>> first_rows(3, torch.tensor([2, 0, 1]))
        tensor([0, 2, 2, 3])
    """
    counts = torch.full((num_examples,), lengths) if isinstance(lengths, int) else lengths.long().cpu()
    if counts.shape != (num_examples,) or int(counts.min()) < 0 or int(counts.sum()) < 1:
        got = lengths if isinstance(lengths, int) else f"shape {tuple(lengths.shape)}, smallest {int(lengths.min())}"
        raise ValueError(
            f"lengths must hold the number of target tokens (>= 0) of each of {num_examples} examples, got {got}"
        )
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def token_rows(
    first: Int[Tensor, " examples_and_one"], index: Int[Tensor, " batch"], valid: Bool[Tensor, "batch length"]
) -> Int[Tensor, " tokens"]:
    """Row of every valid token of a batch, in order: the k-th valid token of an example has its k-th row.

    So rows do not depend on how, and on which side, a batch was padded.

    Raises:
        ValueError: if an example has more valid tokens than its length, or an index is out of range.

    Example:
        >>> token_rows(torch.tensor([0, 2, 5]), torch.tensor([1]), torch.tensor([[False, True, True]]))
        tensor([2, 3])
    """
    examples = len(first) - 1
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < examples:
        raise ValueError(f"index must lie in [0, {examples}), got {int(index.min())} to {int(index.max())}")
    index, inside = index.to(first.device), valid.to(first.device)
    counts, room = inside.sum(1), first[index + 1] - first[index]
    if bool((counts > room).any()):
        worst = int((counts - room).argmax())
        raise ValueError(
            f"example {int(index[worst])} has {int(counts[worst])} target tokens, but lengths gives it "
            f"{int(room[worst])}"
        )
    position = inside.cumsum(1) - 1
    return (first[index][:, None] + position)[inside].to(valid.device)
