"""Hessian-vector products against the dense Hessian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config
from torch import nn
from torch.func import functional_call

from wellposed.numerics import flatten, hessian_vector_product, unflatten

MODES = pytest.mark.parametrize("mode", ["reverse", "forward_over_reverse", "finite_difference"])
TOLERANCE = {"reverse": 1e-10, "forward_over_reverse": 1e-10, "finite_difference": 1e-6}


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def problem():
    """A softmax model with 22 parameters: loss as a function of them, the parameters, a direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    names = [name for name, _ in model.named_parameters()]

    def loss(p):
        return F.cross_entropy(functional_call(model, dict(zip(names, p, strict=True)), (x,)), y)

    params = list(model.parameters())
    return loss, params, [torch.randn_like(p) for p in params]


@MODES
def test_equals_the_dense_hessian(mode):
    loss, params, vector = problem()
    dense = torch.autograd.functional.hessian(lambda w: loss(unflatten(w, params)), flatten(params).detach())
    product = flatten(hessian_vector_product(loss, params, vector, mode))
    torch.testing.assert_close(product, dense @ flatten(vector), atol=TOLERANCE[mode], rtol=TOLERANCE[mode])
    assert not product.requires_grad and all(p.grad is None for p in params)


def test_a_loss_tensor_serves_several_products():
    loss, params, vector = problem()
    value = loss(tuple(params))
    for scale in (1.0, -2.0):
        scaled = [scale * v for v in vector]
        product, expected = (hessian_vector_product(term, params, scaled) for term in (value, loss))
        torch.testing.assert_close(flatten(product), flatten(expected))


@MODES
def test_zero_where_the_loss_is_linear_or_does_not_depend(mode):
    a, b, c = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def loss(p):
        return (p[0] ** 3).sum() + 4 * p[1].sum()

    product = hessian_vector_product(loss, [a, b, c], [torch.ones_like(a)] * 3, mode)
    torch.testing.assert_close(product[0], torch.full_like(a, 6.0), atol=1e-6, rtol=0)
    assert [float(part.abs().max()) < 1e-8 for part in product[1:]] == [True, True]
    linear = hessian_vector_product(lambda p: p[0].sum(), [a], [torch.ones_like(a)], mode)
    assert float(linear[0].abs().max()) < 1e-8


@MODES
def test_the_zero_vector_gives_zero(mode):
    loss, params, _ = problem()
    product = hessian_vector_product(loss, params, [torch.zeros_like(p) for p in params], mode)
    assert float(flatten(product).abs().max()) == 0.0


def test_error_of_the_central_difference_is_of_second_order():
    loss, params, vector = problem()
    exact = flatten(hessian_vector_product(loss, params, vector))
    errors = [
        float((flatten(hessian_vector_product(loss, params, vector, "finite_difference", step=r)) - exact).norm())
        for r in (2e-2, 1e-2)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_float32_parameters_keep_their_dtype():
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    product = hessian_vector_product(lambda p: (p[0] ** 3).sum(), [theta], [torch.ones(2)], "finite_difference")
    assert product[0].dtype == torch.float32
    torch.testing.assert_close(product[0], torch.tensor([6.0, 12.0]), atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_explained():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="mode must be .* got 'dense'"):
        hessian_vector_product(lambda p: p[0].sum(), [theta], [theta], "dense")
    with pytest.raises(ValueError, match="needs loss as a function of params, got a tensor"):
        hessian_vector_product(theta.sum(), [theta], [theta], "finite_difference")
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(2,\)"):
        hessian_vector_product(lambda p: p[0] ** 2, [theta], [theta])
    with pytest.raises(ValueError, match=r"vector must have the shapes of params \[\(2,\)\], got \[\(3,\)\]"):
        hessian_vector_product(lambda p: p[0].sum(), [theta], [torch.ones(3)])
