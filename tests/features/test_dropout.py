"""Dropout with a fixed rate is torch's; with a tuned one each example may have its own, and no gradient reaches it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wellposed import Hyperparameter
from wellposed.features import Dropout
from wellposed.hyperparameter import substituted
from wellposed.numerics import dropout_rows


def rate(value=0.4, **options):
    return Hyperparameter(value, 0.0, 0.9, per_example=True, **options)


def network(dropout=None):
    torch.manual_seed(0)
    middle = [] if dropout is None else [dropout]
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), *middle, nn.Linear(40, 30))


# The function


@pytest.mark.parametrize("channels", [False, True])
def test_each_example_is_dropped_at_its_own_rate_and_means_are_kept(channels):
    rates = torch.tensor([0.0, 0.2, 0.7])
    torch.manual_seed(0)
    x = torch.ones(3, 20_000, 2, 2) if channels else torch.ones(3, 50_000)
    y = dropout_rows(x, rates, channels)
    kept = (y != 0).flatten(1).float().mean(1)
    torch.testing.assert_close(kept, 1 - rates, rtol=0, atol=0.01)
    torch.testing.assert_close(y.flatten(1).mean(1), torch.ones(3), rtol=0, atol=0.03)
    for row, p in zip(y, rates, strict=True):
        assert {round(v, 4) for v in row.unique().tolist()} <= {0.0, round(1 / (1 - float(p)), 4)}
    if channels:
        assert torch.equal(y.amax((2, 3)), y.amin((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept_and_a_mask_in_half_precision_is_not_coarser(dtype):
    torch.manual_seed(0)
    y = dropout_rows(torch.ones(1, 100_000, dtype=dtype), torch.tensor(0.001))
    assert y.dtype == dtype and 50 < int((y == 0).sum()) < 160


def test_the_rate_is_detached_and_a_wrong_shape_is_refused():
    p, x = torch.tensor([0.3, 0.4], requires_grad=True), torch.ones(2, 5, requires_grad=True)
    dropout_rows(x, p).sum().backward()
    assert p.grad is None and x.grad is not None
    with pytest.raises(ValueError, match=r"rate must be a scalar or \(2,\), got \(3,\)"):
        dropout_rows(x, torch.rand(3))


def test_a_dual_number_is_dropped_in_both_parts_by_one_mask():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(2, 50), torch.full((2, 50), 3.0))
        primal, tangent = torch.autograd.forward_ad.unpack_dual(dropout_rows(x, torch.tensor(0.5)))
    torch.testing.assert_close(tangent, 3 * primal)


# The method


def test_a_fixed_rate_is_torchs_dropout_bit_for_bit():
    x = torch.randn(8, 6)
    for model in (network(), network(nn.Dropout(0.1))):
        attached = Dropout(0.5).attach(copy.deepcopy(model))
        torch.manual_seed(1)
        found = attached(x)
        torch.manual_seed(1)
        hidden = F.dropout(model[:2](x), 0.5, True)
        assert torch.equal(found, model[-1](hidden))


@pytest.mark.parametrize("build", [network, lambda: network(nn.Dropout(0.1))])
def test_a_tuned_rate_is_read_in_every_pass_for_each_example(build):
    h = rate()
    method = Dropout(h)
    model = method.attach(build())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
        model[-1].weight.copy_(torch.eye(30, 40))
        model[-1].bias.zero_()
    x = torch.zeros(4000, 6)
    raw = torch.zeros(4000)
    raw[2000:] = 2.0
    with substituted({h: raw}):
        y = model(x)
        wanted = h()
    dropped = (y == 0).float().mean(1)
    assert float(dropped[:2000].mean()) == pytest.approx(float(wanted[0]), abs=0.01)
    assert float(dropped[2000:].mean()) == pytest.approx(float(wanted[-1]), abs=0.01)
    model.eval()
    assert bool((model(x) == 1).all())


def test_convolutions_lose_whole_channels():
    model = nn.Sequential(nn.Conv2d(1, 50, 1), nn.Conv2d(50, 50, 1, groups=50, bias=False))
    nn.init.ones_(model[1].weight)
    method = Dropout(rate(0.5))
    y = method.attach(model)(torch.ones(2, 1, 3, 3))
    assert torch.equal(y.amax((2, 3)) == 0, y.amin((2, 3)) == 0) and bool((y == 0).any())
    layered = nn.Sequential(nn.Conv2d(1, 50, 1), nn.Dropout2d(0.1))
    y = Dropout(rate(0.5)).attach(layered)(torch.ones(2, 1, 3, 3))
    assert torch.equal((y == 0).all(3).all(2), (y == 0).any(3).any(2))


@pytest.mark.parametrize("p", [0.3, rate()])
def test_finish_gives_the_model_back_as_it_was(p):
    for build in (network, lambda: network(nn.Dropout(0.1))):
        model = build()
        before = [type(m) for m in model.modules()], list(model.state_dict())
        method = Dropout(p)
        method.finish(method.attach(model))
        assert ([type(m) for m in model.modules()], list(model.state_dict())) == before
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert all(m.p == 0.1 and "rate" not in vars(m) for m in model.modules() if isinstance(m, nn.Dropout))


def test_an_attached_model_can_be_copied_and_pickled_and_holds_no_further_state():
    method = Dropout(rate())
    model = method.attach(network(nn.Dropout(0.1)))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(torch.zeros(2, 6)).shape == (2, 30)


def test_a_rate_out_of_range_or_where_it_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got a Hyperparameter with range"):
        Dropout(Hyperparameter(0.5, 0.0, 2.0))
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\), got 1.0"):
        Dropout(1.0)
    with pytest.raises(ValueError, match="p cannot be a Hyperparameter in a model with AlphaDropout"):
        Dropout(rate()).attach(network(nn.AlphaDropout(0.1)))
