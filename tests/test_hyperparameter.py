"""Charts are one-to-one, values stay inside their range, and the training optimizer cannot reach them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed import Hyperparameter
from wellposed.hyperparameter import (
    check_strength,
    differentiable,
    named_hyperparameters,
    pack,
    split,
    substituted,
    unpack_,
    value_of,
)


@given(st.floats(1e-6, 1 - 1e-6))
def test_sigmoid_chart_round_trips(share):
    value = torch.tensor(-2.0 + 5.0 * share, dtype=torch.float64)
    found = Hyperparameter(value, -2.0, 3.0).double()()
    assert abs(float(found) - float(value)) <= 1e-6 * 5


@given(st.floats(-8, 4))
def test_softplus_and_exp_charts_round_trip_over_twelve_decades(decade):
    value = torch.tensor(10.0**decade, dtype=torch.float64)
    for chart in ("softplus", "exp"):
        assert float(Hyperparameter(value, chart=chart)()) == pytest.approx(float(value), rel=1e-6)


def test_values_stay_strictly_inside_after_ten_thousand_random_steps():
    h = Hyperparameter(0.5, 0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10_000):
        h.raw += 2.0 * torch.randn((), generator=generator)
    h.raw += 1e4
    assert 0 < float(h()) < 1


@pytest.mark.parametrize("init", [0.0, 1.0, -0.1])
def test_a_value_on_or_outside_of_the_boundary_is_refused(init):
    with pytest.raises(ValueError, match=r"init must lie strictly inside \(0.0, 1.0\)"):
        Hyperparameter(init, 0.0, 1.0)


def test_a_chart_must_fit_the_range():
    with pytest.raises(ValueError, match="chart 'exp' does not fit"):
        Hyperparameter(0.5, 0.0, 1.0, chart="exp")
    with pytest.raises(ValueError, match="low must be < high"):
        Hyperparameter(0.5, 1.0, 0.0)


def test_the_training_optimizer_cannot_move_a_strength():
    module = nn.ModuleDict({"layer": nn.Linear(1, 1), "strength": Hyperparameter(3.0)})
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module["strength"].raw.clone()
    (module["layer"](torch.ones(1, 1)).square().sum() + 100 * module["strength"]()).backward()
    optimizer.step()
    assert torch.equal(before, module["strength"].raw)
    assert not module["strength"]().requires_grad


def test_substitution_nests_and_survives_exceptions():
    a, b = Hyperparameter(1.0), Hyperparameter(1.0)
    with substituted({a: a.from_raw(a.raw) * 0 + 5}):
        outer = float(a())
        with substituted({b: torch.tensor(-3.0)}):
            assert float(a()) == outer
            assert float(b()) == pytest.approx(math.log1p(math.exp(-3)))
        with pytest.raises(RuntimeError), substituted({a: torch.tensor(0.0)}):
            raise RuntimeError
        assert float(a()) == outer
    assert float(a()) == pytest.approx(1.0)


def test_inside_differentiable_a_gradient_reaches_the_leaf():
    h = Hyperparameter(2.0)
    with differentiable([h]) as leaves:
        h().square().backward()
    expected = 2 * 2.0 * torch.sigmoid(h.raw)
    torch.testing.assert_close(leaves[0].grad, expected)


def test_a_discrete_value_is_floored_and_its_continuous_one_is_kept():
    h = Hyperparameter(3.7, 0.0, 10.0, discrete=True)
    assert float(h()) == 3.0
    assert float(h.from_raw(h.raw)) == pytest.approx(3.7)


def test_state_round_trips_through_pack_and_state_dict():
    module = nn.ModuleDict(
        {"a": Hyperparameter(1.0), "b": Hyperparameter(0.3, 0.0, 1.0, shape=(2,)), "c": Hyperparameter(1.0, tune=False)}
    )
    hypers = named_hyperparameters(module)
    assert list(hypers) == ["a", "b"]
    vector, slices = pack(hypers)
    assert slices == {"a": slice(0, 1), "b": slice(1, 3)}
    unpack_(vector + 1, hypers)
    torch.testing.assert_close(pack(hypers)[0], vector + 1)
    twin = nn.ModuleDict(
        {"a": Hyperparameter(9.0), "b": Hyperparameter(0.3, 0.0, 1.0, shape=(2,)), "c": Hyperparameter(1.0)}
    )
    twin.load_state_dict(module.state_dict())
    assert float(twin["a"]()) == float(module["a"]())
    with pytest.raises(ValueError, match="vector must hold 3 values, got 2"):
        split(vector[:2], hypers)


def test_set_writes_a_constrained_value():
    h = Hyperparameter(0.5, 0.0, 1.0)
    h.set_(0.9)
    assert float(h()) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="value must lie strictly inside"):
        h.set_(1.0)


def test_strengths_are_checked_with_owner_name_and_range():
    check_strength("A", "b", 0.0)
    check_strength("A", "b", Hyperparameter(0.5, 0.0, 1.0), high=1.0)
    with pytest.raises(ValueError, match=r"A: b must be in \[0, 1\], got 2"):
        check_strength("A", "b", 2.0, high=1.0)
    with pytest.raises(ValueError, match="got a Hyperparameter with range"):
        check_strength("A", "b", Hyperparameter(0.5), high=1.0)
    with pytest.raises(TypeError, match="A: b must be a number or a Hyperparameter, got str"):
        check_strength("A", "b", "much")
    assert value_of(0.5) == 0.5
