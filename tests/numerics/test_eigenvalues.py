"""Lanczos and power iteration against dense eigenvalues and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config

from wellposed.numerics import lanczos, power_iteration


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def symmetric(size, seed=0):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(size=st.integers(1, 25), seed=st.integers(0, 100), share=st.floats(0.1, 1))
@settings(deadline=None, max_examples=40)
def test_basis_is_orthonormal_and_tridiagonalises(size, seed, share):
    matrix, steps = symmetric(size, seed), max(1, int(share * size))
    result = lanczos(lambda v: matrix @ v, size, steps, seeded(seed), dtype=torch.float64)
    k = len(result.diagonal)
    assert result.basis.shape == (size, k) and len(result.off_diagonal) == k - 1
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(result.basis.T @ result.basis, identity, atol=1e-10, rtol=0)
    t = torch.diag(result.diagonal) + torch.diag(result.off_diagonal, 1) + torch.diag(result.off_diagonal, -1)
    torch.testing.assert_close(result.basis.T @ matrix @ result.basis, t, atol=1e-9, rtol=0)
    spectrum = torch.linalg.eigvalsh(matrix)
    ritz = result.ritz()[0]
    assert float(ritz[0]) >= float(spectrum[0]) - 1e-9 and float(ritz[-1]) <= float(spectrum[-1]) + 1e-9


def test_all_steps_give_all_eigenpairs():
    matrix = symmetric(12)
    values, vectors = lanczos(lambda v: matrix @ v, 12, 12, seeded(), dtype=torch.float64).ritz()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), atol=1e-9, rtol=0)
    torch.testing.assert_close(matrix @ vectors, vectors * values, atol=1e-8, rtol=0)


def test_extreme_ritz_values_equal_those_of_scipy():
    matrix = symmetric(200)
    ritz = lanczos(lambda v: matrix @ v, 200, 80, seeded(), dtype=torch.float64).ritz()[0]
    reference = scipy.sparse.linalg.eigsh(matrix.numpy(), k=4, which="BE", return_eigenvectors=False)
    np.testing.assert_allclose(ritz[[0, -1]].numpy(), np.sort(reference)[[0, -1]], rtol=1e-6)


def test_without_reorthogonalisation_the_basis_degrades():
    eigenvalues = torch.logspace(0, 4, 100)
    with_it, without = (
        lanczos(lambda v: eigenvalues * v, 100, 60, seeded(), reorthogonalize=again).basis for again in (True, False)
    )
    errors = [float((v.T @ v - torch.eye(v.shape[1])).abs().max()) for v in (with_it, without)]
    assert errors[0] < 1e-5 < 1e-1 < errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stops_when_the_subspace_is_invariant(dtype):
    eigenvalues = torch.tensor([1.0, 2.0, 5.0], dtype=dtype).repeat(5)
    result = lanczos(lambda v: eigenvalues * v, 15, 10, seeded(), dtype=dtype)
    torch.testing.assert_close(result.ritz()[0], torch.tensor([1.0, 2.0, 5.0], dtype=dtype), atol=1e-5, rtol=0)
    zero = lanczos(lambda v: 0 * v, 15, 10, seeded(), dtype=dtype)
    assert zero.diagonal.tolist() == [0.0]


def test_the_generator_and_the_start_decide_everything():
    matrix = symmetric(10)
    first, again = (lanczos(lambda v: matrix @ v, 10, 4, seeded(7), dtype=torch.float64) for _ in range(2))
    assert torch.equal(first.basis, again.basis)
    given_start = lanczos(lambda v: matrix @ v, 10, 4, start=3 * first.basis[:, 0])
    torch.testing.assert_close(given_start.diagonal, first.diagonal)


@given(size=st.integers(2, 15), seed=st.integers(0, 100), sign=st.sampled_from([-1.0, 1.0]))
@settings(deadline=None, max_examples=40)
def test_power_iteration_finds_the_largest_magnitude(size, seed, sign):
    basis, _ = torch.linalg.qr(symmetric(size, seed))
    eigenvalues = torch.linspace(-1, 1, size, dtype=torch.float64)
    eigenvalues[0] = sign * 3
    matrix = (basis * eigenvalues) @ basis.T
    result = power_iteration(
        lambda v: matrix @ v, size, seeded(seed), tol=1e-9, max_iterations=500, dtype=torch.float64
    )
    assert result.converged and float(result.eigenvalue) == pytest.approx(sign * 3, abs=1e-7)
    assert float(result.eigenvector.norm()) == pytest.approx(1)
    torch.testing.assert_close(matrix @ result.eigenvector, 3 * sign * result.eigenvector, atol=1e-7, rtol=0)


def test_some_eigenvalue_lies_within_the_residual_even_before_convergence():
    matrix = symmetric(50)
    result = power_iteration(lambda v: matrix @ v, 50, seeded(), max_iterations=5, dtype=torch.float64)
    assert not result.converged and result.iterations == 5
    distance = (torch.linalg.eigvalsh(matrix) - result.eigenvalue).abs().min()
    assert float(distance) <= result.residual


def test_power_iteration_warm_start_and_zero_operator():
    matrix = symmetric(20)
    vector = torch.linalg.eigh(matrix).eigenvectors[:, torch.linalg.eigvalsh(matrix).abs().argmax()]
    assert power_iteration(lambda v: matrix @ v, 20, start=vector, tol=1e-8).iterations == 1
    zero = power_iteration(lambda v: 0 * v, 3, seeded())
    assert zero.converged and float(zero.eigenvalue) == 0.0


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match=r"lanczos: steps must lie in \[1, dim = 3\], got 4"):
        lanczos(lambda v: v, 3, 4)
    with pytest.raises(ValueError, match=r"lanczos: start must have shape \(3,\), got \(2,\)"):
        lanczos(lambda v: v, 3, 2, start=torch.ones(2))
    with pytest.raises(ValueError, match="power_iteration: start must not be zero or NaN"):
        power_iteration(lambda v: v, 3, start=torch.zeros(3))
    with pytest.raises(ValueError, match="power_iteration: max_iterations must be >= 1, got 0"):
        power_iteration(lambda v: v, 3, max_iterations=0)
    with pytest.raises(ValueError, match="power_iteration: tol must be >= 0, got -1.0"):
        power_iteration(lambda v: v, 3, tol=-1.0)
