"""Conjugate gradients against dense and SciPy solutions, and what they say when they fail."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from wellposed.numerics import conjugate_gradient


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def system(size, seed=0, condition=100.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, float(np.log10(condition)), size, dtype=torch.float64)
    matrix = (basis * eigenvalues) @ basis.T
    return matrix.to(dtype), torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


@given(size=st.integers(1, 20), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_solves_to_the_tolerance_on_the_true_residual(size, seed):
    matrix, b = system(size, seed)
    result = conjugate_gradient(lambda v: matrix @ v, b, tol=1e-10)
    assert result.converged and result.status == "converged"
    assert float((b - matrix @ result.solution).norm()) <= 1e-10 * float(b.norm()) * (1 + 1e-6)
    assert len(result.residual_norms) == result.iterations + 1
    torch.testing.assert_close(result.solution, torch.linalg.solve(matrix, b), atol=1e-8, rtol=1e-7)


def test_iterates_equal_those_of_scipy():
    matrix, b = system(30)
    ours = conjugate_gradient(lambda v: matrix @ v, b, tol=0.0, max_iterations=7)
    theirs, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=0.0, maxiter=7)
    assert ours.status == "max_iterations" and ours.iterations == 7
    np.testing.assert_allclose(ours.solution.numpy(), theirs, rtol=1e-8)


def test_ends_after_as_many_steps_as_there_are_distinct_eigenvalues():
    eigenvalues = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).repeat(10)
    result = conjugate_gradient(lambda v: eigenvalues * v, torch.ones(30, dtype=torch.float64), tol=1e-12)
    assert result.converged and result.iterations == 3


def test_the_exact_inverse_as_preconditioner_needs_one_step():
    matrix, b = system(20, condition=1e4)
    inverse = torch.linalg.inv(matrix)
    result = conjugate_gradient(lambda v: matrix @ v, b, tol=1e-8, preconditioner=lambda r: inverse @ r)
    assert result.converged and result.iterations == 1
    diagonal = torch.logspace(0, 6, 50, dtype=torch.float64)
    plain, scaled = (
        conjugate_gradient(lambda v: diagonal * v, torch.ones_like(diagonal), tol=1e-8, preconditioner=p)
        for p in (None, lambda r: r / diagonal)
    )
    assert scaled.iterations == 1 < plain.iterations


def test_a_warm_start_at_the_solution_takes_no_step():
    matrix, b = system(10)
    start = torch.linalg.solve(matrix, b)
    kept = start.clone()
    result = conjugate_gradient(lambda v: matrix @ v, b, tol=1e-8, start=start)
    assert result.converged and result.iterations == 0 and torch.equal(start, kept)


def test_zero_right_hand_side_has_the_zero_solution():
    result = conjugate_gradient(lambda v: 2 * v, torch.zeros(4))
    assert result.converged and result.iterations == 0 and not result.solution.any()


def test_any_shape_and_an_absolute_tolerance():
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    b = torch.ones(3, 4, dtype=torch.float64)
    result = conjugate_gradient(lambda v: weights * v, b, tol=0.0, absolute_tol=1e-3)
    assert result.converged and 0 < result.residual_norms[-1] <= 1e-3
    torch.testing.assert_close(result.solution, b / weights, atol=1e-3, rtol=0)


def test_convergence_is_never_claimed_on_the_recurrence_alone():
    # In float32 the recurrence reaches 1e-10; the true residual cannot.
    matrix, b = system(40, condition=1e5, dtype=torch.float32)
    result = conjugate_gradient(lambda v: matrix @ v, b, tol=1e-10, max_iterations=300)
    assert not result.converged and result.status == "max_iterations"
    loose = conjugate_gradient(lambda v: matrix @ v, b, tol=1e-2)
    assert loose.converged and loose.residual_norms[-1] == pytest.approx(float((b - matrix @ loose.solution).norm()))


def test_an_indefinite_or_broken_operator_is_named():
    signs = torch.tensor([1.0, -1.0])
    indefinite = conjugate_gradient(lambda v: signs * v, torch.tensor([1.0, 2.0]))
    assert indefinite.status == "indefinite" and not indefinite.solution.any()
    assert conjugate_gradient(lambda v: v * float("nan"), torch.ones(2)).status == "not_finite"
    assert conjugate_gradient(lambda v: v, torch.tensor([float("inf")])).status == "not_finite"


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="tol and absolute_tol must be >= 0, got -1.0 and 0.0"):
        conjugate_gradient(lambda v: v, torch.ones(2), tol=-1.0)
    with pytest.raises(ValueError, match="max_iterations must be >= 0, got -2"):
        conjugate_gradient(lambda v: v, torch.ones(2), max_iterations=-2)
    with pytest.raises(ValueError, match=r"start must have b's shape \(2,\), got \(3,\)"):
        conjugate_gradient(lambda v: v, torch.ones(2), start=torch.ones(3))
