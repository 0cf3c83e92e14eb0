"""Metrics against scikit-learn, scikit-image, hand-computed values and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from skimage.metrics import peak_signal_noise_ratio

from wellposed import metrics


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def example(seed: int, count: int, classes: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, classes, (count,), generator=generator)


CASES = given(seed=st.integers(0, 1000), count=st.integers(1, 60), classes=st.integers(2, 6))


@CASES
@settings(deadline=None, max_examples=40)
def test_classification_equals_scikit_learn(seed, count, classes):
    logits, targets = example(seed, count, classes)
    predicted, probabilities, labels = logits.argmax(1), logits.softmax(1).numpy(), list(range(classes))
    assert float(metrics.accuracy(logits, targets)) == pytest.approx(
        sklearn.metrics.accuracy_score(targets, predicted), abs=1e-6
    )
    recalls = [float((predicted[targets == c] == c).double().mean()) for c in targets.unique()]
    assert float(metrics.balanced_accuracy(predicted, targets)) == pytest.approx(np.mean(recalls), abs=1e-6)
    assert float(metrics.negative_log_likelihood(logits, targets)) == pytest.approx(
        sklearn.metrics.log_loss(targets, probabilities, labels=labels), rel=1e-9
    )
    assert float(metrics.brier_score(logits, targets)) == pytest.approx(
        sklearn.metrics.brier_score_loss(targets, probabilities, labels=labels, scale_by_half=False), rel=1e-9
    )


def test_balanced_accuracy_equals_scikit_learn():
    logits, targets = example(0, 200, 5)
    expected = sklearn.metrics.balanced_accuracy_score(targets, logits.argmax(1))
    assert float(metrics.balanced_accuracy(logits, targets)) == pytest.approx(expected, abs=1e-6)


@CASES
@settings(deadline=None, max_examples=40)
def test_calibration_error_by_its_definition(seed, count, classes):
    logits, targets = example(seed, count, classes)
    confidence, predicted = logits.softmax(1).max(1)
    for bins in (1, 10, 15):
        expected, edges = 0.0, np.linspace(0, 1, bins + 1)
        for lower, upper in zip(edges[:-1], edges[1:], strict=True):
            inside = (confidence > lower) & (confidence <= upper)
            if inside.any():
                gap = confidence[inside].mean() - (predicted == targets)[inside].double().mean()
                expected += float(inside.double().mean() * gap.abs())
        assert float(metrics.expected_calibration_error(logits, targets, bins)) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # confidences 1/2 and 3/4, one right and one wrong: in one bin (0, 3/4] of three the gaps would cancel
    logits = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log()
    right_then_wrong = torch.tensor([0, 1])
    # bins (0, 1/4], (1/4, 1/2], (1/2, 3/4], (3/4, 1]
    assert float(metrics.expected_calibration_error(logits, right_then_wrong, 4)) == pytest.approx((0.5 + 0.75) / 2)
    # bins (0, 1/2], (1/2, 1]
    assert float(metrics.expected_calibration_error(logits, right_then_wrong, 2)) == pytest.approx((0.5 + 0.75) / 2)
    assert float(metrics.expected_calibration_error(logits, right_then_wrong, 1)) == pytest.approx((0.75 - 0.5) / 2)


def test_risk_coverage_on_five_points_by_hand():
    confidence = torch.tensor([0.9, 0.6, 0.8, 0.95, 0.7], dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    targets = torch.tensor([1, 0, 0, 0, 1])  # sorted by confidence: right, wrong, right, wrong, right
    area = (0 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5) / 5
    oracle = (1 / 4 + 2 / 5) / 5
    assert float(metrics.area_under_risk_coverage(logits, targets)) == pytest.approx(area, abs=1e-12)
    assert float(metrics.excess_area_under_risk_coverage(logits, targets)) == pytest.approx(area - oracle, abs=1e-12)


def test_a_perfect_ranking_has_no_excess_and_no_ranking_is_better():
    for seed in range(20):
        logits, targets = example(seed, 40, 3)
        assert float(metrics.excess_area_under_risk_coverage(logits, targets)) >= -1e-12
    confidence = torch.linspace(0.95, 0.55, 8, dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    targets = (torch.arange(8) >= 5).long()
    assert float(metrics.excess_area_under_risk_coverage(logits, targets)) == pytest.approx(0, abs=1e-12)


def test_calibration_error_equals_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    for seed in range(5):
        logits, targets = example(seed, 300, 6)
        expected = classification.multiclass_calibration_error(logits.softmax(1), targets, 6, n_bins=10, norm="l1")
        found = metrics.expected_calibration_error(logits, targets, num_bins=10)
        assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_the_optimal_temperature_is_the_minimum_that_scipy_finds():
    for seed in range(10):
        logits, targets = example(seed, 200, 4)
        likely = (logits + 3 * torch.nn.functional.one_hot(targets, 4)) * (1 + seed)

        def loss(log_temperature, likely=likely, targets=targets):
            return float(metrics.negative_log_likelihood(likely / math.exp(log_temperature), targets))

        expected = math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-4, 4), options={"xatol": 1e-10}).x)
        found = metrics.optimal_temperature(likely, targets)
        assert float(found) == pytest.approx(expected, rel=1e-5)
        assert float(metrics.optimal_temperature(likely / 8, targets)) == pytest.approx(float(found) / 8, rel=1e-9)
        assert metrics.negative_log_likelihood(likely / found, targets) <= loss(0.0) + 1e-12


def test_a_temperature_of_certain_and_right_predictions_is_the_lowest_allowed():
    logits = torch.eye(3)
    assert float(metrics.optimal_temperature(logits, torch.arange(3), low=0.25)) == pytest.approx(0.25)
    assert float(metrics.optimal_temperature(logits, torch.tensor([1, 2, 0]), high=4.0)) == pytest.approx(4.0)


def test_memorization_counts_wrong_labels_only():
    given_labels, true_labels = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 0, 1])
    assert float(metrics.memorization(torch.tensor([0, 1, 0, 0, 2]), given_labels, true_labels)) == pytest.approx(2 / 3)
    assert float(metrics.memorization(true_labels, given_labels, true_labels)) == 0.0
    assert float(metrics.memorization(given_labels, given_labels, true_labels)) == 1.0
    assert math.isnan(metrics.memorization(given_labels, true_labels, true_labels))


@given(seed=st.integers(0, 1000), shape=st.sampled_from([(5,), (6, 1), (7, 3)]))
@settings(deadline=None, max_examples=30)
def test_regression_equals_scikit_learn(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    assert float(metrics.mean_squared_error(predictions, targets)) == pytest.approx(
        sklearn.metrics.mean_squared_error(targets, predictions)
    )
    assert float(metrics.r2_score(predictions, targets)) == pytest.approx(
        sklearn.metrics.r2_score(targets, predictions)
    )


def test_r2_of_a_constant_target_as_in_scikit_learn():
    targets = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    predictions = torch.tensor([[1.0, 2.5, 1.0], [1.0, 2.0, 2.0]])
    assert float(metrics.r2_score(predictions, targets)) == pytest.approx(
        sklearn.metrics.r2_score(targets, predictions)
    )


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_psnr_equals_scikit_image(peak):
    generator = torch.Generator().manual_seed(0)
    targets = peak * torch.rand(3, 1, 8, 8, generator=generator)
    images = targets + 0.1 * peak * torch.randn(targets.shape, generator=generator)
    whole = peak_signal_noise_ratio(targets.numpy(), images.numpy(), data_range=peak)
    each = [
        peak_signal_noise_ratio(t.numpy(), i.numpy(), data_range=peak) for t, i in zip(targets, images, strict=True)
    ]
    assert float(metrics.peak_signal_to_noise_ratio(images, targets, peak=peak)) == pytest.approx(whole, rel=1e-5)
    batched = metrics.peak_signal_to_noise_ratio(images, targets, peak=peak, batched=True)
    assert float(batched) == pytest.approx(np.mean(each), rel=1e-5)
    assert float(metrics.peak_signal_to_noise_ratio(targets, targets)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(dtype):
    logits, targets = example(1, 50, 4, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in (
        "negative_log_likelihood",
        "brier_score",
        "expected_calibration_error",
        "area_under_risk_coverage",
        "excess_area_under_risk_coverage",
        "optimal_temperature",
    ):
        function = getattr(metrics, name)
        result = function(logits, targets)
        assert result.dtype == wide and result.shape == ()
        assert float(result) == pytest.approx(float(function(logits.double(), targets)), rel=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_explained():
    logits, targets = example(0, 4, 3)
    with pytest.raises(ValueError, match=r"brier_score: need logits .* got \(4, 3\) and torch.int64 \(3,\)"):
        metrics.brier_score(logits, targets[:3])
    with pytest.raises(ValueError, match="accuracy: needs at least one example"):
        metrics.accuracy(targets[:0], targets[:0])
    with pytest.raises(ValueError, match=r"accuracy: .* one shape, got \(3,\) and \(4,\)"):
        metrics.accuracy(targets[:3], targets)
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):
        metrics.expected_calibration_error(logits, targets, 0)
    with pytest.raises(ValueError, match="optimal_temperature: need 0 < low < high, got 2.0 and 1.0"):
        metrics.optimal_temperature(logits, targets, 2.0, 1.0)
    with pytest.raises(ValueError, match="peak must be > 0, got 0"):
        metrics.peak_signal_to_noise_ratio(logits, logits, peak=0.0)
    with pytest.raises(ValueError, match="r2_score: needs at least two examples, got 1"):
        metrics.r2_score(logits[:1], logits[:1])
    with pytest.raises(ValueError, match="given_labels and true_labels must have one shape"):
        metrics.memorization(targets, targets, targets[:2])
