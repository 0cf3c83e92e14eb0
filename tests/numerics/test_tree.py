"""A list of tensors seen as one vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wellposed.numerics import flatten, global_norm, inner_product, unflatten

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=5)


def tensors(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(SHAPES)
@settings(deadline=None, max_examples=50)
def test_unflatten_is_the_inverse_of_flatten(shapes):
    parts = tensors(shapes)
    back = unflatten(flatten(parts), parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


@given(SHAPES, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
@settings(deadline=None, max_examples=50)
def test_norm_and_inner_product_are_those_of_the_vector(shapes, dtype):
    left, right = tensors(shapes, dtype), tensors(shapes, dtype, seed=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm, product = global_norm(left), inner_product(left, right)
    assert norm.dtype == product.dtype == wide
    a, b = flatten(left).double(), flatten(right).double()
    torch.testing.assert_close(norm.double(), a.norm(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(product.double(), a @ b, rtol=1e-4, atol=1e-5)


def test_half_precision_does_not_overflow():
    large = torch.full((4,), 300.0, dtype=torch.float16)  # 300 ** 2 is infinite in float16
    assert float(global_norm([large])) == 600.0
    assert float(inner_product([large], [large])) == 360_000.0


def test_mixed_dtypes_and_nothing_at_all():
    assert float(global_norm([torch.full((1,), 3.0, dtype=torch.bfloat16), torch.full((1,), 4.0)])) == 5.0
    assert float(global_norm([])) == float(inner_product([], [])) == 0.0


def test_flatten_and_inner_product_are_differentiable():
    parts = [part.requires_grad_() for part in tensors([(2, 2), (), (3,)])]
    assert torch.autograd.gradcheck(lambda *p: flatten(p), parts)
    assert torch.autograd.gradcheck(lambda *p: inner_product(p, p), parts)


def test_lengths_and_shapes_must_agree():
    with pytest.raises(ValueError, match=r"unflatten: vector must have shape \(4,\), got \(5,\)"):
        unflatten(torch.zeros(5), [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match=r"inner_product: shapes must agree, got \(2,\) and \(1,\)"):
        inner_product([torch.zeros(2)], [torch.zeros(1)])
