"""The inexact hypergradient and its bound, against closed forms, autograd and dense linear algebra."""

import itertools
import math

import pytest
import torch

from wellposed import Hyperparameter
from wellposed.studies.problems.decoupled_quadratic import DecoupledQuadratic
from wellposed.studies.problems.log_cosh import LogCosh
from wellposed.studies.problems.weighted_logistic import WeightedLogistic
from wellposed.tuning import (
    MAID,
    CertifiedProblem,
    Estimated,
    FixedStep,
    LowerLevel,
    UpperLoss,
    argmin,
    implicit_hypergradient,
)
from wellposed.tuning.hypergradient import error_of, jacobian_norm
from wellposed.tuning.line_search import bounds_of

F64 = torch.float64
THETA = torch.ones(4, dtype=F64)


def point_and_gradient(problem, eps, delta, theta=None):
    """z and omega at an inner solution of the accuracy asked for."""
    tuner = FixedStep(problem, eps, 1.0, on_uncertified="ignore")
    point = tuner.solve_at(tuner.u if theta is None else theta, tuner.x, eps)
    found = tuner.hypergradient_at(point, delta)
    omega = error_of(tuner.lower, tuner.upper, point.x, point.u, point.slope, point.eps, found)[0]
    return tuner, point, found.z, omega


def test_with_exact_solves_it_is_the_gradient_of_the_closed_form():
    problem = DecoupledQuadratic(0, 10.0)
    _, _, z, omega = point_and_gradient(problem.levels(), 1e-12, 1e-12)
    theta = THETA.clone().requires_grad_()
    problem.f(theta).backward()
    torch.testing.assert_close(z, theta.grad, rtol=1e-7, atol=0)
    assert omega < 1e-8


@pytest.mark.parametrize("condition", [10.0, 30.0])
def test_the_bound_holds_on_quadratics_at_every_pair_of_accuracies(condition):
    looseness = []
    for seed in range(8):
        problem = DecoupledQuadratic(seed, condition)
        true = problem.gradient(THETA)
        for eps, delta in itertools.product((1.0, 1e-2, 1e-4), repeat=2):
            _, _, z, omega = point_and_gradient(problem.levels(), eps, delta)
            error = float((z - true).norm())
            assert error <= omega * (1 + 1e-10)
            looseness.append(omega / max(error, 1e-300))
    assert min(looseness) < 1.2 * condition**2  # it is a bound of this error, not any large number


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)])
def test_the_bound_holds_where_hessian_and_mixed_derivative_change_with_x(seeds):
    for seed in seeds:
        problem = LogCosh(seed)
        theta = 0.5 * torch.ones(3, dtype=F64)
        true = problem.gradient(theta)
        for eps, delta in itertools.product((1.0, 1e-2, 1e-4), repeat=2):
            _, _, z, omega = point_and_gradient(problem.levels(), eps, delta, theta)
            assert math.isfinite(omega)
            assert float((z - true).norm()) <= omega * (1 + 1e-10)


def test_without_lipschitz_constants_there_is_no_bound():
    problem = LogCosh(0).levels()
    problem.lower.L_Hinv = None
    assert point_and_gradient(problem, 1e-2, 1e-2)[3] == math.inf


@pytest.mark.parametrize("eps", [1e-1, 1e-3])
@pytest.mark.parametrize("convex", [True, False])
def test_the_exact_upper_loss_lies_between_the_two_bounds(eps, convex):
    for seed in range(10):
        problem = DecoupledQuadratic(seed, 30.0)
        levels = problem.levels()
        levels.upper.convex = convex
        tuner, point, _, _ = point_and_gradient(levels, eps, 1e-3)
        low, high = bounds_of(tuner, point)
        assert low - 1e-10 <= float(problem.f(THETA)) <= high + 1e-10


def test_autograd_of_the_objective_and_closed_forms_agree():
    problem = WeightedLogistic(0, train=80, validation=60)
    closed = problem.levels()
    lower = LowerLevel(problem._objective, closed.lower.x0[0], closed.hypers, mu=closed.lower.mu, L=closed.lower.L)
    upper = UpperLoss(problem._upper, problem.L_g, convex=True)
    x = 0.1 * torch.randn(10, 65, generator=torch.Generator().manual_seed(0), dtype=F64)
    u = closed.lower.u0 + torch.linspace(-1, 1, 650, dtype=F64)
    torch.testing.assert_close(lower.gradient(x[None], u), closed.lower.gradient(x[None], u))
    mine, theirs = closed.lower.curvature(x[None], u), lower.curvature(x[None], u)
    v = torch.randn(1, 10, 65, generator=torch.Generator().manual_seed(1), dtype=F64)
    torch.testing.assert_close(mine.hvp(v), theirs.hvp(v))
    torch.testing.assert_close(mine.mixed_vjp(v), theirs.mixed_vjp(v))
    for a, b in zip(
        closed.upper.value_and_gradient(x[None], False), upper.value_and_gradient(x[None], False), strict=True
    ):
        torch.testing.assert_close(a, b)
    z, omega = implicit_hypergradient(lower, upper, x, u, eps=0.1, delta=1e-10)
    torch.testing.assert_close(z, implicit_hypergradient(closed.lower, closed.upper, x, u, eps=0.1, delta=1e-10)[0])
    assert omega == math.inf


def test_ridge_with_a_log_weight_matches_a_finite_difference_of_the_closed_form():
    g = torch.Generator().manual_seed(0)
    X, t = torch.randn(30, 6, generator=g, dtype=F64), torch.randn(30, generator=g, dtype=F64)
    V, s = torch.randn(20, 6, generator=g, dtype=F64), torch.randn(20, generator=g, dtype=F64)
    largest = float(torch.linalg.eigvalsh(X.T @ X / 30)[-1])
    weight = Hyperparameter(0.3, chart="exp").double()
    lower = LowerLevel(
        lambda w, v: (X @ w - t).square().mean() + v["weight"] * w.square().sum(), torch.zeros(6, dtype=F64),
        {"weight": weight}, mu=lambda v: 2 * v["weight"], L=lambda v: 2 * (largest + v["weight"]), quadratic=True,
    )  # fmt: skip
    upper = UpperLoss(lambda w: (V @ w - s).square().mean(), 2 * float(torch.linalg.eigvalsh(V.T @ V / 20)[-1]), True)
    _, point, z, _ = point_and_gradient(CertifiedProblem(lower, upper), 1e-11, 1e-12)

    def f(u):
        w = torch.linalg.solve(X.T @ X / 30 + math.exp(u) * torch.eye(6, dtype=F64), X.T @ t / 30)
        return float((V @ w - s).square().mean())

    u = float(weight.raw)
    assert float(z) == pytest.approx((f(u + 1e-5) - f(u - 1e-5)) / 2e-5, rel=1e-6)
    # The same in closed form: -2 e^u w' H^-1 grad g, H = 2 (X'X / n + e^u).
    H = 2 * (X.T @ X / 30 + math.exp(u) * torch.eye(6, dtype=F64))
    expected = -2 * math.exp(u) * point.x[0] @ torch.linalg.solve(H, point.slope[0])
    assert float(z) == pytest.approx(float(expected), rel=1e-6)


def test_logistic_regression_matches_the_dense_implicit_function_theorem():
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 5, generator=g, dtype=F64), torch.arange(40) % 2
    V, s = torch.randn(30, 5, generator=g, dtype=F64), torch.arange(30) % 2
    decay = Hyperparameter(0.1, chart="exp", shape=(2, 5)).double()
    L = float(torch.linalg.eigvalsh(X.T @ X)[-1]) / 80

    def h(w, v):
        return torch.nn.functional.cross_entropy(X @ w.T, y) + 0.5 * (v["decay"] * w.square()).sum()

    def loss(w):
        return torch.nn.functional.cross_entropy(V @ w.T, s)

    lower = LowerLevel(
        h, torch.zeros(2, 5, dtype=F64), {"decay": decay}, lambda v: v["decay"].min(), lambda v: L + v["decay"].max()
    )
    _, point, z, _ = point_and_gradient(CertifiedProblem(lower, UpperLoss(loss, L, True)), 1e-11, 1e-12)
    x, u = point.x[0].reshape(-1), point.u

    def flat(x, u):
        return h(x.reshape(2, 5), {"decay": u.exp().reshape(2, 5)})

    H = torch.func.hessian(flat, 0)(x, u)
    J = torch.func.jacrev(torch.func.grad(flat, 0), 1)(x, u)
    expected = -J.T @ torch.linalg.solve(H, torch.func.grad(lambda x: loss(x.reshape(2, 5)))(x))
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-10)


def test_several_samples_give_the_mean_of_their_hypergradients():
    y = torch.arange(12.0, dtype=F64).reshape(3, 4)
    weight = Hyperparameter(0.5, chart="exp").double()

    def build(rows):
        lower = LowerLevel(
            lambda x, v: 0.5 * (x - y[rows]).square().sum(1) + 0.25 * v["weight"] * (x**4).sum(1) / 100, y[rows],
            {"weight": weight}, 1.0, 1e1, per_sample=True,
        )  # fmt: skip
        return CertifiedProblem(lower, UpperLoss(lambda x: 0.5 * (x - 1).square().sum(1), 1.0, True))

    together = point_and_gradient(build([0, 1, 2]), 1e-9, 1e-9)[2]
    alone = [point_and_gradient(build([row]), 1e-9, 1e-9)[2] for row in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-6, atol=0)


def test_a_penalty_on_the_hyperparameters_adds_its_own_gradient():
    y = torch.ones(2, dtype=F64)
    shift = Hyperparameter(0.3, -9, 9, chart="sigmoid").double()
    lower = LowerLevel(lambda x, v: 0.5 * (x - v["shift"] * y).square().sum(), 0 * y, {"shift": shift}, 1.0, 1.0)
    plain = CertifiedProblem(lower, UpperLoss(lambda x: x.square().sum(), 2.0, True))
    penalised = CertifiedProblem(lower, UpperLoss(lambda x: x.square().sum(), 2.0, True, lambda v: 3 * v["shift"]))
    difference = point_and_gradient(penalised, 1e-9, 1e-9)[2] - point_and_gradient(plain, 1e-9, 1e-9)[2]
    raw = shift.raw.clone().requires_grad_()
    expected = torch.autograd.grad(3 * shift.from_raw(raw), raw)[0]
    torch.testing.assert_close(difference[0], expected)


def test_the_norm_of_the_mixed_derivative_is_exact_for_few_and_estimated_for_many_hyperparameters():
    problem = LogCosh(0)
    levels = problem.levels()
    x, u = torch.zeros(1, 5, dtype=F64), torch.zeros(3, dtype=F64)
    exact = torch.linalg.matrix_norm(problem.second(x[0], u)[1], 2)
    found = jacobian_norm(levels.lower, x, u, levels.lower.curvature(x, u))
    assert found.certified and found.value == pytest.approx(float(exact), rel=1e-10)
    many = LogCosh(0, rows=60, size=40, hypers=30)
    x, u = torch.zeros(1, 40, dtype=F64), torch.zeros(30, dtype=F64)
    exact = float(torch.linalg.matrix_norm(many.second(x[0], u)[1], 2))
    levels = many.levels()
    found = jacobian_norm(levels.lower, x, u, levels.lower.curvature(x, u))
    assert not found.certified
    assert exact <= found.value <= 1.15 * exact


def test_accuracies_out_of_range_are_refused():
    problem = DecoupledQuadratic(0, 10.0).levels()
    x = torch.zeros(4, dtype=F64)
    for eps, delta in ((-1.0, 1.0), (0.1, 0.0)):
        with pytest.raises(ValueError, match="eps must be >= 0 and delta > 0"):
            implicit_hypergradient(problem.lower, problem.upper, x, eps=eps, delta=delta)


# argmin


def test_argmin_passes_gradcheck_and_its_memory_does_not_grow_with_iterations():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(8, 3, generator=g, dtype=F64)

    def objective(x, theta):
        return torch.logaddexp(A @ x + theta[:8], -A @ x - theta[:8]).sum() + theta[8].exp() * x.square().sum()

    theta = torch.cat([torch.randn(8, generator=g, dtype=F64), torch.zeros(1, dtype=F64)]).requires_grad_()
    L = float(torch.linalg.eigvalsh(A.T @ A)[-1]) + 2.5
    x0 = torch.zeros(3, dtype=F64)
    assert torch.autograd.gradcheck(
        lambda t: argmin(objective, t, x0, 1.5, L, eps=1e-11, delta=1e-11), theta, eps=1e-5, atol=1e-6
    )
    # What the graph keeps is the minimiser and theta, whatever the solve took.
    saved = argmin(objective, theta, x0, 1.5, L, eps=1e-11).grad_fn.saved_tensors
    assert sorted(t.numel() for t in saved) == [3, 9]


def test_argmin_refuses_a_second_derivative_and_bad_accuracies():
    theta = torch.tensor(1.0, dtype=F64, requires_grad=True)
    objective = lambda x, t: 0.5 * (x - t).square().sum()  # noqa: E731
    x = argmin(objective, theta, torch.zeros(1, dtype=F64), 1.0, 1.0)
    slope = torch.autograd.grad(x.sum(), theta, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope, theta)
    with pytest.raises(ValueError, match="delta must be > 0"):
        argmin(objective, theta, torch.zeros(1, dtype=F64), 1.0, 1.0, delta=0.0)
    with pytest.raises(ValueError, match="mu must be > 0"):
        argmin(objective, theta, torch.zeros(1, dtype=F64), 0.0, 1.0)


def test_estimated_constants_make_the_run_uncertified():
    levels = DecoupledQuadratic(0, 10.0).levels()
    levels.lower.L = Estimated(levels.lower.L.value)
    with pytest.warns(UserWarning, match="MAID: L only estimated"):
        tuner = MAID(levels)
    assert not tuner.certified and not tuner.step().certified
    with pytest.raises(ValueError, match="L only estimated"):
        MAID(levels, on_uncertified="raise")
