"""The functions of the weight compander against closed forms, SciPy, finite differences, and each other."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from wellposed.numerics import hessian_vector_product, per_example_gradients
from wellposed.weights import Compander, compand, compander_bound, compander_slope, uncompand
from wellposed.weights.compander_functions import COMPANDER_FUNCTIONS, shrunk_

F64 = torch.float64
INVERSES = {
    "arctan": np.tan,
    "arsinh": np.sinh,
    "erf": scipy.special.erfinv,
    "tanh": np.arctanh,
    "linear": lambda u: u,
}
SCALES = [(0.7, 0.7), (1.0, 0.6), (0.2, 3.0)]
every_function = pytest.mark.parametrize("fn", COMPANDER_FUNCTIONS)


def inside(fn, a, share=0.99, count=401, dtype=F64):
    limit = compander_bound(a, fn)
    return share * (limit if math.isfinite(limit) else 5.0) * torch.linspace(-1, 1, count, dtype=dtype)


@every_function
@pytest.mark.parametrize(("a", "b"), SCALES)
def test_the_inverse_is_that_of_scipy_and_numpy_and_comes_back(fn, a, b):
    w = inside(fn, a)
    v = uncompand(w, a, b, fn)
    np.testing.assert_allclose(v.numpy(), b * INVERSES[fn](w.numpy() / a), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(compand(v, a, b, fn), w, rtol=1e-12, atol=0)
    single = inside(fn, a, 0.9, dtype=torch.float32)
    torch.testing.assert_close(compand(uncompand(single, a, b, fn), a, b, fn), single, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fn", ["arctan", "erf", "tanh"])
def test_the_bound_holds_for_huge_numbers_and_their_gradient_is_zero_not_nan(fn):
    v = torch.tensor([1e30, -1e30, 1e20, -3e25], requires_grad=True)
    w = compand(v, 0.7, 0.5, fn)
    assert (w.abs() <= compander_bound(0.7, fn) * (1 + 1e-6)).all()
    (first,) = torch.autograd.grad(w.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    assert torch.equal(first, torch.zeros(4)) and torch.equal(second.abs(), torch.zeros(4))


def test_the_gradient_of_arctan_is_the_squared_cosine_of_the_weight():
    v = torch.linspace(-6, 6, 201, dtype=F64, requires_grad=True)
    w = compand(v, 0.8, 0.5)
    upstream = torch.randn(201, dtype=F64, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(w, v, upstream)
    torch.testing.assert_close(found, upstream * (0.8 / 0.5) * torch.cos(w / 0.8).square(), rtol=1e-10, atol=1e-12)


@every_function
def test_the_slope_at_zero_is_a_over_b(fn):
    expected = 0.8 / 0.5 * (2 / math.sqrt(math.pi) if fn == "erf" else 1.0)
    assert float(compander_slope(torch.zeros(1, dtype=F64), 0.8, 0.5, fn)) == pytest.approx(expected, rel=1e-14)


@every_function
@pytest.mark.parametrize("tensors", [False, True])
def test_first_second_and_forward_derivatives_match_finite_differences(fn, tensors):
    v = (3 * torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    a, b = (torch.tensor(s, dtype=F64, requires_grad=True) for s in (0.7, 0.9))
    if tensors:
        arguments, run = (v, a, b), lambda v, a, b: compand(v, a, b, fn)
    else:
        arguments, run = (v,), lambda v: compand(v, 0.7, 0.9, fn)
    assert gradcheck(run, arguments, check_forward_ad=True)
    # Through a nonlinear function, so that second derivatives exist for the linear compander as well.
    assert gradgradcheck(lambda *args: run(*args).exp(), arguments)


def test_derivatives_in_the_scales_are_those_of_the_paper():
    v = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(2)) * 2
    a, b = (torch.tensor(s, dtype=F64, requires_grad=True) for s in (0.5, 1.3))
    upstream = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(3))
    of_a, of_b = torch.autograd.grad(compand(v, a, b), (a, b), upstream)
    torch.testing.assert_close(of_a, (upstream * torch.atan(v / b)).sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(of_b, (upstream * (-a * v / (b**2 + v**2))).sum(), rtol=1e-10, atol=0)


@every_function
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6), st.sampled_from(SCALES))
def test_every_function_is_odd_and_increasing(fn, values, scales):
    v = torch.tensor(values).sort().values
    w = compand(v, *scales, fn)
    assert torch.equal(compand(-v, *scales, fn), -w)
    assert (w.diff() >= 0).all()
    far = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    assert (compand(far, *scales, fn).diff() > 0).all()


@every_function
@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_shape_and_dtype_are_kept(fn, dtype, shape):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    w = compand(v, 0.7, 0.5, fn)
    w.sum().backward()
    assert (w.dtype, w.shape, v.grad.dtype) == (dtype, v.shape, dtype)
    assert compander_slope(v.detach(), 0.7, 0.5, fn).shape == v.shape
    exact = compand(v.detach().double(), 0.7, 0.5, fn)
    torch.testing.assert_close(w.detach().double(), exact, rtol=torch.finfo(dtype).eps * 4, atol=1e-7)


def naive(v):
    return 0.7 * torch.atan(v / 0.9)


def kept_bytes(function, v):
    """Bytes that the graph holds and that are not those of v."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(v)
    storages.pop(v.untyped_storage().data_ptr(), None)
    return sum(storages.values()), result


def test_the_graph_keeps_nothing_but_v():
    v = torch.randn(1000, requires_grad=True)
    assert kept_bytes(lambda v: compand(v, 0.7, 0.9), v)[0] == 0
    assert kept_bytes(naive, v)[0] == 4000
    a, b = (torch.tensor(s, requires_grad=True) for s in (0.7, 0.9))
    # With a learned the weight itself is kept, which a layer keeps anyway.
    bytes_, w = kept_bytes(lambda v: compand(v, a, b), v)
    assert bytes_ == 4000 + 8 and w.untyped_storage().nbytes() == 4000
    assert kept_bytes(lambda v: a * torch.atan(v / b), v)[0] >= 8000


def test_weights_out_of_range_are_refused_where_a_tangent_would_wrap_around():
    assert float(0.5 * torch.atan(torch.tan(torch.tensor(1.0 / 0.5)))) == pytest.approx(-0.571, abs=1e-3)
    with pytest.raises(ValueError, match=r"\|w\| must be < 0.785398 = bound of arctan with a = 0.5, got max \|w\| = 1"):
        uncompand(torch.tensor([1.0]), a=0.5)
    with pytest.raises(ValueError, match="got max .w. = nan"):
        uncompand(torch.tensor([float("nan")]))


@every_function
@pytest.mark.parametrize("factor", [1.0, 0.999, 0.5, 0.0])
def test_shrinking_scales_the_weight_and_never_flips_its_sign_not_even_at_saturation(fn, factor):
    v = torch.tensor([-1e20, -40.0, -0.3, 0.0, 0.02, 1.0, 40.0, 1e20])
    w = compand(v, 0.7, 0.6, fn)
    moved = compand(shrunk_(v.clone(), factor, 0.7, 0.6, fn), 0.7, 0.6, fn)
    torch.testing.assert_close(moved, factor * w, rtol=5e-5 if fn == "arsinh" else 3e-6, atol=1e-7)


def test_vectorised_and_forward_mode_transforms_agree_with_the_naive_formula():
    class Naive(nn.Module):
        def forward(self, v):
            return naive(v)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    models = []
    for part in (Compander(0.7, 0.9), Naive()):
        model = copy.deepcopy(plain)
        for layer in (model[0], model[2]):
            parametrize.register_parametrization(layer, "weight", copy.deepcopy(part))
        models.append(model)
    models[1].load_state_dict({k: v for k, v in models[0].state_dict().items() if "extra" not in k})
    ours, theirs = (per_example_gradients(m, lambda o, t: (o - t).square().sum(), x, y) for m in models)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-12)

    def product(model, mode):
        names, values = zip(*model.named_parameters(), strict=True)

        def loss(parameters):
            return (
                (torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,)) - y).square().sum()
            )

        return hessian_vector_product(loss, values, [torch.ones_like(p) for p in values], mode)

    expected = product(models[1], "reverse")
    for mode in ("reverse", "forward_over_reverse"):
        for found, wanted in zip(product(models[0], mode), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


COMPILED = """
import torch
from torch import nn
from wellposed.weights import apply_compander
for fn in ("arctan", "arsinh", "erf", "tanh", "linear"):
    for learnable in ("no", "layer"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        apply_compander(model, fn=fn, learnable=learnable)
        x = torch.randn(4, 3)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_a_compiler_traces_a_companded_model_as_one_graph():
    # In a process of its own: the type checker of the tests cannot be traced.
    assert subprocess.run([sys.executable, "-c", COMPILED]).returncode == 0


# ── what the compander is biased to: fact 2 of mirror descent ─────────────────────────────────────────────────────────
def interpolators(draw):
    """An underdetermined regression whose minimum-L2 solution reaches 0.9 of the bound; a = 0.15."""
    generator = np.random.default_rng(draw)
    matrix = generator.standard_normal((4, 12))
    bound = 0.15 * math.pi / 2
    least = np.linalg.pinv(matrix) @ generator.standard_normal(4)
    least *= 0.9 * bound / np.abs(least).max()
    return matrix, matrix @ least, least


def potential(w, a, b):
    return b**2 * (np.tan(w / a) ** 2 / 6 - 2 / 3 * np.log(np.cos(w / a)))


def least_potential(matrix, target, start, a, b):
    edge = 0.999 * a * math.pi / 2
    found = scipy.optimize.minimize(
        lambda w: potential(w, a, b).sum() / b**2,
        start,
        jac=lambda w: (np.tan(w / a) / np.cos(w / a) ** 2 / 3 + 2 / 3 * np.tan(w / a)) / a,
        constraints={"type": "eq", "fun": lambda w: matrix @ w - target, "jac": lambda w: matrix},
        bounds=[(-edge, edge)] * len(start),
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    assert found.success
    return found.x


def descend(matrix, target, a, b, share):
    """Gradient descent on v from 0, with step = share (b/a)^2 / largest eigenvalue, to a residual of 1e-10."""
    m, y = torch.from_numpy(matrix), torch.from_numpy(target)
    step = share * (b / a) ** 2 / float(torch.linalg.eigvalsh(m @ m.T)[-1])
    v = torch.zeros(m.shape[1], dtype=F64)
    for number in range(80_000):
        residual = m @ (a * torch.atan(v / b)) - y
        if number % 100 == 0 and float(residual.abs().max()) < 1e-10:
            return compand(v, a, b).numpy()
        v -= step * (m.T @ residual) * (a * b / (b * b + v * v))
    raise AssertionError("gradient descent did not reach the residual")


def test_the_second_derivative_of_the_potential_is_the_inverse_of_the_squared_slope():
    w = np.linspace(-0.2, 0.2, 41)
    h = 1e-4
    second = (potential(w + h, 0.15, 0.3) - 2 * potential(w, 0.15, 0.3) + potential(w - h, 0.15, 0.3)) / h**2
    slope = compander_slope(uncompand(torch.from_numpy(w), 0.15, 0.3), 0.15, 0.3).numpy()
    np.testing.assert_allclose(second, 1 / slope**2, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [0, 1])
def test_gradient_descent_finds_the_interpolator_of_least_potential_and_not_of_least_norm(draw):
    matrix, target, least = interpolators(draw)
    wanted = least_potential(matrix, target, least, 0.15, 0.15)
    found = {share: descend(matrix, target, 0.15, 0.15, share) for share in (0.5, 0.05)}
    distance = {share: np.abs(w - wanted).max() for share, w in found.items()}
    assert distance[0.05] < 2e-4
    assert np.abs(found[0.05] - least).max() > 2e-2
    assert distance[0.5] / distance[0.05] == pytest.approx(10, rel=0.35)
    limits = [descend(matrix, target, 0.15, b, 0.05) for b in (0.1, 0.3)]
    np.testing.assert_allclose(limits[0], limits[1], rtol=0, atol=1e-6)
