"""The rules that correct g by s: closed forms, projections, limits, and what their first order is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import nn

from wellposed.gradients.gradient_rules import PLAIN_AT_ZERO, RULES, agreement, regularized_gradient


@pytest.fixture
def unchecked():
    """Wrong values on purpose: without the tests' own type checks."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def pair(seed, dtype=torch.float64, shapes=((3, 2), (4,), ())):
    generator = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(2))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def pcgrad(g, s):
    """The projection of one task's gradient against another's (Yu et al. 2020, Algorithm 1), on vectors."""
    return g - torch.dot(g, s) / torch.dot(s, s) * s if torch.dot(g, s) < 0 else g


# ── agreement ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_agreement_is_that_of_the_flat_vectors():
    g, s = pair(0)
    found, a, b = agreement(g, s), flat(g), flat(s)
    torch.testing.assert_close(found.dot, a @ b)
    torch.testing.assert_close(found.norm, a.norm())
    torch.testing.assert_close(found.sharp_norm, b.norm())
    torch.testing.assert_close(found.cosine, torch.cosine_similarity(a, b, dim=0))
    each = agreement(g, s, "tensor")
    assert each.dot.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(each.dot[i], (g[i] * s[i]).sum())


def test_inner_products_of_half_precision_do_not_overflow():
    g = [torch.full((1000,), 300.0, dtype=torch.float16)]
    assert float(agreement(g, g).dot) == pytest.approx(9e7, rel=1e-3) and float(
        agreement(g, g).cosine
    ) == pytest.approx(1)


def test_a_zero_or_infinite_reference_is_not_usable():
    g = [torch.ones(2)]
    assert bool(agreement(g, g).usable)
    for bad in (0.0, math.inf, math.nan):
        assert not bool(agreement(g, [torch.full((2,), bad)]).usable)


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("seed", range(20))
def test_project_is_pcgrads_projection_and_leaves_no_conflict(seed):
    g, s = pair(seed)
    made, a, b = flat(regularized_gradient(g, s, "project", 1.0)), flat(g), flat(s)
    torch.testing.assert_close(made, pcgrad(a, b), rtol=0, atol=1e-9)
    assert float(made @ b) >= -1e-9 * float(a.norm() * b.norm())
    if float(a @ b) >= 0:
        assert torch.equal(made, a)


def test_project_needs_negative_curvature_along_the_gradient():
    """H = diag(-1), w = 1, rho = 1.5: g = -1, s = 0.5, and the projection is 0; with rho < 1 there is no conflict."""
    assert regularized_gradient([torch.tensor([-1.0])], [torch.tensor([0.5])], "project", 1.0)[0].item() == 0
    assert regularized_gradient([torch.tensor([-1.0])], [torch.tensor([0.5])], "project", 0.5)[0].item() == -0.5
    assert regularized_gradient([torch.tensor([-1.0])], [torch.tensor([-0.5])], "project", 1.0)[0].item() == -1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rho", [0.05, 5.0])
def test_on_convex_quadratics_the_reference_agrees_and_project_is_the_identity(seed, rho):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    w = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(0.5 * w @ hessian @ w, w)
    moved = (w + rho * g / g.norm()).detach().requires_grad_()
    (s,) = torch.autograd.grad(0.5 * moved @ hessian @ moved, moved)
    torch.testing.assert_close(s, g + rho * hessian @ g / g.norm(), rtol=1e-12, atol=1e-12)
    assert float(g @ s) > 0
    assert torch.equal(regularized_gradient([g], [s], "project", 1.0)[0], g)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(8))
def test_steer_keeps_the_length_and_turns_towards_the_reference(seed, lam):
    g, s = pair(seed)
    made, a, b = flat(regularized_gradient(g, s, "steer", lam)), flat(g), flat(s)
    assert float(made.norm()) == pytest.approx(float(a.norm()), rel=1e-9)
    d = (1 - lam) * a / a.norm() + lam * b / b.norm()
    torch.testing.assert_close(made, a.norm() * d / d.norm(), rtol=1e-9, atol=1e-9)
    cosine = [float(torch.cosine_similarity(v, b, dim=0)) for v in (made, a)]
    assert cosine[0] >= cosine[1]


def test_steer_between_opposite_gradients_keeps_its_own():
    g = [torch.tensor([3.0, -4.0])]
    assert torch.equal(regularized_gradient(g, [-2 * g[0]], "steer", 0.5)[0], g[0])


@pytest.mark.parametrize("seed", range(5))
def test_gsam_takes_a_part_of_what_is_orthogonal_away(seed):
    g, s = pair(seed)
    made, a, b = flat(regularized_gradient(g, s, "gsam", 0.3)), flat(g), flat(s)
    across = a - (a @ b) / (b @ b) * b
    torch.testing.assert_close(made, b - 0.3 * across, rtol=1e-10, atol=1e-10)


def test_sagm_at_radius_rho_is_mix_with_a_half():
    g, s = pair(1)
    for a, b, c, d in zip(
        regularized_gradient(g, s, "sagm", 0.9), regularized_gradient(g, s, "mix", 0.5), g, s, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(a, (c + d) / 2, rtol=0, atol=1e-12)


def test_the_ends_of_lam():
    g, s = pair(2)
    for rule in PLAIN_AT_ZERO:
        torch.testing.assert_close(flat(regularized_gradient(g, s, rule, 0.0)), flat(g), rtol=1e-14, atol=1e-14)
    for rule, lam in (("mix", 1.0), ("gsam", 0.0), ("sam", 0.3)):
        torch.testing.assert_close(flat(regularized_gradient(g, s, rule, lam)), flat(s), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("rule", ["project", "mix", "sam"])
def test_equal_gradients_stay_bit_for_bit(rule, lam):
    g, _ = pair(3, torch.float32)
    made = regularized_gradient(g, [t.clone() for t in g], rule, lam)
    assert all(torch.equal(a, b) for a, b in zip(made, g, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_scope_tensor_is_the_rule_on_each_tensor(rule):
    g, s = pair(4)
    made = regularized_gradient(g, s, rule, 0.4, "tensor")
    for whole, a, b in zip(made, g, s, strict=True):
        torch.testing.assert_close(whole, regularized_gradient([a], [b], rule, 0.4)[0], rtol=1e-12, atol=1e-12)
    if rule in ("project", "steer", "gsam"):
        assert not torch.allclose(flat(made), flat(regularized_gradient(g, s, rule, 0.4)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), rule=st.sampled_from(RULES), lam=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scope=st.sampled_from(["global", "tensor"]),
)  # fmt: skip
def test_results_have_the_shapes_and_dtypes_of_g_and_leave_the_arguments_alone(seed, rule, lam, dtype, scope):
    g, s = pair(seed, dtype)
    kept = [t.clone() for t in (*g, *s)]
    made = regularized_gradient(g, s, rule, lam, scope)
    assert [(m.shape, m.dtype) for m in made] == [(t.shape, t.dtype) for t in g]
    assert all(bool(torch.isfinite(m).all()) for m in made)
    assert all(torch.equal(a, b) for a, b in zip((*g, *s), kept, strict=True))
    assert not any(m.data_ptr() == t.data_ptr() for m, t in zip(made, s, strict=True))


def test_mix_is_to_first_order_a_penalty_on_the_gradient_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3
    names = [name for name, _ in model.named_parameters()]
    start = [p.detach().clone() for p in model.parameters()]

    def loss(values):
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)), y
        )

    def gradient(values):
        leaves = [v.clone().requires_grad_() for v in values]
        return list(torch.autograd.grad(loss(leaves), leaves))

    g = gradient(start)
    norm = flat(g).norm()
    truth = flat(torch.autograd.functional.hvp(lambda *v: loss(v), tuple(start), tuple(part / norm for part in g))[1])

    def error(rho, lam=0.4):
        s = gradient([w + rho * part / norm for w, part in zip(start, g, strict=True)])
        found = (flat(regularized_gradient(g, s, "mix", lam)) - flat(g)) / (lam * rho)
        return float((found - truth).norm() / truth.norm())

    assert error(1e-6) < 1e-4
    for rho in (1e-2, 1e-3, 2e-4):
        assert math.log2(error(rho) / error(rho / 2)) == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_named():
    g, s = pair(0)
    with pytest.raises(ValueError, match=r"rule must be one of .* got 'glad'"):
        regularized_gradient(g, s, "glad")
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got 1.5"):
        regularized_gradient(g, s, "mix", 1.5)
    with pytest.raises(ValueError, match="as many tensors in both, got 3 and 2"):
        regularized_gradient(g, s[:2], "mix")
    with pytest.raises(ValueError, match="scope must be 'global' or 'tensor', got 'layer'"):
        regularized_gradient(g, s, "steer", 0.5, "layer")
    with pytest.raises(ValueError, match="gradients is empty"):
        agreement([], [])
    with pytest.raises(ValueError, match="shapes must agree"):
        agreement([torch.ones(2)], [torch.ones(3)])
