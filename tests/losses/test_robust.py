"""Generalized and symmetric cross-entropy against their gradients and limits."""

import pytest
import torch
import torch.nn.functional as F

from wellposed.losses import (
    GeneralizedCrossEntropy,
    SymmetricCrossEntropy,
    generalized_cross_entropy,
    symmetric_cross_entropy,
)

torch.manual_seed(0)
LOGITS, LABELS = 2 * torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 6, (30,))


def residual(logits):
    p = logits.detach().softmax(1)
    return p.gather(1, LABELS[:, None]), p - F.one_hot(LABELS, 6)


def test_gce_is_cross_entropy_as_q_vanishes_and_absolute_error_at_one():
    ce = F.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(generalized_cross_entropy(LOGITS, LABELS, 1e-6), ce, rtol=1e-4, atol=0)
    own, _ = residual(LOGITS)
    torch.testing.assert_close(generalized_cross_entropy(LOGITS, LABELS, 1.0), 1 - own[:, 0], rtol=0, atol=1e-12)


def test_gce_gradient_fades_with_disbelief():
    logits = LOGITS.clone().requires_grad_()
    generalized_cross_entropy(logits, LABELS, 0.7).sum().backward()
    own, gap = residual(LOGITS)
    torch.testing.assert_close(logits.grad, own**0.7 * gap, rtol=0, atol=1e-12)


def test_sce_gradient_and_symmetry():
    logits = LOGITS.clone().requires_grad_()
    symmetric_cross_entropy(logits, LABELS, 0.3, 2.0).sum().backward()
    own, gap = residual(LOGITS)
    torch.testing.assert_close(logits.grad, (0.3 + 2.0 * 4.0 * own) * gap, rtol=0, atol=1e-12)
    every = sum(symmetric_cross_entropy(LOGITS, torch.full((30,), c), 0.0, 1.0) for c in range(6))
    torch.testing.assert_close(every, torch.full((30,), 20.0, dtype=torch.float64))


def test_both_are_finite_at_saturated_logits():
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    (
        generalized_cross_entropy(logits, torch.tensor([0, 0])) + symmetric_cross_entropy(logits, torch.tensor([0, 0]))
    ).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_soft_targets_and_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="GeneralizedCrossEntropy: targets must be integer classes"):
        GeneralizedCrossEntropy()(LOGITS, LOGITS.softmax(1))
    with pytest.raises(ValueError, match="SymmetricCrossEntropy: targets must be integer classes"):
        SymmetricCrossEntropy()(LOGITS, LOGITS.softmax(1))
    with pytest.raises(ValueError, match=r"GeneralizedCrossEntropy: q must be in \[0, 1\], got 2"):
        GeneralizedCrossEntropy(2)
    with pytest.raises(ValueError, match=r"q must lie in \(0, 1\], got 0"):
        GeneralizedCrossEntropy(0)
    with pytest.raises(ValueError, match="log_zero must be < 0, got 1"):
        SymmetricCrossEntropy(log_zero=1)
