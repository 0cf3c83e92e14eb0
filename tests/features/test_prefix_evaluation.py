"""All prefixes at once equal one masked forward pass each; their choice; their exact mean loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed import cross_entropy
from wellposed.features import (
    NestedDropout,
    expected_prefix_loss,
    prefix_accuracy,
    prefix_distribution,
    prefix_logits,
    select_prefix,
)


def draw(rows=50, size=37, classes=5, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(size, classes, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    features = torch.randn(rows, size, generator=generator, dtype=dtype).relu()
    return features, torch.randint(0, classes, (rows,), generator=generator), head


def looped(features, head):
    """One pass of the head for each prefix, through the layer itself."""
    layer = NestedDropout(features.shape[1]).eval()
    found = []
    for k in range(1, features.shape[1] + 1):
        layer.eval_k = k
        found.append(head(layer(features)))
    return torch.stack(found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 8, 32, 100])
def test_running_sums_equal_masked_passes_for_every_prefix(bias, block):
    features, labels, head = draw(bias=bias)
    expected = looped(features, head)
    found = prefix_logits(features, head, block=block)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    with torch.no_grad():  # another way of summing
        torch.testing.assert_close(prefix_logits(features, head, block=block), expected, rtol=1e-5, atol=1e-5)
    accuracy = prefix_accuracy(features, labels, head, block=block, batch=7)
    assert torch.equal(accuracy, (expected.argmax(-1) == labels).float().mean(1))


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 9), st.integers(1, 25))
def test_any_size_and_block(rows, size, classes, block):
    features, labels, head = draw(rows, size, classes)
    expected = looped(features, head)
    torch.testing.assert_close(prefix_logits(features, head, block=block), expected, rtol=1e-5, atol=1e-5)
    assert prefix_accuracy(features, labels, head, block=block).shape == (size,)


def test_chosen_prefixes_are_those_of_all():
    features, labels, head = draw()
    ks = [1, 2, 4, 8, 16, 32, 37]
    everything = prefix_logits(features, head)
    torch.testing.assert_close(prefix_logits(features, head, ks), everything[[k - 1 for k in ks]], rtol=1e-5, atol=1e-5)
    all_accuracies = prefix_accuracy(features, labels, head)
    assert torch.equal(prefix_accuracy(features, labels, head, torch.tensor(ks)), all_accuracies[[k - 1 for k in ks]])


def test_a_general_head_is_looped_over_and_feature_maps_are_masked_by_channel():
    torch.manual_seed(0)
    maps = torch.randn(9, 6, 4, 4)
    head = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    assert torch.equal(prefix_logits(maps, head), looped(maps, head))
    features, _, linear = draw()
    wrapped = nn.Sequential(linear)
    torch.testing.assert_close(prefix_logits(features, wrapped), prefix_logits(features, linear), rtol=1e-5, atol=1e-5)


def test_an_ensemble_averages_logits_at_equal_prefixes():
    first, labels, head_a = draw()
    torch.manual_seed(3)
    second, head_b = torch.randn(50, 37), nn.Linear(37, 5)
    found = prefix_accuracy([first, second], labels, [head_a, head_b])
    mean = (looped(first, head_a) + looped(second, head_b)) / 2
    assert torch.equal(found, (mean.argmax(-1) == labels).float().mean(1))


def test_half_precision_is_summed_in_float32():
    features, _, head = draw(size=300)
    found = prefix_logits(features.half(), head.half())
    assert found.dtype == torch.float32
    reference = torch.stack([features.half().double()[:, :k] @ head.weight.double()[:, :k].T for k in range(1, 301)])
    torch.testing.assert_close(found.double(), reference + head.bias.double(), rtol=1e-4, atol=1e-4)


def test_the_expected_loss_is_the_mean_of_sampled_losses():
    features, targets, head = draw(20, 10)
    p = prefix_distribution(10, sigma=5.0)
    exact = expected_prefix_loss(features, targets, head, p).detach()
    layer = NestedDropout(10, 5.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sampled = torch.stack([cross_entropy(head(layer(features)), targets) for _ in range(3000)])
    error = sampled.std(0) / np.sqrt(len(sampled))
    assert ((sampled.mean(0) - exact).abs() < 4 * error + 1e-6).all()


def test_the_gradient_of_the_expected_loss_is_that_of_the_enumerated_one():
    features, targets, head = draw(4, 6, 3, dtype=torch.float64)
    p = prefix_distribution(6, sigma=3.0, dtype=torch.float64)
    features.requires_grad_()

    def loss(h, weight, bias):
        linear = nn.Linear(6, 3).double()
        return torch.func.functional_call(
            _Expected(linear, targets, p), {"head.weight": weight, "head.bias": bias}, (h,)
        )

    inputs = (features, head.weight, head.bias)
    assert torch.autograd.gradcheck(loss, inputs)
    found = torch.autograd.grad(loss(*inputs).sum(), inputs)
    masks = torch.ones(6, 6, dtype=torch.float64).tril()
    enumerated = sum(p[k] * cross_entropy(head(features * masks[k]), targets) for k in range(6))
    for a, b in zip(found, torch.autograd.grad(enumerated.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class _Expected(nn.Module):
    def __init__(self, head, targets, p):
        super().__init__()
        self.head, self.targets, self.p = head, targets, p

    def forward(self, features):
        return expected_prefix_loss(features, self.targets, self.head, self.p)


def test_of_equal_prefixes_the_shorter_is_chosen_and_a_larger_difference_than_all_penalties_wins():
    curve = torch.tensor([0.3, 0.8, 0.5, 0.8])
    assert select_prefix(curve) == 2
    size, penalty = 512, 1e-5
    curve = torch.full((size,), 0.8)
    assert select_prefix(curve) == 1
    curve[-1] += (size - 1) * penalty + 1e-6
    assert select_prefix(curve) == size
    curve[-1] -= 2e-4
    assert select_prefix(curve) == 1
    assert select_prefix(curve, penalty=0.0) == size
    assert select_prefix(torch.tensor([0.5])) == 1


def test_a_single_feature_can_be_the_best_prefix():
    assert select_prefix(torch.tensor([0.9, 0.5, 0.4])) == 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_the_paper_s_rule_equals_numpy_s_argmax(hits):
    accuracy = np.array(hits) / 50
    expected = int(np.argmax(accuracy - 1e-5 * np.arange(len(hits)))) + 1
    assert select_prefix(torch.tensor(accuracy, dtype=torch.float32)) == expected


def test_within_one_standard_error_the_shortest_prefix_is_chosen():
    curve = torch.tensor([0.50, 0.86, 0.88, 0.90, 0.89])
    # The standard error of 0.9 is 0.03 on 100 examples, 0.003 on 10,000.
    assert select_prefix(curve, rule="one_se", num_examples=100) == 3
    assert select_prefix(curve, rule="one_se", num_examples=10_000) == 4
    assert select_prefix(curve[:3], rule="one_se", num_examples=100, ks=[4, 16, 64]) == 16
    assert select_prefix(curve[:3], ks=[4, 16, 64]) == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, y, h: prefix_logits(f, h, [2, 2]), "must increase and lie in"),
        (lambda f, y, h: prefix_logits(f, h, [0, 2]), r"lie in \[1, 37\]"),
        (lambda f, y, h: prefix_logits(f, h, [38]), r"lie in \[1, 37\]"),
        (lambda f, y, h: prefix_logits(f, h, block=0), "block must be >= 1, got 0"),
        (lambda f, y, h: prefix_logits(f, nn.Linear(36, 5)), "features must have 36 columns"),
        (lambda f, y, h: prefix_accuracy(f, y[:3], h), "need one head for each feature tensor, and 3 > 0 rows"),
        (lambda f, y, h: prefix_accuracy([f, f], y, [h]), "need one head for each"),
        (lambda f, y, h: select_prefix(torch.tensor([])), "accuracy must be a vector of finite numbers"),
        (lambda f, y, h: select_prefix(torch.tensor([0.5]), penalty=-1.0), "penalty must be >= 0, got -1"),
        (lambda f, y, h: select_prefix(torch.tensor([0.5]), rule="one_se"), "needs num_examples >= 1, got None"),
        (lambda f, y, h: select_prefix(torch.tensor([0.5]), ks=[1, 2]), "ks must hold 1 lengths, got 2"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw())


def test_of_equal_logits_the_first_class_is_predicted_as_argmax_does():
    # A rectified feature that is zero everywhere makes all logits of a head without bias equal.
    head, labels = nn.Linear(3, 4, bias=False), torch.tensor([0, 1, 3, 0, 2])
    assert prefix_accuracy(torch.zeros(5, 3), labels, head).tolist() == pytest.approx([0.4, 0.4, 0.4])
