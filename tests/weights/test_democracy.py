"""Statistics of weights against closed forms and SciPy, and random pruning."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from wellposed.weights import (
    apply_compander,
    effective_number_of_weights,
    pruned_accuracy,
    randomly_pruned,
    weight_statistics,
    weight_tensors,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))


def test_the_effective_number_is_that_of_the_closed_forms():
    assert effective_number_of_weights([torch.tensor([0.2, -0.2]), torch.tensor([[0.2]])]) == pytest.approx(1.0)
    assert effective_number_of_weights([torch.eye(1, 8)]) == pytest.approx(1 / 8)
    assert effective_number_of_weights([torch.eye(1, 8)], relative=False) == pytest.approx(1.0)
    assert effective_number_of_weights([torch.zeros(4)], relative=False) == 1.0
    w = np.linspace(-1, 1, 20001)
    assert effective_number_of_weights([torch.from_numpy(w)]) == pytest.approx(3 / 4, rel=1e-3)
    normal = scipy.stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    assert effective_number_of_weights([torch.from_numpy(normal)]) == pytest.approx(2 / np.pi, rel=1e-3)
    with pytest.raises(ValueError, match="weights holds no number"):
        effective_number_of_weights([])


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30), st.floats(0.125, 8))
def test_the_effective_number_lies_between_one_and_all_and_ignores_scale(values, factor):
    w = torch.tensor(values, dtype=torch.float64)
    found = effective_number_of_weights([w], relative=False)
    assert 1 - 1e-9 <= found <= len(values) + 1e-9
    if w.abs().max() > 1e-6:
        assert effective_number_of_weights([factor * w], relative=False) == pytest.approx(found)


def test_the_statistics_are_those_of_numpy_and_scipy():
    model = network()
    w = np.concatenate([model[0].weight.detach().numpy().ravel(), model[3].weight.detach().numpy().ravel()])
    found = weight_statistics(model, small=0.05)
    assert found == pytest.approx(
        {
            "max": np.abs(w).max(),
            "deviation": w.std(),
            "kurtosis": scipy.stats.kurtosis(w, fisher=False),
            "near_zero": (np.abs(w) < 0.05).mean(),
            "effective": np.abs(w).sum() ** 2 / (w.size * (w**2).sum()),
            "count": w.size,
        },
        rel=1e-5,
    )
    tiny = weight_statistics([torch.from_numpy(w) * 1e-12], small=1.0)
    assert tiny["kurtosis"] == pytest.approx(found["kurtosis"], rel=1e-5) and tiny["near_zero"] == 1.0
    with pytest.raises(ValueError, match="holds no convolutional or linear weight"):
        weight_statistics(nn.BatchNorm1d(3))


def test_companded_networks_are_described_by_their_weights_and_shared_tensors_once():
    model = network()
    before = weight_statistics(model)
    apply_compander(model, a=0.5, b=0.1)
    assert list(weight_tensors(model)) == ["0.weight", "3.weight"]
    assert weight_statistics(model) == pytest.approx(before, rel=1e-5)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(weight_tensors(tied)) == ["0.weight"]
    apply_compander(tied)
    assert list(weight_tensors(tied)) == ["0.weight"]


@pytest.mark.parametrize("prepare", [lambda m: None, apply_compander, lambda m: parametrizations.weight_norm(m[3])])
def test_pruning_zeroes_the_share_of_weights_in_a_plain_copy(prepare):
    model = network().eval()
    prepare(model)
    x = torch.randn(5, 1, 8, 8)
    before, state = model(x), copy.deepcopy(model.state_dict())
    pruned = randomly_pruned(model, 0.3, torch.Generator().manual_seed(0))
    kept = {name: w != 0 for name, w in weight_tensors(pruned).items()}
    share = 1 - torch.cat([k.reshape(-1) for k in kept.values()]).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.03)
    for name, w in weight_tensors(model).items():
        torch.testing.assert_close(weight_tensors(pruned)[name], w * kept[name])
    assert all("parametrizations" not in name for name in pruned.state_dict())
    assert torch.equal(model(x), before) and all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    again = randomly_pruned(model, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(again[3].weight, pruned[3].weight)
    torch.testing.assert_close(randomly_pruned(model, 0.0)(x), before, rtol=0, atol=1e-6)


def test_accuracy_under_pruning_is_the_mean_over_masks():
    model = network().eval()
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    loader = [(x[:25], y[:25]), (x[25:], y[25:])]
    assert pruned_accuracy(model, loader, share=0.0, masks=2) == 1.0
    generator = torch.Generator().manual_seed(3)
    expected = [float((randomly_pruned(model, 0.5, generator)(x).argmax(1) == y).float().mean()) for _ in range(4)]
    found = pruned_accuracy(model, loader, 0.5, masks=4, generator=torch.Generator().manual_seed(3))
    assert found == pytest.approx(sum(expected) / 4) and 0 < found < 1
    model.train()
    count = lambda outputs, targets: float(len(outputs))  # noqa: E731
    assert pruned_accuracy(model, loader, 0.5, masks=1, metric=count) == 40.0
    assert model.training
    for arguments, message in (
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
        ({"masks": 0}, "masks must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pruned_accuracy(model, loader, **arguments)
