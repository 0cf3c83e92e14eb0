"""Projection onto the simplex: against its definition, a root finder, and its own gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from wellposed.numerics import project_to_simplex

VECTORS = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=1, max_size=12)


@given(VECTORS, st.floats(1e-2, 100))
@settings(deadline=None, max_examples=100)
def test_equals_the_root_of_the_dual(values, radius):
    v = np.array(values)
    tau = brentq(lambda t: np.maximum(v - t, 0).sum() - radius, v.min() - radius - 1, v.max() + 1, xtol=1e-13)
    projected = project_to_simplex(torch.tensor(values, dtype=torch.float64), radius)
    np.testing.assert_allclose(projected.numpy(), np.maximum(v - tau, 0), atol=1e-10)


@given(VECTORS)
@settings(deadline=None, max_examples=50)
def test_lies_on_the_simplex_and_is_idempotent(values):
    projected = project_to_simplex(torch.tensor(values, dtype=torch.float64))
    assert bool((projected >= 0).all()) and float(projected.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(project_to_simplex(projected), projected, atol=1e-12, rtol=0)


def test_no_point_of_the_simplex_is_nearer():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, generator=generator, dtype=torch.float64)
    distance = (project_to_simplex(v) - v).norm()
    gamma = -torch.rand(2000, 6, generator=generator, dtype=torch.float64).log()
    assert bool(((gamma / gamma.sum(1, keepdim=True) - v).norm(dim=1) >= distance).all())


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_batches_along_any_dimension(dim):
    v = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    rows = v.movedim(dim, -1).reshape(-1, v.shape[dim])
    expected = torch.stack([project_to_simplex(row) for row in rows])
    expected = expected.reshape(v.movedim(dim, -1).shape).movedim(-1, dim)
    torch.testing.assert_close(project_to_simplex(v, dim=dim), expected)


def test_ties_share_and_large_numbers_keep_their_digits():
    assert project_to_simplex(torch.full((4,), 7.0)).tolist() == [0.25] * 4
    assert project_to_simplex(torch.tensor([1e8, 1e8, 0.0])).tolist() == [0.5, 0.5, 0.0]


def test_gradient_matches_finite_differences():
    v = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(project_to_simplex, (v, 1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    v = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    projected = project_to_simplex(v, radius=100.0)
    assert projected.dtype == dtype
    torch.testing.assert_close(projected, project_to_simplex(v.float(), radius=100.0).to(dtype))


def test_bad_arguments_are_explained():
    for radius in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="project_to_simplex: radius must be > 0 and finite"):
            project_to_simplex(torch.zeros(2), radius)
    with pytest.raises(ValueError, match="v must have entries along dim -1"):
        project_to_simplex(torch.zeros(3, 0))
