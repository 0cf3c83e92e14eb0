"""Newton's method as inner solver: the same certificate, fewer units on stiff problems."""

import pytest
import torch

from wellposed import Hyperparameter
from wellposed.studies.problems.weighted_logistic import WeightedLogistic
from wellposed.tuning import MAID, CertifiedProblem, InnerSolverError, LowerLevel, UpperLoss
from wellposed.tuning.newton import newton_solver

F64 = torch.float64


def stiff():
    problem = WeightedLogistic(0, train=80, validation=60).levels()
    problem.hypers["weight"].raw.fill_(-8.0)
    return problem


@pytest.mark.parametrize("eps", [1.0, 1e-4, 1e-8])
def test_it_delivers_the_certificate_for_far_fewer_units(eps):
    plain, newton = stiff(), stiff()
    newton.lower.solver = newton_solver(newton.lower)
    tuners = [MAID(problem, 1.0, 1.0, 1.0) for problem in (plain, newton)]
    points = [tuner.solve_at(tuner.u, tuner.x, eps) for tuner in tuners]
    assert max(float(point.eps.max()) for point in points) <= eps
    assert float((points[0].x - points[1].x).norm()) <= 2 * eps
    if eps < 1:
        assert tuners[1].work.inner < tuners[0].work.inner
    slope = newton.lower.gradient(points[1].x, points[1].u)
    mu = float(newton.lower.mu.lower(newton.lower.values(points[1].u)))
    torch.testing.assert_close(slope.norm() / mu, points[1].eps[0], rtol=1e-6, atol=1e-12)


def test_a_quadratic_is_solved_by_autograd_in_a_few_steps_for_many_samples():
    y = torch.arange(6.0, dtype=F64).reshape(3, 2)
    lower = LowerLevel(
        lambda x, v: 0.5 * (x - y).square().sum(1) + 0.5 * v["weight"] * x.square().sum(1), 0 * y,
        {"weight": Hyperparameter(1.0, chart="exp").double()}, 2.0, 2.0, per_sample=True, quadratic=True,
    )  # fmt: skip
    found = newton_solver(lower)(lower.x0, lower.values(lower.u0), 2.0, 2.0, 1e-10, 100, None)
    torch.testing.assert_close(found.x, y / 2)
    assert found.status == "converged" and found.iterations < 30


def test_limits_watches_and_gradients_that_are_not_finite_end_it():
    problem = stiff()
    lower = problem.lower
    values = lower.values(lower.u0)
    solve = newton_solver(lower)
    mu, L = lower.mu.lower(values), lower.L.upper(values)
    assert solve(lower.x0, values, mu, L, 1e-8, 5, None).status == "limit"
    assert solve(lower.x0, values, mu, L, 1e-8, 10_000, lambda *_: True).status == "stopped"
    bad = LowerLevel(
        lambda x, v: (x.log() * x).sum() * v["w"], -torch.ones(2, dtype=F64), {"w": Hyperparameter(1.0)}, 1.0, 2.0
    )
    assert newton_solver(bad)(bad.x0, bad.values(bad.u0), 1.0, 2.0, 1e-3, 10, None).status == "not_finite"
    bad.solver = newton_solver(bad)
    with pytest.raises(InnerSolverError, match="a gradient is not finite"):
        MAID(CertifiedProblem(bad, UpperLoss(lambda x: x.square().sum(), 2.0)), 0.1, 0.1, 1.0).step()
