"""The terms of BA-LoRA as mathematics: limits, closed forms, independent implementations, derivatives, invariances."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wellposed import Hyperparameter, Step
from wellposed.losses.adapter_teacher import StoredTeacher
from wellposed.losses.logit_consistency import kl_consistency, normalized_mse_consistency, teacher_confidence
from wellposed.losses.logit_diversity import logit_covariance, topk_entropy
from wellposed.losses.logit_rows import shifted, valid_rows
from wellposed.losses.logit_spectrum import (
    head_factor,
    logits_in_head_basis,
    randomized_singular_values,
    spectral_concentration,
)
from wellposed.losses.logit_terms import LogitConsistency, LogitDiversity
from wellposed.losses.spectral_term import SpectralConcentration
from wellposed.losses.strength_schedule import find_schedule


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Consistency


@pytest.mark.parametrize(("temperature", "tolerance"), [(1e3, 1e-3), (1e5, 1e-4)])
def test_kl_tends_to_half_the_variance_of_the_difference(temperature, tolerance):
    student, teacher = normal(4, 7), normal(4, 7, seed=1)
    difference = student - teacher
    limit = (difference - difference.mean(1, keepdim=True)).square().mean(1) / 2
    torch.testing.assert_close(kl_consistency(student, teacher, temperature), limit, rtol=tolerance, atol=0)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_kl_is_torchs_with_the_squared_temperature(shape):
    student, teacher = 3 * normal(*shape), 3 * normal(*shape, seed=1)
    log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    expected = 4 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_consistency(student, teacher), expected, rtol=1e-10, atol=1e-12)


def test_kl_ignores_constants_on_rows_and_gives_the_teacher_no_gradient():
    student, teacher = normal(5, 7), normal(5, 7, seed=1).requires_grad_()
    offsets = 10 * normal(5, 1, seed=2)
    value = kl_consistency(student, teacher)
    torch.testing.assert_close(kl_consistency(student + offsets, teacher), value, rtol=1e-9, atol=1e-9)
    assert not value.requires_grad


def test_kl_of_classes_that_are_ruled_out_is_finite():
    student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[0.0, 0.0, -math.inf]])
    value = kl_consistency(student, teacher, temperature=1.0).sum()
    value.backward()
    assert value.item() == pytest.approx(math.log(3 / 2), abs=1e-6)
    torch.testing.assert_close(student.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))
    masked = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    kl_consistency(masked, teacher).sum().backward()
    assert masked.grad.isfinite().all()


def test_half_precision_is_computed_in_single():
    student, teacher = normal(4, 7, dtype=torch.float32).bfloat16(), normal(4, 7, seed=1).bfloat16()
    found = kl_consistency(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kl_consistency(student.float(), teacher.float()))
    for value in (logit_covariance(student), topk_entropy(student, 3), spectral_concentration(student, 2)):
        assert value.dtype == torch.float32


def test_normalized_mse_is_the_cosine_distance_per_class():
    student, teacher = normal(5, 7), normal(5, 7, seed=1)
    expected = 2 * (1 - F.cosine_similarity(student, teacher)) / 7
    torch.testing.assert_close(normalized_mse_consistency(student, teacher), expected, rtol=1e-7, atol=1e-9)


def test_confidence_runs_from_ignorance_to_certainty():
    rows = torch.tensor([[0.0] * 4, [1e4, 0, 0, 0], [0.0, 0.0, -math.inf, -math.inf]])
    torch.testing.assert_close(teacher_confidence(rows), torch.tensor([0.0, 1.0, 0.5]))


# Diversity


@pytest.mark.parametrize("shape", [(12, 5), (3, 2000)])
def test_covariance_is_that_of_vicreg_by_numpy(shape):
    z = normal(*shape)
    matrix = np.cov(z.numpy(), rowvar=False)
    expected = (np.square(matrix).sum() - np.square(np.diag(matrix)).sum()) / shape[1]
    assert float(logit_covariance(z)) == pytest.approx(expected, rel=1e-9)


def test_covariance_vanishes_for_uncorrelated_columns_and_is_of_fourth_degree():
    orthogonal = torch.linalg.qr(torch.cat([torch.ones(8, 1), normal(8, 4, dtype=torch.float32)], 1)).Q[:, 1:]
    assert float(logit_covariance(orthogonal)) < 1e-12
    z = normal(6, 4)
    torch.testing.assert_close(logit_covariance(3 * z), 81 * logit_covariance(z))


def test_two_classes_can_be_decorrelated_without_changing_a_probability():
    z = normal(16, 2)
    moved = z + ((z[:, 0] - z[:, 1]) / 2 - z.mean(1))[:, None]
    assert float(logit_covariance(z)) > 1e-3 and float(logit_covariance(moved)) < 1e-12
    torch.testing.assert_close(moved.softmax(1), z.softmax(1), rtol=1e-12, atol=1e-12)
    gauge_fixed = [logit_covariance(x, center_rows=True) for x in (z, moved)]
    torch.testing.assert_close(*gauge_fixed)


def test_topk_entropy_in_its_limits():
    z = normal(4, 6)
    p = z.softmax(1)
    torch.testing.assert_close(topk_entropy(z, 6), (p * p.log()).sum(1))
    torch.testing.assert_close(topk_entropy(z, None), topk_entropy(z, 6))
    torch.testing.assert_close(topk_entropy(torch.zeros(2, 6), 4), torch.full((2,), -math.log(4)))
    assert float(topk_entropy(torch.tensor([[1e4, 0.0, 0.0]]), 2)) == 0.0
    torch.testing.assert_close(topk_entropy(z[:, torch.randperm(6)], 3), topk_entropy(z, 3))
    largest = z.topk(3).values.softmax(1)
    torch.testing.assert_close(topk_entropy(z, 3), (largest * largest.log()).sum(1))


# Spectrum


@given(st.integers(2, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_the_nuclear_share_lies_in_its_bounds_and_ignores_scale(rows, classes, k, seed):
    z = normal(rows, classes, seed=seed)
    value, least = spectral_concentration(z, k), min(rows, classes)
    assert -1 - 1e-9 <= float(value) <= -min(k, least) / least + 1e-9
    torch.testing.assert_close(spectral_concentration(3 * z, k), value, rtol=1e-6, atol=1e-9)
    if k >= least:
        assert float(value) == pytest.approx(-1, abs=1e-12)


def test_the_nuclear_share_of_low_rank_is_one_and_has_no_gradient():
    z = normal(16, 3).requires_grad_()
    value = spectral_concentration(z, 5)
    (gradient,) = torch.autograd.grad(value, z)
    assert float(value.detach()) == -1.0 and float(gradient.abs().max()) < 1e-12
    low = normal(12, 2) @ normal(2, 9, seed=1)
    assert float(spectral_concentration(low, 2)) == pytest.approx(-1, abs=1e-12)


def test_the_frobenius_share_is_least_for_equal_values():
    equal = torch.linalg.qr(normal(12, 4)).Q
    assert float(spectral_concentration(equal, 4, "frobenius")) == pytest.approx(-2.0, abs=1e-12)
    one = torch.outer(normal(12), normal(5, seed=1))
    assert float(spectral_concentration(one, 4, "frobenius")) == pytest.approx(-1.0, abs=1e-12)
    for seed in range(20):
        assert -2.0 <= float(spectral_concentration(normal(12, 9, seed=seed), 4, "frobenius")) < -1.0


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_the_gradient_of_the_share_is_orthogonal_to_the_matrix(norm):
    z = normal(9, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_concentration(z, 2, norm), z)
    assert float((gradient * z).sum().detach()) == pytest.approx(0, abs=1e-9)
    assert float(gradient.norm()) > 1e-3


def test_scipys_singular_values_give_the_same_share():
    from scipy.linalg import svdvals

    z = normal(9, 6)
    values = svdvals(z.numpy())
    assert float(spectral_concentration(z, 2)) == pytest.approx(-values[:2].sum() / values.sum(), rel=1e-12)
    expected = -values[:2].sum() / np.linalg.norm(z.numpy())
    assert float(spectral_concentration(z, 2, "frobenius")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_the_basis_of_the_head_gives_the_same_value_and_gradient(norm, with_bias):
    weight, bias = normal(300, 16), normal(300, seed=1) if with_bias else None
    values, gradients = [], []
    for cheap in (False, True):
        hidden = normal(40, 16, seed=2).requires_grad_()
        matrix = logits_in_head_basis(hidden, head_factor(weight, bias)) if cheap else F.linear(hidden, weight, bias)
        value = spectral_concentration(matrix, 4, norm)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, hidden)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)
    assert float(gradients[0].norm()) > 1e-4


def test_randomized_values_are_exact_for_a_low_rank_and_never_too_large():
    low = normal(60, 8) @ normal(8, 200, seed=1)
    torch.testing.assert_close(randomized_singular_values(low, 5), torch.linalg.svdvals(low)[:5], rtol=1e-8, atol=0)
    flat = normal(100, 400)
    found, exact = randomized_singular_values(flat, 10), torch.linalg.svdvals(flat)[:10]
    assert (found <= exact + 1e-9).all() and float(found.sum() / exact.sum()) > 0.9


def test_randomized_draws_no_global_number_and_repeats_itself():
    z, before = normal(50, 5000), torch.get_rng_state()
    values = [spectral_concentration(z, 3, "frobenius", "auto") for _ in range(2)]
    assert torch.equal(*values) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(values[0], spectral_concentration(z, 3, "frobenius", "exact"))
    torch.testing.assert_close(values[0], spectral_concentration(z, 3, "frobenius", "exact"), rtol=0.1, atol=0)


def test_too_few_rows_and_zero_logits_have_no_spectrum():
    assert float(spectral_concentration(normal(1, 5), 2)) == 0.0
    zero = torch.zeros(4, 5, requires_grad=True)
    value = spectral_concentration(zero, 2, "frobenius")
    value.backward()
    assert float(value.detach()) == 0.0 and zero.grad.isfinite().all()


# Derivatives


@pytest.mark.parametrize(
    "term",
    [
        lambda z: kl_consistency(z, normal(5, 7, seed=3)),
        lambda z: normalized_mse_consistency(z, normal(5, 7, seed=3)),
        logit_covariance,
        lambda z: logit_covariance(z, center_rows=True),
        lambda z: topk_entropy(z, 4),
        lambda z: topk_entropy(z, None),
        lambda z: spectral_concentration(z, 2),
        lambda z: spectral_concentration(z, 2, "frobenius"),
    ],
)
def test_derivatives_are_those_of_finite_differences(term):
    assert torch.autograd.gradcheck(term, (normal(5, 7).requires_grad_(),))


# Rows and schedules


def test_shifted_logits_belong_to_the_next_label():
    logits = torch.arange(4.0)[None, :, None].expand(1, 4, 3)
    moved, targets = shifted(logits, torch.tensor([[-100, -100, 1, 2]]))
    assert valid_rows(moved, targets != -100)[:, 0].tolist() == [1.0, 2.0]  # the position before each answer token


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("cosine", [1, 0.1 + 0.45 * (1 + math.cos(math.pi * 0.2)), 0.1 + 0.45 * (1 + math.cos(math.pi * 0.225)), None, 0.1]),
        ("two_phase", [0, 0, 0.5, 1, 1]),
        ("linear_warmup", [0, 1, 1, 1, 1]),
        ("quadratic_warmup", [0, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_schedules(name, values):
    schedule = find_schedule("x", name)
    for progress, expected in zip((0, 0.2, 0.225, 0.25, 1), values, strict=True):
        if expected is not None:
            assert schedule(progress) == pytest.approx(expected, abs=1e-9)
    assert find_schedule("x", "quadratic_warmup")(0.05) == pytest.approx(0.25)


# The methods


def step(logits, targets=None, **options):
    return Step(nn.Identity(), outputs=logits, targets=targets, **options)


def test_terms_are_unreduced_where_they_can_be():
    z, index = normal(4, 7), torch.arange(4)
    teacher = StoredTeacher(normal(4, 7, seed=1))
    assert LogitConsistency(0.5, teacher=teacher).penalty(step(z, index=index)).shape == (4,)
    tokens = normal(2, 3, 7)
    assert LogitDiversity(0.5, form="topk_entropy", top_k=3).penalty(step(tokens)).shape == (2, 3)
    assert LogitDiversity(0.5).penalty(step(z)).shape == ()
    assert SpectralConcentration(0.5, k=2).penalty(step(z)).shape == ()
    assert LogitDiversity(0.5).coupled and not LogitDiversity(0.5, form="topk_entropy").coupled


def test_strengths_follow_their_schedule_and_cost_nothing_while_zero():
    z = normal(4, 7)
    term = LogitDiversity(0.5, schedule="two_phase")
    assert term.penalty(step(z, number=10, total=100)) is None
    found = [term.penalty(step(z, number=n, total=1000)) for n in (225, 250)]
    torch.testing.assert_close(found[0] * 2, found[1])
    torch.testing.assert_close(found[1], 0.5 * logit_covariance(z))


def test_a_learned_strength_stays_in_the_graph():
    strength = Hyperparameter(0.5)
    from wellposed.hyperparameter import differentiable

    with differentiable([strength]) as (raw,):
        value = LogitDiversity(strength).penalty(step(normal(4, 7, dtype=torch.float32)))
        (gradient,) = torch.autograd.grad(value, raw)
    assert float(gradient) > 0


def test_the_adaptive_weight_follows_the_teachers_confidence():
    index, z = torch.arange(2), normal(2, 4, dtype=torch.float32)
    for row, share in (([0.0] * 4, 0.1), ([1e4, 0.0, 0.0, 0.0], 1.0)):
        table = torch.tensor([row, row])
        found = LogitConsistency(2.0, teacher=StoredTeacher(table), adaptive=True).penalty(step(z, index=index))
        torch.testing.assert_close(found, 2.0 * share * kl_consistency(z, table))


def test_prompt_and_padding_change_no_term():
    targets = torch.tensor([[-100, 3, 1], [2, 0, 5]])
    z = normal(2, 3, 8)
    padded = torch.cat([z, 100 * normal(2, 2, 8, seed=5)], 1)
    padded[0, 0] += 50 * normal(8, seed=6)  # a prompt token says something else
    more = F.pad(targets, (0, 2), value=-100)
    for per in ("token", "sequence"):
        term = SpectralConcentration(1.0, k=2, norm="frobenius", per=per)
        torch.testing.assert_close(term.penalty(step(padded, more)), term.penalty(step(z, targets)), rtol=1e-6, atol=0)
    covariance = LogitDiversity(1.0)
    torch.testing.assert_close(covariance.penalty(step(padded, more)), covariance.penalty(step(z, targets)))


class TwoLayers(nn.Module):
    def __init__(self, scale=1.0, bias=False):
        super().__init__()
        self.body, self.lm_head, self.scale = nn.Linear(6, 5), nn.Linear(5, 40, bias=bias), scale
        self.lm_head.requires_grad_(False)

    def forward(self, x):
        return self.lm_head(self.body(x)) * self.scale


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_of_a_network_is_found_recorded_and_let_go(bias):
    from wellposed.step import collect_records

    model, x = TwoLayers(bias=bias).double(), normal(9, 6)
    cheap, plain = (SpectralConcentration(1.0, k=2, norm="frobenius", head=head) for head in ("lm_head", None))
    cheap.attach(model)
    found = []
    for term in (cheap, plain):
        model.zero_grad()
        with collect_records() as records:
            outputs = model(x)
        value = term.penalty(Step(model, inputs=x, outputs=outputs, records=records))
        value.backward()
        found.append((value.detach(), model.body.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
    cheap.finish(model)
    with collect_records() as records:
        model(x)
    assert records == {}


def test_capped_logits_and_heads_that_train_are_refused():
    from wellposed.step import collect_records

    model, x = TwoLayers(scale=0.5), torch.randn(9, 6)
    term = SpectralConcentration(1.0, k=2, head="lm_head")
    term.attach(model)
    with collect_records() as records:
        outputs = model(x)
    with pytest.raises(ValueError, match="not the outputs of head 'lm_head'"):
        term.penalty(Step(model, outputs=outputs, records=records))
    with pytest.raises(ValueError, match="did not run through head"):
        term.penalty(Step(model, outputs=outputs))
    with pytest.raises(ValueError, match="head 'body' trains"):
        SpectralConcentration(1.0, head="body").attach(model)
    with pytest.raises(ValueError, match="0 are called 'absent'"):
        SpectralConcentration(1.0, head="absent").attach(model)
    with pytest.raises(ValueError, match="must be a plain nn.Linear, got Sequential"):
        SpectralConcentration(1.0, head="0").attach(nn.Sequential(nn.Sequential()))


def test_a_failed_decomposition_counts_as_nothing_and_is_counted():
    term = SpectralConcentration(1.0, k=2)
    broken = step(torch.full((4, 6), math.nan))
    assert term.penalty(broken) is None and term.penalty(broken) is None
    assert int(term.failures) == 0  # a penalty writes nothing
    term.on_backward(broken)
    assert int(term.failures) == 1
    assert term.penalty(step(normal(4, 6))) is not None
    term.on_backward(broken)
    assert int(term.failures) == 1


def test_an_inert_spectrum_is_told_once():
    term = SpectralConcentration(1.0, k=5)
    with pytest.warns(UserWarning, match="k=5 and logits of 16 rows and 3 classes the term is constant"):
        term.penalty(step(normal(16, 3)))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term.penalty(step(normal(16, 3)))


def test_a_batch_of_one_is_refused_at_the_start_and_skipped_later():
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        LogitDiversity(1.0).penalty(step(normal(1, 4), number=0, total=9))
    assert LogitDiversity(1.0).penalty(step(normal(1, 4), number=3, total=9)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kl_consistency(torch.zeros(2, 3), torch.zeros(2, 4)), r"shape of logits \(2, 3\), got \(2, 4\)"),
        (lambda: kl_consistency(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "temperature must be > 0"),
        (lambda: normalized_mse_consistency(torch.zeros(2, 3), torch.zeros(3)), r"got \(3,\)"),
        (lambda: teacher_confidence(torch.zeros(2, 1)), "at least 2 classes"),
        (lambda: logit_covariance(torch.zeros(1, 3)), "at least 2 examples, got 1"),
        (lambda: topk_entropy(torch.zeros(2, 3), 4), r"top_k must lie in \[1, 3\].*got 4"),
        (lambda: topk_entropy(torch.zeros(2, 3), 0), "got 0"),
        (lambda: spectral_concentration(torch.zeros(2, 3), 0), "k must be an integer >= 1, got 0"),
        (lambda: spectral_concentration(torch.zeros(2, 3), 1, "nuclear", "randomized"), "norm must be 'frobenius'"),
        (lambda: logits_in_head_basis(torch.zeros(2, 3), torch.zeros(5, 5)), "3 columns .* got 5"),
        (lambda: shifted(torch.zeros(2, 3, 4), torch.zeros(2, 4).long()), r"got \(2, 3, 4\) and \(2, 4\)"),
        (lambda: LogitConsistency(-1.0), "strength must be >= 0, got -1.0"),
        (lambda: LogitDiversity(0.1, top_k=0), "top_k must be an integer >= 1"),
        (lambda: SpectralConcentration(0.1, head="x", per="sequence"), "per must be 'token'"),
        (lambda: StoredTeacher(torch.zeros(3, 2)).logits(step(torch.zeros(1, 2))), "step.index is missing"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bare_model_is_no_teacher():
    from jaxtyping import TypeCheckError

    with pytest.raises((TypeError, TypeCheckError)):
        LogitConsistency(0.1, teacher=nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["schedule", "form", "norm", "method", "per"])
def test_unknown_names_are_refused(name):
    from jaxtyping import TypeCheckError

    make = {"form": LogitDiversity, "schedule": LogitDiversity}.get(name, SpectralConcentration)
    with pytest.raises((ValueError, TypeCheckError)):
        make(0.1, **{name: "other"})
