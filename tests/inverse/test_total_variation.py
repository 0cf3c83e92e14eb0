"""Smoothed total variation against autograd, its adjoint, and its Lipschitz constant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wellposed.inverse import (
    TotalVariationCurvature,
    finite_differences,
    negative_divergence,
    smoothed_total_variation,
    smoothed_total_variation_gradient,
)

F64 = torch.float64
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def draw(shape, seed, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999))
def test_divergence_is_the_adjoint_of_the_differences(shape, seed):
    x, p, q = draw(shape, seed), draw(shape, seed + 1), draw(shape, seed + 2)
    across, down = finite_differences(x)
    torch.testing.assert_close((across * p + down * q).sum(), (x * negative_divergence(p, q)).sum())
    assert not across[..., -1].any() and not down[..., -1, :].any()


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), smoothing=st.sampled_from([1e-3, 0.1, 2.0]))
def test_all_derivatives_are_autograd_s(shape, seed, smoothing):
    x, v = draw(shape, seed).requires_grad_(), draw(shape, seed + 1)
    eta = torch.tensor(smoothing, dtype=F64, requires_grad=True)
    value = smoothed_total_variation(x, eta)
    assert value.shape == shape[:1]
    slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    hvp, mixed = torch.autograd.grad(slope, (x, eta), v, materialize_grads=True, allow_unused=True)
    curvature = TotalVariationCurvature(x.detach(), smoothing)
    torch.testing.assert_close(curvature.gradient, slope.detach())
    torch.testing.assert_close(smoothed_total_variation_gradient(x.detach(), smoothing), slope.detach())
    torch.testing.assert_close(curvature.hvp(v), hvp, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(curvature.smoothing_vjp(v).sum(), mixed, rtol=1e-6, atol=1e-9)


def test_the_hessian_is_positive_and_below_eight_over_the_smoothing():
    x = draw((7, 7), 0)
    curvature = TotalVariationCurvature(x, 0.3)
    H = torch.stack([curvature.hvp(row.reshape(7, 7)).reshape(-1) for row in torch.eye(49, dtype=F64)])
    spectrum = torch.linalg.eigvalsh(H)
    torch.testing.assert_close(H, H.T)
    assert float(spectrum[0]) > -1e-12 and float(spectrum[-1]) <= 8 / 0.3


def test_constants_cost_only_their_smoothing_and_edges_cost_their_height():
    flat = torch.full((5, 4), 0.7, dtype=F64)
    assert float(smoothed_total_variation(flat, 0.1)) == pytest.approx(20 * 0.1)
    step = torch.zeros(5, 4, dtype=F64)
    step[:, 2:] = 3.0
    assert float(smoothed_total_variation(step, 1e-9)) == pytest.approx(15.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    x = draw((2, 3, 4), 0, dtype)
    assert smoothed_total_variation_gradient(x, 0.1).dtype == dtype
    assert smoothed_total_variation(x, torch.tensor(0.1)).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_it_runs_on_an_accelerator():
    x = draw((2, 5, 5), 0)
    there = smoothed_total_variation_gradient(x.cuda(), 0.1).cpu()
    torch.testing.assert_close(there, smoothed_total_variation_gradient(x, 0.1))
