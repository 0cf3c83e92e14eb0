"""Per-example gradients against one backward pass an example."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wellposed.numerics import per_example_gradients


def one_by_one(model, loss_fn, inputs, targets, names):
    """The definition: a batch of one, and its backward pass."""
    rows = []
    for i in range(len(targets)):
        gradients = torch.autograd.grad(
            loss_fn(model(inputs[i : i + 1]), targets[i : i + 1]), [dict(model.named_parameters())[n] for n in names]
        )
        rows.append(gradients)
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}


def convolutional():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    model = nn.Sequential(*layers).double().eval()
    return model, torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (5,))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("params", [None, ["5.weight"], ["0.bias", "1.weight"]])
def test_equals_one_backward_an_example(params, chunk_size):
    model, x, y = convolutional()
    before = copy.deepcopy(model.state_dict())
    gradients = per_example_gradients(model, F.cross_entropy, x, y, params, chunk_size=chunk_size)
    names = params or [name for name, _ in model.named_parameters()]
    expected = one_by_one(model, F.cross_entropy, x, y, names)
    assert gradients.keys() == expected.keys()
    for name in names:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-12, rtol=1e-10)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@given(batch=st.integers(1, 6), width=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=20)
def test_their_mean_is_the_gradient_of_the_mean_loss(batch, width, dtype):
    torch.manual_seed(0)
    model = nn.Linear(width, 2).to(dtype)
    x, y = torch.randn(batch, width, dtype=dtype), torch.randint(0, 2, (batch,))
    gradients = per_example_gradients(model, F.cross_entropy, x, y)
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert gradients[name].shape == (batch, *parameter.shape)
        torch.testing.assert_close(gradients[name].mean(0), parameter.grad)


def test_only_what_requires_gradients_by_default():
    model, x, y = convolutional()
    model[0].requires_grad_(False)
    names = per_example_gradients(model, F.cross_entropy, x, y).keys()
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = per_example_gradients(model, F.cross_entropy, x, y, ["0.weight"])  # asked for: given
    assert bool(frozen["0.weight"].any())


def test_tuples_dicts_and_unreduced_losses():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, left, right):
            return self.scale * left * right

    left, right = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 2.0])
    targets = {"value": torch.zeros(3)}

    def unreduced(outputs, y):
        return (outputs - y["value"]) ** 2

    for inputs in ((left, right), {"right": right, "left": left}):
        gradients = per_example_gradients(Product(), unreduced, inputs, targets)
        torch.testing.assert_close(gradients["scale"], 2 * 2.0 * (left * right) ** 2)


def test_dropout_must_be_asked_for():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    x, y = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="randomness"):
        per_example_gradients(model, F.cross_entropy, x, y)
    same, different = (
        per_example_gradients(model, F.cross_entropy, x, y, ["2.weight"], randomness=r)["2.weight"]
        for r in ("same", "different")
    )
    assert torch.allclose(same[0], same[1]) and not torch.allclose(different[0], different[1])


def test_batch_statistics_and_unknown_names_are_refused():
    model, x, y = convolutional()
    with pytest.raises(ValueError, match="params names '7.weight', which the model does not have"):
        per_example_gradients(model, F.cross_entropy, x, y, ["7.weight"])
    with pytest.raises(ValueError, match=r"3 uses the statistics of the batch.*model.eval\(\) or use GroupNorm"):
        per_example_gradients(model.train(), F.cross_entropy, x, y)
    with pytest.raises(ValueError, match="BatchNorm1d uses the statistics of the batch"):
        per_example_gradients(nn.BatchNorm1d(2, track_running_stats=False).eval(), F.mse_loss, x, y)
