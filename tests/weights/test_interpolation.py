"""Between old and new weights: half-reset, WiSE-FT and L2-SP, and the metrics of learning in stages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from wellposed import Compose, Hyperparameter, fit
from wellposed.continual_metrics import backward_transfer, overall_performance
from wellposed.hyperparameter import substituted
from wellposed.step import Step
from wellposed.weights.interpolation import WeightInterpolation, half_reset, interpolate_weights
from wellposed.weights.l2_sp import L2StartingPoint, squared_distance


def states(seed=0):
    torch.manual_seed(seed)
    base, tuned = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned[1].num_batches_tracked += 5
    tuned[1].running_mean += 1.0
    return base.state_dict(), tuned.state_dict()


def data():
    return TensorDataset(torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2)


# ── half-reset ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_half_reset_takes_the_frozen_half_from_the_base_and_is_idempotent():
    base, tuned = states()
    scalars = torch.rand(4, 3) < 0.5
    mask = {"0.weight": scalars, "0.bias": False, "1.weight": True}
    found = half_reset(tuned, base, mask)
    assert torch.equal(found["0.bias"], base["0.bias"]) and torch.equal(found["1.weight"], tuned["1.weight"])
    assert torch.equal(found["0.weight"][scalars], tuned["0.weight"][scalars])
    assert torch.equal(found["0.weight"][~scalars], base["0.weight"][~scalars])
    assert torch.equal(found["1.bias"], tuned["1.bias"])  # not named: stays tuned
    again = half_reset(found, base, mask)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_states_that_differ_are_refused():
    base, tuned = states()
    for function in (lambda b, t: half_reset(t, b, {}), lambda b, t: interpolate_weights(b, t, 0.5)):
        with pytest.raises(ValueError, match="'0.bias' is in base alone"):
            function(base, {k: v for k, v in tuned.items() if k != "0.bias"})
        with pytest.raises(ValueError, match=r"'0.bias' has shape \(4,\) in base and \(2,\) in tuned"):
            function(base, {**tuned, "0.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match="mask names 'x'"):
        half_reset(tuned, base, {"x": False})
    with pytest.raises(ValueError, match=r"mask of '0.bias' has shape \(1,\)"):
        half_reset(tuned, base, {"0.bias": torch.ones(1, dtype=torch.bool)})


# ── WiSE-FT ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_interpolation_is_the_formula_exact_at_both_ends(alpha):
    base, tuned = states()
    found = interpolate_weights(base, tuned, alpha)
    for name, new in tuned.items():
        if new.is_floating_point():
            expected = base[name].double() + alpha * (new.double() - base[name].double())
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert int(found["1.num_batches_tracked"]) == 5
    for end, state in ((0.0, base), (1.0, tuned)):
        ends = interpolate_weights(base, tuned, end)
        assert all(torch.equal(ends[n], state[n]) for n in tuned if tuned[n].is_floating_point())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_interpolation_keeps_the_dtype(dtype):
    found = interpolate_weights({"w": torch.zeros(2)}, {"w": torch.ones(2, dtype=dtype)}, 0.5)["w"]
    assert found.dtype == dtype and found.tolist() == [0.5, 0.5]


def test_the_method_ends_between_the_start_and_what_plain_training_finds():
    torch.manual_seed(1)
    start = nn.Linear(3, 2)
    trained = {}
    for alpha in (0.0, 0.3, 1.0):
        model = nn.Linear(3, 2)
        model.load_state_dict(start.state_dict())
        trained[alpha] = fit(model, data(), epochs=3, regularizer=WeightInterpolation(alpha)).model.state_dict()
    assert all(torch.equal(trained[0.0][k], v) for k, v in start.state_dict().items())
    expected = interpolate_weights(start.state_dict(), trained[1.0], 0.3)
    assert all(torch.equal(trained[0.3][k], expected[k]) for k in expected)
    assert not torch.equal(trained[1.0]["weight"], start.weight)


def test_alpha_is_checked():
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            WeightInterpolation(alpha)
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            interpolate_weights({}, {}, alpha)
    with pytest.raises(TypeError):
        WeightInterpolation(Hyperparameter(0.5, 0.0, 1.0))


@pytest.mark.parametrize("make", [lambda: WeightInterpolation(0.5), lambda: L2StartingPoint(0.1)])
def test_a_killed_run_goes_on_bit_for_bit(make, tmp_path):
    def train(epochs_until_kill=None):
        torch.manual_seed(2)
        model = nn.Linear(3, 2)

        def kill(step, entry):
            if step.epoch == epochs_until_kill and kill.armed:
                raise KeyboardInterrupt

        kill.armed = epochs_until_kill is not None
        options = {"epochs": 3, "checkpoint": tmp_path / f"{kill.armed}.pt", "on_epoch_end": kill}
        if kill.armed:
            with pytest.raises(KeyboardInterrupt):
                fit(model, data(), regularizer=make(), **options)
            kill.armed = False
            model = nn.Linear(3, 2)
            torch.manual_seed(2)
            model.load_state_dict(nn.Linear(3, 2).state_dict())
        return fit(model, data(), regularizer=make(), **options).model.state_dict()

    whole, resumed = train(), train(2)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


# ── L2-SP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_penalty_is_half_the_strength_times_the_squared_distance():
    torch.manual_seed(3)
    method, model = L2StartingPoint(0.7), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    method.attach(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert float(method.penalty(Step(model)).detach()) == 0.0
    for p in model.parameters():
        p.data.add_(torch.randn_like(p))
    penalty = method.penalty(Step(model))
    by_hand = 0.35 * sum(((p - start[n]) ** 2).sum() for n, p in model.named_parameters())
    torch.testing.assert_close(penalty, by_hand)
    penalty.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 0.7 * (p.detach() - start[n]))


def test_the_distance_can_be_differentiated_twice_also_at_the_start():
    points = [
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.zeros(2, 2, dtype=torch.float64).requires_grad_(),
    ]
    starts = [torch.randn(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *p: squared_distance(list(p), starts), points)
    assert torch.autograd.gradgradcheck(lambda *p: squared_distance(list(p), starts), points)


def test_gradient_descent_ends_where_the_penalised_quadratic_is_least():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    method = L2StartingPoint(3.0)
    method.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * (model.weight - 5.0).square().sum() + method.penalty(Step(model))).backward()
        optimizer.step()
    assert float(model.weight.detach()) == pytest.approx((5.0 + 3.0 * 1.0) / 4.0, abs=1e-9)


def test_a_learned_strength_gets_its_gradient():
    strength = Hyperparameter(0.5, 0.0)
    method, model = L2StartingPoint(strength), nn.Linear(2, 1)
    method.attach(model)
    model.weight.data.add_(1.0)
    raw = strength.raw.clone().requires_grad_()
    with substituted({strength: raw}):
        method.penalty(Step(model)).backward()
    assert float(raw.grad) > 0 and [n for n, _ in method.named_modules() if n] == ["strength"]


def test_names_choose_and_errors_say_what_is_wrong():
    method, model = L2StartingPoint(1.0, names=["0.weight"]), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    method.attach(model)
    model[1].weight.data.add_(1.0)
    assert float(method.penalty(Step(model)).detach()) == 0
    model[0].weight.data.add_(1.0)
    assert float(method.penalty(Step(model)).detach()) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="names holds 'head'"):
        L2StartingPoint(1.0, names=["head"]).attach(model)
    with pytest.raises(ValueError, match="strength must be >= 0"):
        L2StartingPoint(-1.0)
    with pytest.raises(ValueError, match="names must be a list"):
        L2StartingPoint(1.0, names="head")
    with pytest.raises(ValueError, match="no start is known"):
        L2StartingPoint(1.0).penalty(Step(model))


def test_a_large_strength_keeps_the_weights_where_they_were():
    ends = {}
    for strength in (0.0, 100.0):
        torch.manual_seed(4)
        model = nn.Linear(3, 2)
        start = model.weight.detach().clone()
        regularizer = Compose(L2StartingPoint(strength))
        sgd = lambda groups: torch.optim.SGD(groups, lr=0.005)  # noqa: E731
        ends[strength] = (
            fit(model, data(), epochs=20, regularizer=regularizer, optimizer=sgd).model.weight - start
        ).norm()
    assert ends[100.0] < 0.2 * ends[0.0]


# ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_overall_performance_and_backward_transfer():
    nan = float("nan")
    scores = torch.tensor([[0.9, nan, nan], [0.6, 0.8, nan], [0.5, 0.9, 0.7]])
    assert overall_performance(scores) == pytest.approx(0.7)
    assert backward_transfer(scores) == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert backward_transfer(scores, over="all") == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 3)
    for bad, message in (
        (torch.zeros(2, 3), "square"), (torch.zeros(0, 0), "square"), (torch.full((2, 2), nan), "NaN"),
    ):  # fmt: skip
        for metric in (overall_performance, backward_transfer):
            with pytest.raises(ValueError, match=message):
                metric(bad)
    with pytest.raises(ValueError, match="at least two tasks"):
        backward_transfer(torch.ones(1, 1))
    with pytest.raises(ValueError, match="over must be"):
        backward_transfer(scores, over="some")
