"""Field of experts: value against a loop, gradients, convexity, the smoothness bound, and MAID learning the filters."""

import pytest
import torch
from jaxtyping import config

from wellposed import Hyperparameter
from wellposed.inverse import field_of_experts_prior, field_of_experts_smoothness, smoothed_total_variation
from wellposed.tuning import MAID, CertifiedProblem, LowerLevel, UpperLoss

F64 = torch.float64


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parts(experts=3, size=3):
    return draw(experts, size, size, seed=1), draw(experts, seed=2).exp(), (draw(experts, seed=3) - 1).exp()


def test_it_is_the_sum_over_experts_and_places():
    x, (f, w, eta) = draw(2, 5, 6), parts()
    expected = torch.zeros(2, dtype=F64)
    for n in range(2):
        for k in range(3):
            for i in range(3):
                for j in range(4):
                    t = (x[n, i : i + 3, j : j + 3] * f[k]).sum()
                    expected[n] += 0.7 * w[k] * ((t**2 + eta[k] ** 2).sqrt() - eta[k])
    torch.testing.assert_close(field_of_experts_prior(x, f, w, eta, 0.7), expected)


def test_it_can_be_differentiated_twice_in_everything():
    x, (f, w, eta) = draw(1, 4, 4), parts(2, 2)
    arguments = [t.requires_grad_() for t in (x, f, w, eta)]
    assert torch.autograd.gradcheck(field_of_experts_prior, arguments)
    assert torch.autograd.gradgradcheck(field_of_experts_prior, arguments)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_convex_and_the_bound_of_its_smoothness_holds_and_is_tight(seed):
    f, w, eta = draw(1, 3, 3, seed=seed), torch.ones(1, dtype=F64), torch.full((1,), 0.5, dtype=F64)
    x = torch.zeros(1, 24, 24, dtype=F64)  # at zero the potential is as curved as it gets
    H = torch.func.hessian(lambda z: field_of_experts_prior(z.reshape(1, 12, 12), f, w, eta)[0])(
        x[0, :12, :12].reshape(-1)
    )
    spectrum = torch.linalg.eigvalsh(H)
    bound = field_of_experts_smoothness(f, w, eta)
    assert float(spectrum[0]) > -1e-10
    assert 0.6 * bound <= float(spectrum[-1]) <= bound


def test_two_difference_filters_are_anisotropic_total_variation():
    x = draw(1, 1, 8).expand(1, 3, 8)
    across = torch.tensor([[[-1.0, 1.0]]], dtype=F64)
    one = torch.ones(1, dtype=F64)
    found = field_of_experts_prior(x, across, one, 1e-6 * one)
    torch.testing.assert_close(found, smoothed_total_variation(x, 1e-6), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_named():
    f, w, eta = parts()
    with pytest.raises(ValueError, match="must be as many, got 3, 2 and 3"):
        field_of_experts_prior(draw(1, 5, 5), f, w[:2], eta)
    with pytest.raises(ValueError, match=r"an image of \(2, 5\) is smaller than a filter of \(3, 3\)"):
        field_of_experts_prior(draw(1, 2, 5), f, w, eta)
    with pytest.raises(ValueError, match="grid must exceed 8, got 8"):
        field_of_experts_smoothness(f, w, eta, grid=8)


def test_maid_learns_a_field_of_experts_without_being_told_an_accuracy():
    """Four filters, their weights and smoothings, and the strength: 45 numbers; every constant of a step is known."""
    clean = torch.zeros(2, 10, 10, dtype=F64)
    clean[0, :, 5:], clean[1, 4:] = 1.0, 1.0
    noisy = clean + 0.1 * draw(2, 10, 10, seed=4)
    filters = 0.3 * draw(4, 3, 3, seed=5)
    hypers = {
        "filters": Hyperparameter(filters - filters.mean((1, 2), keepdim=True), -float("inf"), float("inf")).double(),
        "weights": Hyperparameter(0.05, chart="exp", shape=(4,)).double(),
        "smoothings": Hyperparameter(0.05, chart="exp", shape=(4,)).double(),
        "strength": Hyperparameter(0.5, chart="exp").double(),
    }

    def h(x, v):
        prior = field_of_experts_prior(x, v["filters"], v["weights"], v["smoothings"], v["strength"])
        return 0.5 * (x - noisy).square().sum((1, 2)) + prior

    lower = LowerLevel(
        h, noisy, hypers, 1.0,
        lambda v: 1.0 + field_of_experts_smoothness(v["filters"], v["weights"], v["smoothings"], v["strength"]),
        per_sample=True,
    )  # fmt: skip
    tuner = MAID(CertifiedProblem(lower, UpperLoss(lambda x: 0.5 * (x - clean).square().sum((1, 2)), 1.0, True)))
    tuner.run(budget=1200)
    assert tuner.certified and len(tuner.u) == 4 * 9 + 4 + 4 + 1
    before = 0.5 * float((noisy - clean).square().sum()) / 2
    assert tuner.point.upper < 0.6 * before
