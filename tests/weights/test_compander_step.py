"""The compander and the optimizer: learning-rate equivalence, decay of w, the modified adaptive step."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wellposed.weights import (
    CompanderStep,
    apply_compander,
    compand,
    companded,
    compander_parameter_groups,
    compander_penalty,
    fold_compander,
)
from wellposed.weights.compander_functions import COMPANDER_FUNCTIONS

F64 = torch.float64


def network(dtype=F64, bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias)).to(dtype)


def batch(step, dtype=F64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator).to(dtype), torch.randint(0, 3, (16,), generator=generator)


def train(model, optimizer, steps=50, dtype=F64, extra=lambda: 0.0):
    for step in range(steps):
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + extra()).backward()
        optimizer.step()
    return model


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in fold_compander(copy.deepcopy(model)).parameters() if p.ndim > 1])


SGD = partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-11)])
def test_the_linear_compander_is_the_plain_net_with_a_learning_rate_larger_by_the_squared_slope(dtype, tolerance):
    plain = network(dtype)
    train(plain, SGD(plain.parameters(), lr=0.05 * (1.0 / 0.6) ** 2, weight_decay=5e-3), dtype=dtype)
    model = network(dtype)
    apply_compander(model, a=1.0, b=0.6, fn="linear")
    optimizer = SGD(model.parameters(), lr=0.05, weight_decay=5e-3)
    CompanderStep(model, optimizer).register()
    train(model, optimizer, dtype=dtype)
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=tolerance)


def test_with_large_scales_the_compander_trains_like_the_plain_net():
    plain, model = network(), network()
    train(plain, SGD(plain.parameters(), lr=0.05, weight_decay=5e-3))
    apply_compander(model, a=1e3, b=1e3)
    optimizer = SGD(model.parameters(), lr=0.05, weight_decay=5e-3)
    CompanderStep(model, optimizer).register()
    torch.testing.assert_close(weights(train(model, optimizer)), weights(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fn", COMPANDER_FUNCTIONS)
def test_the_gradient_of_the_penalty_is_the_decayed_weight_times_the_slope(fn):
    model = network(bias=True)
    apply_compander(model, a=0.8, b=0.5, fn=fn)
    compander_penalty(model, 0.3).backward()
    for one in companded(model):
        expected = 0.3 * one.w * one.compander.slope(one.v)
        torch.testing.assert_close(one.v.grad, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fn", COMPANDER_FUNCTIONS)
def test_decay_held_by_the_optimizer_is_the_penalty_on_the_weight(fn):
    penalised = network(bias=True)
    apply_compander(penalised, a=0.8, b=0.5, fn=fn)
    groups = compander_parameter_groups(penalised, 0.02, penalty=True)
    assert {n: g["weight_decay"] for g in groups for n in g["names"]}["0.parametrizations.weight.original"] == 0
    optimizer = SGD(groups, lr=0.05)
    train(penalised, optimizer, extra=lambda: compander_penalty(penalised, 0.02, optimizer))

    held = network(bias=True)
    apply_compander(held, a=0.8, b=0.5, fn=fn)
    optimizer = SGD(compander_parameter_groups(held, 0.02), lr=0.05)
    CompanderStep(held, optimizer).register()
    train(held, optimizer)
    torch.testing.assert_close(weights(held), weights(penalised), rtol=0, atol=1e-12)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.02]


@pytest.mark.parametrize("make", [SGD, torch.optim.Adam, torch.optim.AdamW, partial(SGD, maximize=True)])
def test_the_other_parameters_of_a_mixed_group_do_not_notice(make):
    """Biases in one group with companded weights decay as without the compander."""

    def biases(compander):
        model = network(bias=True)
        names = apply_compander(model, fn="linear", a=1.0, b=1.0)
        fold_compander(model) if not compander else None
        optimizer = make(model.parameters(), lr=0.03, weight_decay=0.05)
        if compander:
            CompanderStep(model, optimizer, modified=False).register()
        train(model, optimizer, steps=20)
        assert names and optimizer.param_groups[0]["weight_decay"] == 0.05
        return torch.cat([p.detach() for n, p in model.named_parameters() if n.endswith("bias")])

    torch.testing.assert_close(biases(True), biases(False), rtol=0, atol=1e-12)


def test_without_data_the_weight_decays_monotonically_and_keeps_its_sign():
    model = network()
    apply_compander(model, a=0.5, b=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    CompanderStep(model, optimizer).register()
    before = weights(model)
    for _ in range(30):
        for one in companded(model):
            one.v.grad = torch.zeros_like(one.v)
        optimizer.step()
        after = weights(model)
        assert (after.abs() < before.abs()).all() and (after.sign() == before.sign()).all()
        before = after


@pytest.mark.parametrize("modified", [True, False])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.6), (0.7, 0.9)])
def test_the_modified_step_of_adam_moves_the_weight_by_the_squared_slope(modified, a, b):
    def moved(model):
        before = weights(model)
        train(model, optimizer, steps=1)
        return weights(model) - before

    plain = network()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, eps=0)
    expected = moved(plain)
    model = network()
    apply_compander(model, a=a, b=b, fn="linear")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0)
    CompanderStep(model, optimizer, modified=modified).register()
    torch.testing.assert_close(moved(model), expected * (a / b) ** (2 if modified else 1), rtol=0, atol=1e-12)


def test_the_modified_step_is_the_slope_times_what_adam_would_do_with_the_gradient_of_the_weight():
    model = network()
    apply_compander(model, a=0.3, b=0.4)
    vs = [one.v for one in companded(model)]
    twins = [v.detach().clone().requires_grad_() for v in vs]
    reference = torch.optim.Adam(twins, lr=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    CompanderStep(model, optimizer).register()
    for step in range(5):
        x, y = batch(step)
        layers = [one.w for one in companded(model)]
        loss = F.cross_entropy(F.linear(F.linear(x, layers[0]).tanh(), layers[1]), y)
        slopes = [0.3 / 0.4 * torch.cos(w.detach() / 0.3).square() for w in layers]
        for twin, v, gradient in zip(twins, vs, torch.autograd.grad(loss, layers), strict=True):
            twin.data.copy_(v)
            twin.grad = gradient
        reference.step()
        expected = [v + slope * (twin - v) for v, twin, slope in zip(vs, twins, slopes, strict=True)]
        train(model, optimizer, steps=0)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for v, wanted in zip(vs, expected, strict=True):
            torch.testing.assert_close(v.detach(), wanted.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("modified", [True, False])
def test_decoupled_decay_shrinks_the_weight_and_stays_out_of_the_move(modified):
    def one_step(decay):
        model = network()
        apply_compander(model, a=0.4, b=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
        CompanderStep(model, optimizer, modified).register()
        before = [one.v.detach().clone() for one in companded(model)]
        train(model, optimizer, steps=1)
        return before, [one.v.detach() for one in companded(model)]

    (start, free), (_, decayed) = one_step(0.0), one_step(0.3)
    for v, without, with_decay in zip(start, free, decayed, strict=True):
        shrunk = 0.5 * torch.tan((1 - 0.01 * 0.3) * torch.atan(v / 0.5))
        torch.testing.assert_close(with_decay, shrunk + (without - v), rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fn", [fn for fn in COMPANDER_FUNCTIONS if fn != "linear"])
def test_a_saturated_entry_stays_finite_and_unmoved(make, fn):
    model = network(torch.float32)
    apply_compander(model, fn=fn)
    v = companded(model)[0].v
    with torch.no_grad():
        v[0, 0], v[1, 1] = 1e20, -1e20
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.0)
    CompanderStep(model, optimizer).register()
    train(model, optimizer, steps=3, dtype=torch.float32)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.equal(v.detach()[[0, 1], [0, 1]], torch.tensor([1e20, -1e20]))
    assert not torch.equal(v.detach()[2:], companded(network_like(fn))[0].v.detach()[2:])


def network_like(fn):
    model = network(torch.float32)
    apply_compander(model, fn=fn)
    return model


def test_decay_brings_a_saturated_entry_back_without_flipping_its_sign():
    model = network(torch.float32)
    apply_compander(model, a=0.7, b=0.7)
    v = companded(model)[0].v
    with torch.no_grad():
        v[0, 0] = -1e20
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-9)
    CompanderStep(model, optimizer).register()
    train(model, optimizer, steps=1, dtype=torch.float32)
    assert float(compand(v.detach(), 0.7, 0.7)[0, 0]) == pytest.approx(-0.7 * math.pi / 2, rel=2e-6)


@pytest.mark.parametrize("make", [SGD, torch.optim.Adam, torch.optim.AdamW])
def test_learned_scales_do_not_decay_and_v_does(make):
    model = network()
    apply_compander(model, a=0.5, b=1.0, learnable="layer")
    before = [(one.v.detach().clone(), float(one.compander.a.detach())) for one in companded(model)]
    # One group holds v and scales alike.
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.2)
    CompanderStep(model, optimizer, modified=False).register()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for one, (v, a) in zip(companded(model), before, strict=True):
        assert float(one.compander.a.detach()) == a and float(one.compander.b.detach()) == 1.0
        if make is torch.optim.Adam:
            # Adam normalises the decay: every entry moves by the learning rate.
            torch.testing.assert_close(one.v.detach(), v - 1e-3 * v.sign(), rtol=0, atol=1e-8)
        else:
            torch.testing.assert_close(one.v.detach(), v * (1 - 1e-3 * 0.2), rtol=1e-12, atol=0)
    groups = compander_parameter_groups(model, 0.2, penalty=True)
    found = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert found["0.parametrizations.weight.original"] == 0.2 and found["0.parametrizations.weight.0.a"] == 0


def test_learned_scales_decay_v_under_the_modified_step_too():
    def after(decay, make):
        model = network()
        apply_compander(model, a=0.5, b=1.0, learnable="layer", log_space=True)
        optimizer = make(model.parameters(), lr=0.01, weight_decay=decay)
        CompanderStep(model, optimizer, modified=True).register()
        start = companded(model)[0].v.detach().clone()
        train(model, optimizer, steps=1)
        return start, companded(model)[0].v.detach()

    start, free = after(0.0, torch.optim.AdamW)
    _, decayed = after(0.3, torch.optim.AdamW)
    torch.testing.assert_close(decayed, free - 0.01 * 0.3 * start, rtol=0, atol=1e-13)
    # Coupled decay enters the gradient of v before it is divided by the slope.
    model = network()
    apply_compander(model, a=0.5, b=1.0, learnable="layer")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.3)
    CompanderStep(model, optimizer, modified=True).register()
    one = companded(model)[0]
    x, y = batch(0)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), one.v)
    expected = one.v.detach() - 0.01 * (gradient + 0.3 * one.v.detach())
    train(model, optimizer, steps=1)
    torch.testing.assert_close(one.v.detach(), expected, rtol=0, atol=1e-13)


def test_double_decay_is_refused():
    model = network()
    apply_compander(model)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    with pytest.raises(ValueError, match=r"'0.weight' decays twice, by the penalty on w and by weight_decay = 0.001"):
        compander_penalty(model, 1e-3, optimizer)
    stepper = CompanderStep(model, optimizer, penalty=True)
    model(batch(0)[0]).sum().backward()
    with pytest.raises(ValueError, match="decays twice"):
        stepper.before()


def test_a_step_that_was_interrupted_gives_the_groups_back():
    model = network()
    apply_compander(model)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    stepper = CompanderStep(model, optimizer)
    for _ in range(2):
        model(batch(0)[0]).sum().backward()
        stepper.before()
        assert optimizer.param_groups[0]["weight_decay"] == 0.0
    stepper.after()
    assert optimizer.param_groups[0]["weight_decay"] == 1e-3


def test_hooks_can_be_removed_and_clipping_by_hand_sees_the_gradient_of_the_weight():
    model = network()
    apply_compander(model, a=0.5, b=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    stepper = CompanderStep(model, optimizer).register()
    stepper.remove()
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    raw = [one.v.grad.clone() for one in companded(model)]
    start = [one.v.detach().clone() for one in companded(model)]
    stepper.before()
    for one, gradient in zip(companded(model), raw, strict=True):
        torch.testing.assert_close(one.v.grad * one.compander.slope(one.v.detach()), gradient)
    optimizer.step()
    moved = [one.v.detach() - v for one, v in zip(companded(model), start, strict=True)]
    stepper.after()
    for one, v, move in zip(companded(model), start, moved, strict=True):
        torch.testing.assert_close(one.v.detach() - v, move * one.compander.slope(v))


def test_what_cannot_be_stepped_around_is_refused():
    model = network()
    with pytest.raises(
        ValueError, match="CompanderStep: the model has no companded weight; call apply_compander first"
    ):
        CompanderStep(model, SGD(model.parameters(), lr=0.1))
    apply_compander(model)
    with pytest.raises(TypeError, match="LBFGS evaluates gradients inside of its step"):
        CompanderStep(model, torch.optim.LBFGS(model.parameters()), modified=True)
    assert not CompanderStep(model, torch.optim.LBFGS(model.parameters())).modified
    assert not CompanderStep(model, SGD(model.parameters(), lr=0.1)).modified
    assert CompanderStep(model, torch.optim.RMSprop(model.parameters(), lr=0.1)).modified
    stacked = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    apply_compander(stacked, stack=True)
    with pytest.raises(ValueError, match="'0.weight' is companded on top of another parametrization"):
        CompanderStep(stacked, torch.optim.Adam(stacked.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_take_finite_modified_steps(dtype):
    model = network(dtype)
    apply_compander(model, a=0.7, b=0.7)
    v = companded(model)[0].v
    with torch.no_grad():
        v[0, 0] = 6e4
    before = v.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-4)
    CompanderStep(model, optimizer).register()
    train(model, optimizer, steps=3, dtype=dtype)
    assert torch.isfinite(v).all() and v.dtype == dtype and not torch.equal(v, before)
    assert (compand(v.detach(), 0.7, 0.7).abs() <= 0.7 * math.pi / 2 * 1.01).all()
