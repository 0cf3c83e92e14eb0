"""Keeping predictions diverse: decorrelated logits of a batch, or entropy among each token's most probable continuations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .logit_rows import float_logits

_SMALL = 1024


def logit_covariance(logits: Float[Tensor, "examples classes"], center_rows: bool = False) -> Float[Tensor, ""]:
    """`(1/D) * sum of C_ij^2 over i != j`, with C the covariance matrix of the logits over the batch; in at least float32.

    BA-LoRA's diversity term for understanding tasks (arXiv 2408.04556), the covariance term of VICReg (arXiv 2105.04906,
    eq. 4). It is of fourth degree in the logits, and a statistic of the batch at hand: it changes with the batch size. A
    constant added to a row changes it, although no probability changes; with two classes such constants can remove it
    entirely.

    Args:
        logits: (examples, classes), at least two examples.
        center_rows: subtract each row's mean first, so that only what the probabilities show counts.

    Raises:
        ValueError: for fewer than two examples.

    Example:
        >>> logit_covariance(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        tensor(4.)
    """
    count, classes = logits.shape
    if count < 2:
        raise ValueError(
            f"logit_covariance: logits must hold at least 2 examples, got {count}; a batch of one has none"
        )
    z = float_logits(logits)
    if center_rows:
        z = z - z.mean(1, keepdim=True)
    z = z - z.mean(0)
    if classes <= max(count, _SMALL):
        gram = z.T @ z
        off_diagonal = (gram - torch.diag_embed(gram.diagonal())).square().sum()
    else:
        # ||Z'Z|| = ||ZZ'||: 30,000 classes need no matrix of their square.
        off_diagonal = (z @ z.T).square().sum() - z.square().sum(0).square().sum()
    return off_diagonal / (classes * (count - 1) ** 2)


def topk_entropy(logits: Float[Tensor, "*batch classes"], top_k: int | None = 20) -> Float[Tensor, "*batch"]:
    """NEGATIVE entropy of the softmax over the K largest logits, unreduced: a penalty on narrow predictions.

    BA-LoRA's diversity term for generation (arXiv 2408.04556): over the whole vocabulary entropy would reward noise in the
    tail, so only the K most probable tokens count.

    Args:
        logits: (batch, classes) or (batch, length, classes).
        top_k: K; None for all classes, as in the paper's first version.

    Returns:
        (batch,) or (batch, length), in [-log K, 0].

    Raises:
        ValueError: unless 1 <= K <= classes.

    Example:
        >>> topk_entropy(torch.zeros(1, 5), top_k=2)
        tensor([-0.6931])
    """
    classes = logits.shape[-1]
    if top_k is not None and not 1 <= top_k <= classes:
        raise ValueError(f"topk_entropy: top_k must lie in [1, {classes}], the number of classes, got {top_k}")
    z = float_logits(logits)
    if top_k is not None and top_k < classes:
        z = z.topk(top_k, dim=-1).values
    log_p = z.log_softmax(-1)
    return torch.where(log_p.isinf(), 0.0, log_p.exp() * log_p).sum(-1)
