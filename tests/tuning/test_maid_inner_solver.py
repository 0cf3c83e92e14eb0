"""The certified inner solvers: distances, momentum, samples that stop by themselves, and errors that say where."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from wellposed.tuning import (
    Estimated,
    InnerSolverError,
    Known,
    LinearSolverError,
    batched_conjugate_gradient,
    solve_strongly_convex,
)
from wellposed.tuning.constants import as_constant
from wellposed.tuning.strongly_convex import accelerated_gradient

F64 = torch.float64


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def quadratic(condition, size=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=F64)).Q
    H = basis * torch.logspace(0, math.log10(condition), size, dtype=F64) @ basis.T
    b = torch.randn(size, generator=g, dtype=F64)
    return H, b, torch.linalg.solve(H, b)


@settings(max_examples=25, deadline=None)
@given(
    condition=st.sampled_from([1.0, 3.0, 100.0, 1e4]),
    eps=st.sampled_from([1.0, 1e-3, 1e-6]),
    seed=st.integers(0, 10_000),
)
def test_the_minimiser_is_within_eps_and_the_certificate_bounds_the_distance(condition, eps, seed):
    H, b, best = quadratic(condition, size=5, seed=seed)
    found = solve_strongly_convex(lambda x: 0.5 * x @ H @ x - b @ x, torch.zeros(5, dtype=F64), 1.0, condition, eps)
    distance = float((found.x - best).norm())
    assert float(found.eps) <= eps * (1 + 1e-9)
    assert distance <= float(found.eps) * (1 + 1e-9) + 1e-14


def test_momentum_makes_the_solver_five_times_faster_than_gradient_descent():
    condition = 1e4
    H, b, best = quadratic(condition)
    found = accelerated_gradient(
        lambda x: x @ H - b, torch.zeros(1, 20, dtype=F64), 1.0, condition, 1e-8, max_iterations=10**6
    )
    assert (found.x[0] - best).norm() <= 1e-8
    # Gradient descent with the same step 1/L: the slowest error shrinks by 1 - 1/kappa an iteration.
    x, plain = torch.zeros(20, dtype=F64), 0
    while (H @ x - b).norm() > 1e-8:
        x, plain = x - (H @ x - b) / condition, plain + 1
        if plain > 5 * found.iterations:
            break
    assert plain > 5 * found.iterations


def test_the_point_that_is_returned_is_the_point_whose_gradient_was_tested():
    H, b, _ = quadratic(50.0)
    found = accelerated_gradient(
        lambda x: x @ H - b, torch.zeros(1, 20, dtype=F64), 1.0, 50.0, 1e-4, max_iterations=999
    )
    torch.testing.assert_close((H @ found.x[0] - b).norm()[None], found.gradient_norms, rtol=1e-9, atol=0)


def test_every_sample_stops_by_itself_and_keeps_its_first_point_that_passes():
    # Three problems of one kind, with starts at different distances; and with moduli of their own.
    H, b, best = quadratic(100.0)
    starts = torch.stack([best, best + 1e-3, torch.zeros_like(best)])
    together = accelerated_gradient(lambda x: x @ H - b, starts, 1.0, 100.0, 1e-5, max_iterations=999)
    assert together.status == "converged"
    for one, start in zip(together.x, starts, strict=True):
        alone = accelerated_gradient(lambda x: x @ H - b, start[None], 1.0, 100.0, 1e-5, max_iterations=999)
        torch.testing.assert_close(one, alone.x[0], rtol=0, atol=1e-13)
        assert alone.iterations <= together.iterations
    scale = torch.tensor([[1.0], [7.0]], dtype=F64)
    found = solve_strongly_convex(
        lambda x: 0.5 * (scale * (x - 2) ** 2).sum(1), torch.zeros(2, 3, dtype=F64), scale[:, 0], scale[:, 0], 1e-6,
        per_sample=True,
    )  # fmt: skip
    torch.testing.assert_close(found.x, torch.full((2, 3), 2.0, dtype=F64))
    assert found.eps.shape == (2,)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_multiplying_the_objective_changes_no_iterate(scale):
    H, b, _ = quadratic(100.0)
    x0 = torch.zeros(1, 20, dtype=F64)
    plain = accelerated_gradient(lambda x: x @ H - b, x0, 1.0, 100.0, 1e-5, max_iterations=999)
    scaled = accelerated_gradient(lambda x: scale * (x @ H - b), x0, scale, 100.0 * scale, 1e-5, max_iterations=999)
    assert scaled.iterations == plain.iterations
    torch.testing.assert_close(scaled.x, plain.x, rtol=0, atol=1e-8)


def test_an_unfinished_solve_says_how_far_it_came():
    H, b, _ = quadratic(1e4)
    with pytest.raises(
        InnerSolverError, match=r"after 30 gradients; kappa = 1e\+04, \|gradient\| = .*asked for 1e-08"
    ) as caught:
        solve_strongly_convex(
            lambda x: 0.5 * x @ H @ x - b @ x, torch.zeros(20, dtype=F64), 1.0, 1e4, 1e-8, max_iterations=30
        )
    assert caught.value.kappa == 1e4 and caught.value.residual > 1e-8


def test_a_gradient_that_is_not_finite_is_an_error_not_an_answer():
    with pytest.raises(InnerSolverError, match="a gradient is not finite"):
        solve_strongly_convex(lambda x: (x.log() * x).sum(), -torch.ones(2, dtype=F64), 1.0, 2.0, 1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mu": 0.0}, "mu must be > 0"),
        ({"mu": -1.0}, "mu must be > 0"),
        ({"L": 0.5}, "L must be >= mu"),
        ({"L": math.inf}, "L must be >= mu and finite"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"x0": torch.zeros(2, dtype=torch.int64)}, "floating dtype, got torch.int64"),
    ],
)
def test_arguments_out_of_range_are_named(changes, words):
    arguments = {"x0": torch.zeros(2), "mu": 1.0, "L": 1.0, "eps": 1e-3, **changes}
    with pytest.raises(ValueError, match=words):
        solve_strongly_convex(lambda x: x.square().sum(), **arguments)


def test_an_objective_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"objective must return shape \(3,\), one a sample, got \(\)"):
        solve_strongly_convex(lambda x: x.square().sum(), torch.zeros(3, 2), 2.0, 2.0, 0.1, per_sample=True)


# Conjugate gradients


def systems(samples=3, size=12, condition=1e3):
    matrices = torch.stack([quadratic(condition, size, seed)[0] for seed in range(samples)])
    return matrices, torch.randn(samples, size, generator=torch.Generator().manual_seed(9), dtype=F64)


@pytest.mark.parametrize("tol", [1.0, 1e-4, 1e-10])
@pytest.mark.parametrize("kappa", [None, 1e3])
def test_the_residual_recomputed_from_scratch_is_within_the_tolerance(tol, kappa):
    A, b = systems()
    found = batched_conjugate_gradient(lambda v: torch.einsum("sij,sj->si", A, v), b, tol, kappa=kappa)
    true = (b - torch.einsum("sij,sj->si", A, found.solution)).norm(dim=1)
    assert bool((true <= tol * (1 + 1e-6)).all())
    assert bool((true <= found.residual_norms * (1 + 1e-9) + 1e-15).all())
    exact = torch.linalg.solve(A, b)
    assert bool(((found.solution - exact).norm(dim=1) <= tol * (1 + 1e-6)).all())  # smallest eigenvalue 1


def test_a_zero_right_hand_side_has_the_solution_zero_and_costs_nothing():
    A, _ = systems()
    found = batched_conjugate_gradient(lambda v: torch.einsum("sij,sj->si", A, v), torch.zeros(3, 12, dtype=F64), 1e-9)
    assert not found.solution.any() and found.products == 0


def test_a_good_start_saves_products_and_its_residual_is_computed():
    A, b = systems()
    matvec = lambda v: torch.einsum("sij,sj->si", A, v)  # noqa: E731
    cold = batched_conjugate_gradient(matvec, b, 1e-6, kappa=1e3)
    warm = batched_conjugate_gradient(matvec, b + 1e-6, 1e-6, kappa=1e3, start=cold.solution)
    assert warm.products < cold.products
    same = batched_conjugate_gradient(matvec, b, 1e-5, kappa=1e3, start=cold.solution)
    assert same.products == 1


def test_negative_curvature_raises():
    A = torch.diag(torch.tensor([1.0, -2.0], dtype=F64))
    with pytest.raises(LinearSolverError, match="positive definite"):
        batched_conjugate_gradient(lambda v: v @ A, torch.ones(1, 2, dtype=F64), 1e-8)


def test_products_that_are_not_finite_and_limits_raise():
    A, b = systems()
    with pytest.raises(LinearSolverError, match="not finite; is the inner objective twice differentiable"):
        batched_conjugate_gradient(lambda v: v * math.nan, b, 1e-8)
    with pytest.raises(LinearSolverError, match="after 2 iterations"):
        batched_conjugate_gradient(lambda v: torch.einsum("sij,sj->si", A, v), b, 1e-8, max_iterations=2)
    with pytest.raises(ValueError, match="tol must be > 0"):
        batched_conjugate_gradient(lambda v: v, b, 0.0)


# Constants


def test_estimates_are_widened_on_the_safe_side_and_known_constants_are_not():
    assert (Known(2.0).lower(), Known(2.0).upper()) == (2.0, 2.0)
    assert (Estimated(2.0, 2.0).lower(), Estimated(2.0, 2.0).upper()) == (1.0, 4.0)
    assert Estimated(lambda v: v["a"], 2.0).upper({"a": torch.tensor(3.0)}) == 6.0
    per_sample = Known(lambda v: torch.ones(3)).lower({})
    assert isinstance(per_sample, torch.Tensor)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [("2", TypeError, "mu must be a number"), (True, TypeError, "mu must be a number"), (-1.0, ValueError, ">= 0"),
     (math.nan, ValueError, ">= 0 and finite")],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_constants_of_another_kind_are_refused(value, error, words):
    with pytest.raises(error, match=words):
        as_constant(value, "LowerLevel", "mu")
    with pytest.raises(ValueError, match="safety must be >= 1"):
        Estimated(1.0, 0.9)
