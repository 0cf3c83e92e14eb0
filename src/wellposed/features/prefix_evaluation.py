"""What each prefix of a feature vector is worth: logits and accuracy of all of them, exactly, and the choice of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..objective import Criterion, cross_entropy

Head = nn.Module | Callable[[Tensor], Tensor]


def prefix_logits(
    features: Float[Tensor, "batch features ..."],
    head: Head,
    ks: Sequence[int] | Int[Tensor, " prefixes"] | None = None,
    block: int = 16,
) -> Float[Tensor, "prefixes batch classes"]:
    """Logits of the head on the first k features alone, for every k at once; differentiable.

    For a linear head the logits of prefix k are those of prefix k - 1 plus `h_k W_k`, so that all K of them are a
    running sum over the features, at the price of K single features instead of K full passes.

    Args:
        features: (batch, K), or (batch, K, ...) for a head that takes feature maps.
        head: `nn.Linear`, with or without bias, for the fast way; any other callable is called once for each prefix, on
            features whose others are 0.
        ks: prefix lengths in increasing order; 1, ..., K if None.
        block: features summed at a time.

    Returns:
        (prefixes, batch, classes).

    Raises:
        ValueError: for ks that do not increase or do not lie in [1, K], a block < 1, or a head of another size.

    Example:
        >>> head = nn.Linear(3, 2, bias=False)
        >>> _ = nn.init.ones_(head.weight)
        >>> prefix_logits(torch.tensor([[1.0, 2.0, 3.0]]), head)[:, 0, 0]
        tensor([1., 3., 6.], grad_fn=<SelectBackward0>)
    """
    return torch.cat(list(_blocks(features, head, _lengths(ks, features.shape[1]), block)))


@torch.no_grad()
def prefix_accuracy(
    features: Tensor | Sequence[Tensor],
    labels: Int[Tensor, " batch"],
    head: Head | Sequence[Head],
    ks: Sequence[int] | Int[Tensor, " prefixes"] | None = None,
    block: int = 16,
    batch: int = 1024,
) -> Float[Tensor, " prefixes"]:
    """Accuracy of every prefix, as in the paper's evaluation; exact (see `prefix_logits`).

    Args:
        features: (batch, K) or (batch, K, ...); a list of such, one for each network of an ensemble.
        labels: (batch,) classes.
        head: takes the features; a list like the features averages the logits of an ensemble at equal prefixes.
        ks: prefix lengths in increasing order; 1, ..., K if None.
        block: features summed at a time; memory is block x batch x classes.
        batch: examples at a time.

    Returns:
        (prefixes,) float32, each the share of right predictions.

    Raises:
        ValueError: if features, labels and heads do not fit together; else as `prefix_logits`.

    Example:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> _ = head.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> prefix_accuracy(torch.tensor([[1.0, 2.0], [1.0, 0.5]]), torch.tensor([1, 0]), head)
        tensor([0.5000, 1.0000])
    """
    parts: list[Tensor] = [features] if isinstance(features, Tensor) else list(features)
    heads: list[Head] = list(head) if isinstance(head, (list, tuple)) else [head]  # type: ignore[list-item]
    if len(parts) != len(heads) or any(len(part) != len(labels) for part in parts) or len(labels) == 0:
        raise ValueError(
            f"prefix_accuracy: need one head for each feature tensor, and {len(labels)} > 0 rows in each; got "
            f"{len(heads)} heads and rows {[len(part) for part in parts]}"
        )
    lengths = _lengths(ks, parts[0].shape[1])
    hits = torch.zeros(len(lengths), dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        ways = [_blocks(part[rows], h, lengths, block) for part, h in zip(parts, heads, strict=True)]
        done = 0
        for logits in zip(*ways, strict=True):
            total = logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)
            # The first of equals, as argmax has it, and faster.
            right = (total.max(-1).indices == labels[rows]).sum(-1)
            hits[done : done + len(right)] += right
            done += len(right)
    return hits / len(labels)


def expected_prefix_loss(
    features: Float[Tensor, "batch features ..."],
    targets: Tensor,
    head: Head,
    probabilities: Float[Tensor, " features"],
    criterion: Criterion = cross_entropy,
) -> Float[Tensor, " batch"]:
    """The exact mean loss under nested dropout, `sum_k p_k loss(head(first k features))`, unreduced; differentiable.

    What a sampled step estimates: its gradient has no variance from k, at the price of K losses.

    Args:
        features: (batch, K), before the mask.
        targets: what the criterion takes.
        head: see `prefix_logits`.
        probabilities: p, (K,).
        criterion: unreduced loss of (outputs, targets).

    Example:
        >>> x, head = torch.ones(1, 2), nn.Linear(2, 2)
        >>> only_full = torch.tensor([0.0, 1.0])
        >>> loss = expected_prefix_loss(x, torch.tensor([0]), head, only_full)
        >>> torch.allclose(loss, cross_entropy(head(x), torch.tensor([0])))
        True
    """
    logits = prefix_logits(features, head)
    losses = torch.stack([criterion(row, targets) for row in logits])
    return probabilities.to(losses) @ losses


def select_prefix(
    accuracy: Float[Tensor, " prefixes"],
    penalty: float = 1e-5,
    rule: Literal["best", "one_se"] = "best",
    *,
    ks: Sequence[int] | Int[Tensor, " prefixes"] | None = None,
    num_examples: int | None = None,
) -> int:
    """How many features to keep, k*, from each prefix's accuracy on validation data.

    - "best": `argmax_k (accuracy_k - penalty (k - 1))`, the paper's rule: of equals the shortest.
    - "one_se": the shortest prefix whose accuracy lies within one standard error of the best. Where the curve is flat
      the first rule picks among equals by noise; this one does not.

    Args:
        accuracy: of each prefix, in [0, 1].
        penalty: for each further feature, >= 0.
        rule: one of the two.
        ks: the prefix lengths of `accuracy`; 1, ..., K if None.
        num_examples: how many examples the accuracies rest on; for "one_se".

    Returns:
        k*, at least 1: a number of features, not an index.

    Raises:
        ValueError: for an empty or non-finite accuracy, a negative penalty, an unknown rule, or no `num_examples`.

    Example:
        >>> curve = torch.tensor([0.5, 0.88, 0.9, 0.9])
        >>> select_prefix(curve), select_prefix(curve, rule="one_se", num_examples=100)
        (3, 2)
    """
    if accuracy.ndim != 1 or len(accuracy) == 0 or not bool(accuracy.isfinite().all()):
        raise ValueError(f"select_prefix: accuracy must be a vector of finite numbers, got {accuracy}")
    if not penalty >= 0:
        raise ValueError(f"select_prefix: penalty must be >= 0, got {penalty}")
    lengths = list(range(1, len(accuracy) + 1)) if ks is None else [int(k) for k in ks]
    if len(lengths) != len(accuracy):
        raise ValueError(f"select_prefix: ks must hold {len(accuracy)} lengths, got {len(lengths)}")
    values = accuracy.tolist()
    if rule == "best":
        scores = [value - penalty * (k - 1) for value, k in zip(values, lengths, strict=True)]
        return min(zip(scores, lengths, strict=True), key=lambda pair: (-pair[0], pair[1]))[1]
    if rule != "one_se":
        raise ValueError(f"select_prefix: rule must be 'best' or 'one_se', got {rule!r}")
    if num_examples is None or num_examples < 1:
        raise ValueError(f"select_prefix: rule 'one_se' needs num_examples >= 1, got {num_examples}")
    best = max(values)
    least = best - math.sqrt(max(0.0, best * (1 - best)) / num_examples)
    return min(k for value, k in zip(values, lengths, strict=True) if value >= least)


def _lengths(ks: Sequence[int] | Tensor | None, num_features: int) -> list[int]:
    lengths = list(range(1, num_features + 1)) if ks is None else [int(k) for k in ks]
    increasing = all(a < b for a, b in pairwise(lengths))
    if not lengths or not increasing or lengths[0] < 1 or lengths[-1] > num_features:
        raise ValueError(f"prefix lengths ks must increase and lie in [1, {num_features}], got {lengths}")
    return lengths


def _blocks(features: Tensor, head: Head, lengths: list[int], block: int) -> Iterator[Tensor]:
    """Logits (prefixes of a block, batch, classes), block after block."""
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if not isinstance(head, nn.Linear) or features.ndim != 2:
        positions = torch.arange(features.shape[1], device=features.device)
        shape = (1, -1, *[1] * (features.ndim - 2))
        for k in lengths:
            yield head(features.masked_fill((positions >= k).reshape(shape), 0))[None]
        return
    if features.shape[1] != head.in_features:
        raise ValueError(f"features must have {head.in_features} columns, as the head takes, got {features.shape[1]}")
    dtype = torch.promote_types(features.dtype, torch.float32)  # a long sum of half-precision numbers drifts
    # Contiguous, so that the sums of one prefix lie side by side.
    columns, weights = features.to(dtype).T.contiguous(), head.weight.to(dtype).T.contiguous()
    running = features.new_zeros(len(features), head.out_features, dtype=dtype)
    if head.bias is not None:
        running = running + head.bias.to(dtype)
    if len(lengths) < features.shape[1]:
        before = 0
        for k in lengths:
            running = torch.addmm(running, columns[before:k].T, weights[before:k])
            before = k
            yield running[None]
        return
    for start in range(0, len(columns), block):
        rows = slice(start, start + block)
        sums = columns[rows, :, None] * weights[rows, None, :]
        sums[0] += running
        sums = _running_sums(sums)
        running = sums[-1]
        yield sums


def _running_sums(terms: Tensor) -> Tensor:
    if torch.is_grad_enabled() or terms.device.type != "cpu":
        return terms.cumsum(0)
    # On the CPU a cumulative sum along the first dimension strides through memory: adding row to row is 7 times faster.
    for before, row in pairwise(terms):
        row += before
    return terms
