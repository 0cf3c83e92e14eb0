"""SurrogateSharpness (IGNITE): the gradient of the norm is right, training without it stays bit for bit, state is kept."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import nn

from wellposed import Compose, Hyperparameter, Pair, Step, TensorLoader, fit, squared_error
from wellposed.gradients import (
    MeanPrediction,
    SharpnessAwareMinimization,
    SurrogateEnsemble,
    SurrogateSharpness,
    ensemble_squared_error,
    surrogate_sharpness,
)
from wellposed.regularizer import RequirementError, check_requirements
from wellposed.step import DivergenceError

F64 = torch.float64


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def network(seed=0, d=4, width=12, activation=nn.Tanh, dtype=F64, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(d, width), activation(), nn.Dropout(dropout), nn.Linear(width, width), activation(), nn.Linear(width, 1)
    ).to(dtype)  # fmt: skip


def inputs(n=16, d=4, seed=1, dtype=F64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_of(model, x):
    """The norm by plain autograd, with a graph."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(x).mean(), parameters, create_graph=True)
    return torch.cat([g.reshape(-1) for g in found]).norm(), parameters


def added(method, model, x, **options):
    """What `add_grad_` adds to gradients that were zero."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    method.add_grad_(model, x, **options)
    return [p.grad for p in model.parameters()]


def penalty(lam=1.0, rho=0.5, **options):
    return SurrogateSharpness(rho, lam=lam, mode="penalty", **options)


class Bilinear(nn.Module):
    """f = v' W x."""

    def __init__(self, d=5, hidden=3, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(hidden, d, generator=g, dtype=F64))
        self.second = nn.Parameter(torch.randn(hidden, generator=g, dtype=F64))

    def forward(self, x):
        return x @ self.first.T @ self.second


def close(found, expected, atol=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ── the gradient of the norm ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_exact_mode_equals_double_backward_of_the_norm(micro_batches):
    model, x = network(), inputs()
    norm, parameters = norm_of(model, x)
    expected = torch.autograd.grad(norm, parameters, materialize_grads=True)
    close(added(penalty(2.0, 0.3), model, x, micro_batches=micro_batches), [0.6 * e for e in expected])


def test_exact_mode_equals_the_forward_derivative_of_the_gradient():
    model, x = network(), inputs()
    values = {n: p.detach() for n, p in model.named_parameters()}
    slope = torch.func.grad(lambda v: torch.func.functional_call(model, v, (x,)).mean())
    first = slope(values)
    norm = torch.cat([g.reshape(-1) for g in first.values()]).norm()
    expected = torch.func.jvp(slope, (values,), ({n: g / norm for n, g in first.items()},))[1]
    close(added(penalty(1.0, 1.0), model, x), list(expected.values()))


def test_the_differentiable_penalty_has_the_gradient_that_add_grad_adds():
    model, x = network(), inputs()
    found = torch.autograd.grad(penalty().penalty_of(model, x), list(model.parameters()), materialize_grads=True)
    close(added(penalty(), model, x), found)
    constrained = SurrogateSharpness(0.5, lam=1.0, total_steps=10)
    torch.testing.assert_close(constrained.penalty_of(model, x), penalty().penalty_of(model, x))
    torch.testing.assert_close(constrained.last_norm.double()[0], norm_of(model, x)[0].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("r", [1e-3, 0.2, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_for_a_bilinear_model_the_finite_difference_is_exact_at_any_distance(r, seed):
    model, x = Bilinear(seed=seed), inputs(d=5, seed=seed)
    mean = x.mean(0)
    first, second = model.first.detach(), model.second.detach()
    norm = ((first @ mean).square().sum() + second.square().sum() * mean.square().sum()).sqrt()
    expected = [torch.outer(first @ mean, mean) / norm, second * mean.square().sum() / norm]
    close(added(penalty(1.0, 1.0, hvp="finite_difference", r=r), model, x), expected)
    close(added(penalty(1.0, 1.0), model, x), expected)


def test_the_finite_difference_converges_at_first_order():
    model, x = network(), inputs()
    truth = added(penalty(), model, x)
    errors = []
    for r in (8e-3, 4e-3, 2e-3):
        found = added(penalty(hvp="finite_difference", r=r), model, x)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, truth, strict=True)))
    assert errors[0] > 1e-9
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_a_model_that_is_linear_in_its_weights_feels_nothing(hvp):
    model, x = nn.Linear(6, 1).double(), inputs(d=6)
    norm = float(surrogate_sharpness(model, x, rho=1.0))
    for g in added(penalty(3.0, hvp=hvp), model, x):
        assert float(g.abs().max()) <= 1e-7 * norm


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_scaling_lam_up_and_rho_down_changes_nothing(hvp):
    model, x = network(), inputs()
    one = added(penalty(1.0, 0.5, hvp=hvp), model, x)
    close(added(penalty(5.0, 0.1, hvp=hvp), model, x), one, atol=1e-6)
    wider = added(penalty(1.0, 0.5, hvp=hvp, r=0.5), model, x)
    assert all(torch.equal(a, b) for a, b in zip(one, wider, strict=True)) == (hvp == "exact")


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_every_example_twice_changes_nothing(hvp):
    model, x = network(), inputs()
    method = penalty(hvp=hvp)
    one = added(method, model, x)
    norm = method.last_norm.clone()
    close(added(method, model, torch.cat([x, x])), one)
    torch.testing.assert_close(method.last_norm, norm)


@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@given(n=st.integers(1, 9), parts=st.integers(1, 12), d=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_cutting_the_batch_changes_nothing(hvp, n, parts, d):
    model, x = network(d=d), inputs(n, d)
    close(added(penalty(hvp=hvp), model, x, micro_batches=parts), added(penalty(hvp=hvp), model, x), atol=1e-10)


def test_of_a_gaussian_head_only_the_mean_counts():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.log_std = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, x):
            hidden = self.body(x).tanh()
            return self.mean(hidden), self.log_std(hidden)

    torch.manual_seed(0)
    model = Head().double()
    added(penalty(), model, inputs())
    assert float(model.body.weight.grad.abs().max()) > 0
    assert float(model.log_std.weight.grad.abs().max()) == 0 == float(model.log_std.bias.grad.abs().max())


def test_an_output_function_and_a_choice_of_parameters_are_heeded():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), inputs()
    method = penalty(output_fn=lambda out: out[:, 2], params=lambda name: not name.endswith("2.bias"))
    found = added(method, model, x)
    chosen = [p for n, p in model.named_parameters() if n != "2.bias"]
    gradients = torch.autograd.grad(model(x)[:, 2].mean(), chosen, create_graph=True)
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    close(found[:3], [0.5 * g for g in torch.autograd.grad(norm, chosen)])
    assert float(found[3].abs().max()) == 0
    torch.testing.assert_close(method.last_norm[0].double(), norm.detach(), rtol=1e-6, atol=0)
    named = added(penalty(output_fn=lambda out: out[:, 2], params=["0.weight", "0.bias", "2.weight"]), model, x)
    close(named, found)


# ── no trace ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_weights_buffers_and_random_state_are_left_alone(hvp):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method = penalty(hvp=hvp)
    first = [g.clone() for g in added(method, model, inputs(dtype=torch.float32))]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert max(float(g.abs().max()) for g in first) > 0
    again = added(method, model, inputs(dtype=torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # both passes and both calls: one mask


def test_the_probe_sees_the_mask_of_the_first_pass():
    """With another mask in each pass, the difference over r would be of the order of 1/r."""
    model, x = network(dropout=0.5), inputs()
    truth = added(penalty(), model, x)
    found = added(penalty(hvp="finite_difference", r=1e-5), model, x)
    close(found, truth, atol=1e-4)


def test_weights_are_left_alone_when_the_probe_raises():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("the probe fell over")
            return self.inner(x)

    model = Fragile()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="fell over"):
        penalty(hvp="finite_difference").add_grad_(model, inputs())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def trained(method, hvp_model=None, **options):
    model = hvp_model or network(dtype=torch.float32, dropout=0.3)
    x = inputs(48, dtype=torch.float32)
    loader = TensorLoader(x, x.sin().sum(1), batch_size=16, shuffle=True, seed=3)
    return fit(model, loader, epochs=3, criterion=squared_error, regularizer=method, seed=5, **options)


def test_without_a_multiplier_training_is_bit_for_bit_plain():
    plain = trained(None).model.state_dict()
    off = SurrogateSharpness(lam=0.0, eps=100.0, lam_lr=1.0)  # constraint far away: the multiplier stays at 0
    with pytest.warns(UserWarning, match="inactive in the whole of epoch"):
        found = trained(off).model.state_dict()
    assert float(off.multiplier) == 0 and off.state.batches == 9
    assert all(torch.equal(v, plain[k]) for k, v in found.items())
    found = trained(penalty(0.0)).model.state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in found.items())
    found = trained(penalty(1.0)).model.state_dict()
    assert not all(torch.equal(v, plain[k]) for k, v in found.items())


def test_a_multiplier_that_falls_to_zero_leaves_plain_training_behind():
    method = SurrogateSharpness(lam=1e-3, eps=100.0, lam_lr=1.0)
    model = network(dtype=torch.float32)
    model(inputs(dtype=torch.float32)).square().mean().backward()
    method.add_grad_(model, inputs(dtype=torch.float32))
    method.dual_step()
    assert float(method.multiplier) == 0
    before = [p.grad.clone() for p in model.parameters()]
    method.add_grad_(model, inputs(dtype=torch.float32))
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


# ── the measure ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_first_order_is_right_on_a_small_ball_and_no_direction_beats_it():
    model, x = network(width=8), inputs()
    start = [p.detach().clone() for p in model.parameters()]
    size = torch.cat([p.reshape(-1) for p in start]).norm()
    rho = float(1e-3 * size)
    first_order = float(surrogate_sharpness(model, x, rho))
    mean = MeanPrediction(model, [(x, 1.0)])
    gradient = mean.gradient()
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()

    def change(move):
        with torch.no_grad():
            base = model(x).mean()
            for p, m in zip(model.parameters(), move, strict=True):
                p.add_(m)
            moved = model(x).mean()
            for p, s in zip(model.parameters(), start, strict=True):
                p.copy_(s)
        return float(moved - base)

    assert change([rho * g / norm for g in gradient]) == pytest.approx(first_order, rel=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        move = [torch.randn(p.shape, generator=generator, dtype=F64) for p in start]
        length = torch.cat([m.reshape(-1) for m in move]).norm()
        assert change([rho * m / length for m in move]) <= 1.05 * first_order
    assert float(surrogate_sharpness(model, x, rho, exact=True)) == pytest.approx(first_order, rel=0.05)


def test_the_searched_maximum_is_reached_and_at_least_the_first_step_to_the_edge():
    model, x, rho = network(), inputs(), 0.5
    found = float(surrogate_sharpness(model, x, rho, exact=True))
    mean = MeanPrediction(model, [(x, 1.0)])
    gradient = mean.gradient()
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()
    moved = {n: p.detach() + rho * g / norm for n, p, g in zip(mean.names, mean.parameters, gradient, strict=True)}
    edge = float((mean.value(moved, x) - mean.value(None, x)).detach())
    assert found >= edge - 1e-12


@pytest.mark.parametrize("rho", [0.05, 1.0, 3.0])
def test_the_searched_maximum_of_a_quadratic_is_the_solution_of_the_trust_region_problem(rho):
    """h is quadratic in the weights of a bilinear model: the maximum solves (mu I - H) d = g with |d| = rho."""
    model, x = Bilinear(), inputs(d=5)
    mean, shapes = x.mean(0), [p.shape for p in model.parameters()]

    def h(flat):
        first, second = flat[: shapes[0].numel()].reshape(shapes[0]), flat[shapes[0].numel() :]
        return second @ first @ mean

    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    g, hessian = torch.func.grad(h)(w), torch.func.hessian(h)(w)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    c = vectors.T @ g
    low, high = float(eigenvalues[-1]) + 1e-12, float(eigenvalues[-1] + g.norm() / rho) + 1
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((c / (mu - eigenvalues)).norm()) > rho else (low, mu)
    move = vectors @ (c / (high - eigenvalues))
    best = float(h(w + move) - h(w))
    assert float(surrogate_sharpness(model, x, rho, exact=True, steps=200)) == pytest.approx(best, rel=1e-4)


def test_a_radius_must_be_positive():
    model, x = network(), inputs()
    with pytest.raises(ValueError, match="rho must be > 0, got 0"):
        surrogate_sharpness(model, x, rho=0)


# ── the multiplier ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("clamp", [True, False])
def test_on_a_frozen_model_the_multiplier_grows_by_the_same_amount_each_step(clamp):
    model, x = network(), inputs()
    norm = float(norm_of(model, x)[0])
    method = SurrogateSharpness(
        0.05, eps=0.02, lam=0.1, lam_lr=0.03, clamp=clamp, params=lambda n: n != "5.bias"
    ).double()
    norm = float(surrogate_sharpness(model.requires_grad_(True), x, 1.0))
    norm = math.sqrt(norm**2 - 1)  # without the output bias
    for _ in range(50):
        method.add_grad_(model, x)
        method.dual_step()
    assert float(method.multiplier) == pytest.approx(0.1 + 50 * 0.03 * (0.05 * norm - 0.02), abs=1e-6)
    down = SurrogateSharpness(0.05, eps=50.0, lam=0.1, lam_lr=0.03, clamp=clamp).double()
    for _ in range(20):
        down.add_grad_(model, x)
        down.dual_step()
        assert clamp is False or float(down.multiplier) >= 0
    norm = float(norm_of(model, x)[0])
    assert float(down.multiplier) == (0 if clamp else pytest.approx(0.1 + 20 * 0.03 * (0.05 * norm - 50), abs=1e-6))


def test_a_feasible_limit_is_kept_in_the_end_by_the_multiplier_of_the_optimum(unchecked):
    """f = v w x at x = 1 has ||dh|| = |(v, w)|: under |(v, w) - (4, 3)|^2 / 2 the optimum is a projection on a ball."""
    model, x = Bilinear(1, 1), torch.ones(1, 1, dtype=F64)
    method = SurrogateSharpness(0.5, eps=0.5 * 1.5, lam_lr=1.0).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = []
    for _ in range(1000):
        optimizer.zero_grad()
        (0.5 * (model.first - 4).square() + 0.5 * (model.second - 3).square()).sum().backward()
        method.add_grad_(model, x)
        optimizer.step()
        method.dual_step()
        norms.append(float(method.last_norm))
    assert max(norms) > 3 and norms[-1] == pytest.approx(1.5, rel=1e-3)
    assert float(method.multiplier) * 0.5 == pytest.approx(5 - 1.5, rel=1e-3)
    assert float(model.first) == pytest.approx(1.5 * 4 / 5, rel=1e-3)


def test_a_limit_is_kept_while_a_network_trains(unchecked):
    x = inputs(64, dtype=torch.float32)
    loader = TensorLoader(x, (2 * x).sin().sum(1), batch_size=64, shuffle=True, seed=0)

    def run(method):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.3), nn.Linear(32, 1))
        options = {"optimizer": lambda groups: torch.optim.Adam(groups, 5e-3), "criterion": squared_error}
        return float(surrogate_sharpness(fit(model, loader, epochs=150, regularizer=method, **options).model, x, 1.0))

    method = SurrogateSharpness(lam_target=10.0)
    free, kept = run(None), run(method)
    limit = float(method.state.limit) / 0.05
    assert free > 1.5 * limit
    assert kept < 0.75 * free


def test_a_limit_below_the_output_bias_is_warned_of_and_never_reached():
    x = inputs(64, dtype=torch.float32)
    model = network(dtype=torch.float32)
    method = SurrogateSharpness(0.05, eps=0.5 * 0.05, lam_lr=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before = 0.0
    with pytest.warns(UserWarning, match="eps / rho = 0.5 cannot be reached: the output bias '5.bias'"):
        copy.deepcopy(method).add_grad_(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(100):
            optimizer.zero_grad()
            F.mse_loss(model(x).squeeze(1), x[:, 0]).backward()
            method.add_grad_(model, x)
            optimizer.step()
            method.dual_step()
            assert float(method.multiplier) > before and float(method.last_norm) >= 1 - 1e-6
            before = float(method.multiplier)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # without that bias nothing is said
        SurrogateSharpness(0.05, eps=0.025, lam_lr=1.0, params=lambda n: n != "5.bias").add_grad_(model, x)


def test_a_multiplier_beyond_a_thousand_is_warned_of():
    method = SurrogateSharpness(0.05, eps=1e-4, lam=0.0, lam_lr=1e6, params=["0.weight"])
    method.add_grad_(network(), inputs())
    with pytest.warns(UserWarning, match="the multiplier has grown to"):
        method.dual_step()


def test_automatic_limit_and_rate_follow_the_first_batch_and_the_number_of_steps():
    model, x = network(), inputs()
    norm = float(norm_of(model, x)[0])
    method = SurrogateSharpness(0.1, lam=0.0, total_steps=200, lam_target=4.0).double()
    method.add_grad_(model, x)
    limit = 0.1 * max(1.2, norm / 2)
    assert float(method.state.limit) == pytest.approx(limit)
    assert 200 * float(method.state.rate) * max(0.1 * norm - limit, 0.1 * norm / 4) == pytest.approx(4.0)
    in_fit = SurrogateSharpness()
    trained(in_fit)
    assert in_fit.state.rate > 0 and in_fit.state.batches == 9
    with pytest.raises(ValueError, match="lam_lr='auto' needs the planned number of optimizer steps"):
        SurrogateSharpness().add_grad_(model, x)


def test_a_gradient_of_zero_is_skipped():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
    for hvp in ("exact", "finite_difference"):
        for g in added(penalty(hvp=hvp), model, torch.ones(2, 3)):
            assert float(g.abs().max()) == 0
    value = penalty().penalty_of(model, torch.ones(2, 3))
    value.backward()
    assert float(value.detach()) == 0 and all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# ── in the contract ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("options", [{}, {"hvp": "finite_difference"}, {"mode": "penalty", "lam": 0.5}])
def test_one_and_four_micro_batches_agree(options):
    runs = []
    for accumulation in (1, 4):
        method = SurrogateSharpness(lam_target=20.0, **{"lam": 0.5, **options})
        found = trained(method, network(dtype=torch.float32), accumulation=accumulation)
        runs.append((found.model.state_dict(), method.multiplier))
    for name, value in runs[0][0].items():
        torch.testing.assert_close(value, runs[1][0][name], rtol=0, atol=1e-6)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=1e-6)


def test_the_loop_reports_sharpness_and_multiplier_and_knows_its_requirements():
    history = trained(SurrogateSharpness()).history
    assert history[0]["surrogate_sharpness"] > 0 and history[-1]["sharpness_multiplier"] > 0
    with pytest.raises(RequirementError, match="double_backward"):
        check_requirements(SurrogateSharpness(), {"gradients"}, "this loop")
    check_requirements(SurrogateSharpness(hvp="finite_difference"), {"gradients"}, "this loop")
    learned = SurrogateSharpness(lam=Hyperparameter(1.0), mode="penalty")
    check_requirements(learned, {"double_backward"}, "this loop")
    assert learned.coupled and not SurrogateSharpness().coupled
    assert learned.acts_in == {"attach", "penalty"}  # what every tuner can drive
    assert SurrogateSharpness().acts_in == {"attach", "on_gradients", "on_step", "on_epoch"}
    assert penalty().acts_in == {"attach", "on_gradients"}


def test_it_composes_with_a_method_that_takes_the_gradient_anew():
    both = Compose(SharpnessAwareMinimization(0.05), SurrogateSharpness(lam=1.0))
    alone = trained(SharpnessAwareMinimization(0.05)).model.state_dict()
    assert any(not torch.equal(v, alone[k]) for k, v in trained(both).model.state_dict().items())


def test_state_continues_bit_for_bit(tmp_path):
    def run(epochs, method, **options):
        x = inputs(48, dtype=torch.float32)
        loader = TensorLoader(x, x.sin().sum(1), batch_size=16, shuffle=True, seed=3)
        return fit(
            network(dtype=torch.float32), loader, epochs=epochs, criterion=squared_error, regularizer=method, **options
        )

    whole = SurrogateSharpness(eps=0.1, lam_lr=0.5)
    straight = run(4, whole).model.state_dict()

    class Killed(Exception):
        pass

    def kill(step, entry):
        if entry["epoch"] == 3:
            raise Killed

    file = tmp_path / "run.pt"
    with pytest.raises(Killed):
        run(4, SurrogateSharpness(eps=0.1, lam_lr=0.5), checkpoint=file, on_epoch_end=kill)
    second = SurrogateSharpness(eps=0.1, lam_lr=0.5)
    resumed = run(4, second, checkpoint=file).model.state_dict()
    assert all(torch.equal(v, straight[k]) for k, v in resumed.items())
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())


def test_state_of_an_ensemble_loads_before_its_first_batch():
    model, x = SurrogateEnsemble([network(i) for i in range(3)]), inputs()
    method = SurrogateSharpness(eps=0.1, lam_lr=0.5)
    method.add_grad_(model, x)
    method.dual_step()
    fresh = SurrogateSharpness(eps=0.1, lam_lr=0.5)
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.multiplier, method.multiplier) and len(fresh.multiplier) == 3
    with pytest.raises(ValueError, match="multipliers for 3 networks, and the model has 1"):
        fresh.add_grad_(network(), x)


def test_members_of_an_ensemble_train_as_they_would_alone():
    x = inputs(48, dtype=torch.float32)
    y = x.sin().sum(1)

    def loader():
        return TensorLoader(x, y, batch_size=16, shuffle=True, seed=3)

    options = {"epochs": 4, "optimizer": lambda groups: torch.optim.Adam(groups, 0.01)}
    together = SurrogateSharpness(eps=0.06, lam_lr=2.0, lam=0.1)
    ensemble = fit(
        SurrogateEnsemble([network(i, dtype=torch.float32) for i in range(3)]), loader(),
        criterion=ensemble_squared_error, regularizer=together, **options,
    ).model  # fmt: skip
    assert together.multiplier.unique().numel() == 3
    for i, member in enumerate(ensemble.members):
        alone = SurrogateSharpness(eps=0.06, lam_lr=2.0, lam=0.1)
        single = fit(
            network(i, dtype=torch.float32), loader(), criterion=squared_error, regularizer=alone, **options
        ).model
        for a, b in zip(member.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        torch.testing.assert_close(alone.multiplier[0], together.multiplier[i], rtol=0, atol=2e-6)


def test_each_network_of_a_pair_has_its_own_multiplier():
    model, x = Pair(network(0), network(1)), inputs()
    method = SurrogateSharpness(eps=0.1, lam_lr=0.5)
    found = added(method, model, x)
    assert len(method.multiplier) == 2
    alone = added(SurrogateSharpness(eps=0.1, lam_lr=0.5), network(1), x)
    close(found[len(alone) :], alone)


# ── learned from outside ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_tuner_sees_how_the_loss_depends_on_lam():
    from wellposed import BilevelProblem

    model, x = network(), inputs()
    method = SurrogateSharpness(0.5, lam=Hyperparameter(torch.tensor(0.7, dtype=F64), low=0.0), mode="penalty")
    method.lam.double()
    problem = BilevelProblem.from_regularizer(model, method, squared_error)
    (name,) = problem.hypers
    batch = (x, x[:, 0])
    vector = {n: torch.randn_like(p) for n, p in problem.params.items()}
    mixed = problem.mixed_vjp(vector, batch)[name]
    norm, parameters = norm_of(model, x)
    expected = torch.autograd.grad(0.5 * norm, parameters, materialize_grads=True)
    slope = sum((e * v).sum() for e, v in zip(expected, vector.values(), strict=True))
    raw = method.lam.raw.clone().requires_grad_()
    (chart,) = torch.autograd.grad(method.lam.from_raw(raw), raw)
    torch.testing.assert_close(mixed, slope * chart, rtol=1e-8, atol=1e-10)
    inner = problem.inner_grad(batch)
    plain = torch.autograd.grad(squared_error(model(x), x[:, 0]).mean(), parameters)
    close(list(inner.values()), [p + method.lam.value * e for p, e in zip(plain, expected, strict=True)])


def test_with_a_hyperparameter_training_uses_the_loss_and_agrees_with_a_number():
    learned = SurrogateSharpness(lam=Hyperparameter(0.5), mode="penalty")
    a = trained(learned, network(dtype=torch.float32)).model.state_dict()
    b = trained(SurrogateSharpness(lam=0.5, mode="penalty"), network(dtype=torch.float32)).model.state_dict()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="lam is a Hyperparameter; add penalty_of to the loss"):
        learned.add_grad_(network(), inputs())


# ── precision ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_with_half_precision_weights_it_computes_in_float32(hvp, dtype):
    model = network(dtype=torch.float32, width=32, activation=nn.LeakyReLU)
    x = inputs(64, dtype=torch.float32)
    truth = torch.cat([g.reshape(-1) for g in added(penalty(hvp=hvp), model, x)])
    with torch.autocast("cpu", dtype=dtype):
        found = torch.cat([g.reshape(-1) for g in added(penalty(hvp=hvp), model, x)])
    torch.testing.assert_close(found, truth, rtol=0, atol=0)
    half = copy.deepcopy(model).to(dtype)
    rounded = copy.deepcopy(half).float()
    expected = torch.cat([g.reshape(-1) for g in added(penalty(hvp=hvp), rounded, x.to(dtype).float())])
    found = torch.cat([g.reshape(-1) for g in added(penalty(hvp=hvp), half, x.to(dtype))])
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 1e-2
    assert all(p.dtype == dtype for p in half.parameters())


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "options, message",
    [
        ({"rho": 0.0}, "rho must be > 0, got 0.0"),
        ({"rho": math.nan}, "rho must be > 0, got nan"),
        ({"r": -1.0}, "r must be > 0, got -1.0"),
        ({"eps": "third"}, "eps must be > 0 or 'half', got 'third'"),
        ({"eps": 0.0}, "eps must be > 0 or 'half', got 0.0"),
        ({"lam_lr": 0.0}, "lam_lr must be > 0 or 'auto', got 0.0"),
        ({"lam": -0.1}, "lam must be >= 0, got -0.1"),
        ({"lam_target": 0}, "lam_target must be > 0, got 0"),
        ({"total_steps": 0}, "total_steps must be > 0, got 0"),
        ({"mode": "hard"}, "mode must be one of .*got 'hard'"),
        ({"hvp": "jvp"}, "hvp must be one of .*got 'jvp'"),
        ({"params": []}, "params is empty"),
        ({"lam": Hyperparameter(1.0)}, "mode 'constraint' learns the multiplier itself"),
    ],
)
def test_wrong_arguments_are_named(options, message, unchecked):
    with pytest.raises(ValueError, match=f"^SurrogateSharpness: .*{message}"):
        SurrogateSharpness(**options)


def test_wrong_models_and_batches_are_named():
    model = network()
    with pytest.raises(ValueError, match="the batch is empty"):
        penalty().add_grad_(model, torch.zeros(0, 4, dtype=F64))
    with pytest.raises(ValueError, match="no parameter of Sequential that requires a gradient"):
        penalty().add_grad_(network().requires_grad_(False), inputs())
    with pytest.raises(ValueError, match="no parameter of Sequential that requires a gradient"):
        penalty().attach(network().requires_grad_(False))
    with pytest.raises(ValueError, match="the network has no parameter 'bias'"):
        penalty(params=["bias"]).attach(model)
    with pytest.raises(ValueError, match=r"one value for each of the 16 examples, got shape \(\)"):
        penalty(output_fn=torch.sum).add_grad_(model, inputs())
    with pytest.raises(TypeError, match="give output_fn="):
        penalty().add_grad_(nn.Linear(4, 3).double(), inputs())
    with pytest.raises(RuntimeError, match=r"call add_grad_ \(or penalty_of\) on a batch first"):
        SurrogateSharpness(total_steps=5).dual_step()
    broken = inputs()
    broken[0] = math.nan
    method = SurrogateSharpness(total_steps=5)
    method.add_grad_(model, inputs())
    with pytest.raises(DivergenceError, match="on batch 1"):
        method.add_grad_(model, broken)


def test_a_network_that_cannot_be_differentiated_twice_is_told_of_the_other_way():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()

        def forward(self, x):
            return self.last(Once.apply(self.first(x)))

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="use hvp='finite_difference'"):
        penalty().add_grad_(Model(), inputs())
    assert max(float(g.abs().max()) for g in added(penalty(hvp="finite_difference"), Model(), inputs())) > 0


def test_inputs_may_be_dicts_and_tuples():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, a, b):
            return self.inner(a + b)

    model, x = Named(), inputs()
    for hvp in ("exact", "finite_difference"):
        expected = added(penalty(hvp=hvp), model.inner, x)
        for given_ in ({"a": x, "b": torch.zeros_like(x)}, (x, torch.zeros_like(x))):
            close(added(penalty(hvp=hvp), model, given_, micro_batches=2), expected, atol=1e-12)


def test_the_step_of_a_loop_acts_as_add_grad_does():
    model, x = network(), inputs()
    expected = [g.clone() for g in added(penalty(), model, x)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    penalty().on_gradients(Step(model, inputs=x, micro_batches=4))
    close([p.grad for p in model.parameters()], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_on_an_accelerator_it_agrees_with_the_cpu(hvp):
    model, x = network(), inputs()
    expected = added(penalty(hvp=hvp), model, x)
    device = copy.deepcopy(model).cuda()
    random = torch.cuda.get_rng_state()
    close([g.cpu() for g in added(penalty(hvp=hvp).cuda(), device, x.cuda())], expected, atol=1e-9)
    assert torch.equal(torch.cuda.get_rng_state(), random)
