"""Theorem 1 on random categoricals, against the formulas written out in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed import cross_entropy
from wellposed.features import feature_decomposition, prefix_distribution, prefix_logits


def kl(p, q):
    return float(np.sum(np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)))


@given(st.integers(2, 10), st.integers(1, 20), st.integers(0, 10**6))
def test_the_expected_loss_is_bias_plus_variance_plus_a_constant(classes, states, seed):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(classes))
    q = generator.dirichlet(np.ones(classes), size=states) + 1e-9
    q /= q.sum(1, keepdims=True)
    w = generator.dirichlet(np.ones(states))
    geometric = np.exp(w @ np.log(q))
    z = geometric.sum()
    geometric /= z
    found = feature_decomposition(torch.tensor(np.log(q))[:, None], torch.tensor(p)[None], torch.tensor(w))
    expected_loss = float(-(w @ np.log(q)) @ p)
    assert abs(float(found.total) - expected_loss) < 1e-10
    assert abs(float(found.bias) - kl(p, geometric)) < 1e-10
    variance = sum(w[i] * kl(geometric, q[i]) for i in range(states))
    assert abs(float(found.variance) - variance) < 1e-10
    assert abs(float(found.variance) + np.log(z)) < 1e-10
    assert abs(float(found.constant) - float(-(p * np.log(p)).sum())) < 1e-10
    assert min(found) >= -1e-12


def test_features_that_are_certain_have_no_variance_and_one_hot_labels_no_constant():
    q = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    found = feature_decomposition(q.log().expand(4, 1, 3), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(found.variance, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(found.constant) == 0
    torch.testing.assert_close(found.bias, -q[:, 1].log())


def test_a_class_that_the_label_excludes_may_have_probability_zero():
    log_q = torch.tensor([[[0.0, -torch.inf]], [[-0.5, -0.9]]])
    found = feature_decomposition(log_q, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(found.total, torch.tensor([0.25]))


def test_the_decomposition_of_nested_dropout_sums_to_its_exact_expected_loss():
    torch.manual_seed(0)
    features, head, labels = torch.randn(7, 9), nn.Linear(9, 4), torch.randint(0, 4, (7,))
    p = prefix_distribution(9, sigma=3.0)
    logits = prefix_logits(features, head)
    found = feature_decomposition(logits.log_softmax(-1), nn.functional.one_hot(labels, 4).float(), p)
    expected = sum(p[k] * cross_entropy(logits[k], labels) for k in range(9))
    torch.testing.assert_close(found.total, expected)


def test_weights_that_are_no_distribution_are_refused():
    with pytest.raises(ValueError, match="weights must be >= 0 and sum to 1, got sum 2"):
        feature_decomposition(torch.zeros(2, 1, 1), torch.ones(1, 1), torch.ones(2))
