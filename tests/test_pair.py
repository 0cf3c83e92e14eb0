"""A second network: fresh parameters, the same structure, also where weights are parametrised."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from wellposed.pair import reinitialized


def test_a_second_network_equals_one_that_was_built_anew_from_the_same_seed():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin = reinitialized(model, torch.Generator().manual_seed(3))
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(seed)
    fresh = copy.deepcopy(model)
    for module in fresh:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_a_parametrised_weight_is_drawn_anew_and_stays_parametrised():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    twin = reinitialized(model, torch.Generator().manual_seed(0))
    assert torch.equal(model[0].weight, before)
    assert not torch.allclose(twin[0].weight, before, atol=1e-2)
    assert not torch.equal(twin[0].bias, model[0].bias)
    torch.testing.assert_close(twin[0].weight @ twin[0].weight.T, torch.eye(4))
    again = reinitialized(model, torch.Generator().manual_seed(0))
    assert torch.equal(again[0].weight, twin[0].weight)


def test_a_module_that_cannot_reset_itself_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"parameter '1.factor' belongs to Scale, which has no reset_parameters\(\)"):
        reinitialized(nn.Sequential(nn.Linear(3, 3), Scale()))
