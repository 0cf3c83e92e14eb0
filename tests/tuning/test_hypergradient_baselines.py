"""One unrolled step and implicit differentiation, the usual hypergradients, against autograd and closed forms."""

import copy
import math

import pytest
import torch
from bilevel_doubles import Recorder, noises, quadratic
from scipy.optimize import minimize_scalar
from torch import nn

from wellposed import BilevelProblem, Hyperparameter
from wellposed.step import DivergenceError
from wellposed.tuning import (
    ImplicitDifferentiation,
    NormalizedMomentum,
    OneStepUnrolled,
    StocBiO,
    upper_parameters,
)


def streams():
    return Recorder(noises(60, seed=3)), Recorder(noises(60, seed=4))


def moved_along(make, problem):
    """The hypergradient that a tuner used: with SGD of step size 1, minus the move."""
    before = problem.hypers["x"].raw.clone()
    tuner, (train, validation) = make(problem), streams()
    info = tuner.step(train, validation)
    return before - problem.hypers["x"].raw, info, train, validation


@pytest.mark.parametrize("seed", range(3))
def test_the_unrolled_hypergradient_is_that_of_autograd_through_one_step(seed):
    problem, other = quadratic(seed=seed), quadratic(seed=seed)
    make = lambda p: OneStepUnrolled(p, 0.2, 1.0, outer_optimizer=torch.optim.SGD)  # noqa: E731
    found, info, train, validation = moved_along(make, problem)
    raw = other.raw()
    inner = other.evaluate(other.inner_loss, other.params, raw, train.taken[0])
    slope = torch.autograd.grad(inner, other.params["y"], create_graph=True)[0]
    stepped = {"y": other.params["y"] - 0.2 * slope}
    outer = other.evaluate(other.outer_loss, stepped, raw, validation.taken[0])
    torch.testing.assert_close(found, torch.autograd.grad(outer, raw["x"])[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(problem.params["y"], stepped["y"])
    assert info.outer_loss == pytest.approx(outer.item()) and len(train.taken) == 1


@pytest.mark.parametrize("seed", range(3))
def test_implicit_differentiation_is_the_closed_form_near_the_lower_solution(seed):
    problem = quadratic(seed=seed)
    problem.parts[0].mul_(1.0)
    a, b, c, d = problem.parts
    x = problem.hypers["x"].raw.clone().requires_grad_()
    solution = torch.linalg.solve(a, b @ x)
    phi = 0.5 * (solution - c).square().sum() + d @ x
    expected = torch.autograd.grad(phi, x)[0]
    tuner = ImplicitDifferentiation(
        problem, 0.05, 1.0, inner_steps=400, cg_steps=20, tol=1e-12, outer_optimizer=torch.optim.SGD
    )
    zero = torch.zeros(4, dtype=torch.float64)
    info = tuner.step(Recorder([zero]), Recorder([zero]))
    found = x.detach() - problem.hypers["x"].raw
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert info.extra["z_residual"] < 1e-10


def test_the_system_is_the_mean_over_batches_that_stay_fixed():
    problem = quadratic()
    train, validation = streams()
    tuner = ImplicitDifferentiation(problem, 0.1, 0.1, inner_steps=2, batches=3, cg_steps=4, tol=0.0)
    tuner.step(train, validation)
    assert len(train.taken) == 2 + 3 and len(validation.taken) == 1
    assert problem.counts.mixed_vjp == 3 and problem.counts.hvp % 3 == 0


def test_damping_shrinks_the_solution():
    norms = []
    for damping in (0.0, 10.0):
        problem = quadratic()
        tuner = ImplicitDifferentiation(problem, 0.1, 0.1, damping=damping, cg_steps=20, tol=1e-10)
        tuner.step(*streams())
        norms.append(float(tuner.z[0].norm()))
    assert norms[1] < 0.5 * norms[0]


def test_a_direction_of_negative_curvature_ends_the_solve_and_keeps_it_finite():
    w = {"w": torch.tensor([0.1, 0.2], requires_grad=True)}
    inner = lambda p, v, b: v["s"] * (p["w"][0].square() - p["w"][1].square()) + 0.1 * p["w"].pow(4).sum()  # noqa: E731
    outer = lambda p, v, b: (p["w"] - 1).square().sum()  # noqa: E731
    tuner = ImplicitDifferentiation(BilevelProblem(None, inner, outer, w, {"s": Hyperparameter(0.5)}), 0.01, 0.01)
    info = tuner.step(iter([0] * 99), iter([0] * 99))
    assert math.isfinite(info.extra["hypergrad_norm"]) and all(bool(z.isfinite().all()) for z in tuner.z)


def ridge():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a, b, true = draw(12, 5), draw(40, 5), draw(5)
    y, t = a @ true + 3.0 * draw(12), b @ true + 0.5 * draw(40)

    def value(u):
        w = torch.linalg.solve(a.T @ a / 12 + math.exp(u) * torch.eye(5, dtype=torch.float64), a.T @ y / 12)
        return float((b @ w - t).square().mean())

    decay = Hyperparameter(0.3, chart="exp").double()
    w = {"w": torch.zeros(5, dtype=torch.float64, requires_grad=True)}
    inner = lambda p, v, _: (a @ p["w"] - y).square().mean() + v["decay"] * p["w"].square().sum()  # noqa: E731
    outer = lambda p, v, _: (b @ p["w"] - t).square().mean()  # noqa: E731
    best = minimize_scalar(value, bounds=(-8, 4), method="bounded").x
    return BilevelProblem(None, inner, outer, w, {"decay": decay}), best


@pytest.mark.parametrize("outer_optimizer", [None, NormalizedMomentum])
def test_implicit_differentiation_lands_where_brent_finds_the_minimum(outer_optimizer):
    problem, best = ridge()
    tuner = ImplicitDifferentiation(problem, 0.02, 0.1, inner_steps=10, outer_optimizer=outer_optimizer)
    tuner.run([0], [0], steps=40)
    assert abs(float(problem.hypers["decay"].raw) - best) < 0.1


def test_one_unrolled_step_is_right_at_equilibrium_when_steps_are_large():
    problem, best = ridge()
    OneStepUnrolled(problem, 0.1, 0.05).run([0], [0], steps=200)
    assert abs(float(problem.hypers["decay"].raw) - best) < 0.5


def test_clipping_bounds_the_move_of_plain_sgd():
    problem = quadratic()
    make = lambda p: OneStepUnrolled(p, 0.2, 1.0, outer_optimizer=torch.optim.SGD, clip=0.01)  # noqa: E731
    found, info, *_ = moved_along(make, problem)
    assert float(found.norm()) == pytest.approx(0.01, rel=1e-6) and info.extra["hypergrad_norm"] > 0.01
    assert problem.hypers["x"].raw.grad is None


@pytest.mark.parametrize("make", [
    lambda p: OneStepUnrolled(p, 0.1, 0.05),
    lambda p: ImplicitDifferentiation(p, 0.1, 0.05, inner_steps=3),
], ids=["OneStepUnrolled", "ImplicitDifferentiation"])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make):
    problem, other = quadratic(), quadratic()
    tuner, resumed = make(problem), make(other)
    train, validation = streams()
    for _ in range(4):
        tuner.step(train, validation)
    resumed.load_state_dict(copy.deepcopy(tuner.state_dict()))
    at = len(train.taken), len(validation.taken)
    for t in (tuner, resumed):
        for _ in range(4):
            t.step(train, validation)
        if t is tuner:
            del train.taken[at[0] :], validation.taken[at[1] :]
    assert torch.equal(problem.params["y"], other.params["y"])
    assert torch.equal(problem.hypers["x"].raw, other.hypers["x"].raw)


@pytest.mark.parametrize("make", [OneStepUnrolled, ImplicitDifferentiation])
def test_bad_arguments_and_gradients_are_refused(make):
    for name in ("inner_lr", "outer_lr"):
        with pytest.raises(ValueError, match=f"{make.__name__}: {name} must be > 0 and finite, got 0.0"):
            make(quadratic(), **{"inner_lr": 0.1, "outer_lr": 0.1, name: 0.0})
    with pytest.raises(ValueError, match=f"{make.__name__}: clip must be > 0 and finite, got -1"):
        make(quadratic(), 0.1, 0.1, clip=-1)
    problem = quadratic()
    problem.outer_loss = lambda p, v, b: math.nan * p["y"].sum()
    with pytest.raises(DivergenceError, match=f"{make.__name__}: the hypergradient is not finite"):
        make(problem, 0.1, 0.1).step(*streams())


@pytest.mark.parametrize("make", [OneStepUnrolled, ImplicitDifferentiation, StocBiO])
def test_a_parameter_on_both_levels_is_refused_by_each_under_its_own_name(make):
    encoder = nn.Linear(2, 2)
    loss = lambda p, v, b: sum(x.sum() for x in [*p.values(), *v.values()])  # noqa: E731
    problem = BilevelProblem(encoder, loss, loss, hypers=upper_parameters(encoder))
    with pytest.raises(ValueError, match=f"{make.__name__}: the parameter 'weight' is the hyperparameter 'weight'"):
        make(problem, 0.1, 0.1, **({"neumann_lr": 0.1} if make is StocBiO else {}))


def test_the_cosine_of_a_double_loop_ends_at_zero_with_its_run():
    problem = quadratic()
    tuner = StocBiO(problem, 0.1, 0.1, 0.1, schedule="cosine")
    tuner.run(noises(60, seed=3), noises(60, seed=4), steps=4)
    assert tuner.total_steps == 4 and tuner.scheduled_lr() == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(ValueError, match="'cosine' needs total_steps"):
        StocBiO(quadratic(), 0.1, 0.1, 0.1, schedule="cosine").step(*streams())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inner_steps": 0}, "inner_steps must be >= 1, got 0"),
        ({"cg_steps": 0}, "cg_steps must be >= 1, got 0"),
        ({"batches": 0}, "batches must be >= 1, got 0"),
        ({"damping": -1.0}, "tol and damping must be >= 0, got 0.01 and -1.0"),
    ],
)
def test_implicit_differentiation_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"ImplicitDifferentiation: {message}"):
        ImplicitDifferentiation(quadratic(), 0.1, 0.1, **options)


@pytest.mark.slow
def test_a_deep_network_under_adam_gets_a_decay_that_beats_those_around_it():
    def trained(start, lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        inputs = torch.randn(30, 4)
        decay = Hyperparameter(start, chart="exp")

        def loss(params, hypers, rows):
            outputs = torch.func.functional_call(model, params, (inputs[rows],))
            return (outputs - inputs[rows, :1]).square().mean()

        def inner(params, hypers, rows):
            return loss(params, hypers, rows) + hypers["decay"] * sum(p.square().sum() for p in params.values())

        problem = BilevelProblem(model, inner, loss, hypers={"decay": decay})
        tuner = ImplicitDifferentiation(problem, 0.01, lr, inner_optimizer=torch.optim.Adam, damping=0.1)
        history = tuner.run([slice(0, 20)], [slice(20, 30)], steps=45)
        return float(decay()), history[-1].outer_loss

    decay, learned = trained(0.03, 0.2)
    assert 0.05 < decay < 0.15
    assert all(learned < 0.6 * trained(fixed, 1e-9)[1] for fixed in (0.01, 0.3))
