"""Measures of predictions: pure functions on tensors that return a 0-d tensor of at least float32 precision.

Classification functions take ``logits``; log-probabilities are logits too, so the mean of an ensemble's
probabilities goes in as its logarithm. Non-finite predictions are not hidden: the result is then NaN or wrong on
purpose, and a training loop has its own check.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Predictions = Float[Tensor, "batch classes"] | Int[Tensor, " batch"]
"""Logits, of which the largest is the prediction, or predicted classes."""


def accuracy(predictions: Predictions, targets: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Share of examples whose predicted class is the target.

    Example:
        >>> accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
        tensor(0.7500)
    """
    correct = _classes("accuracy", predictions, targets) == targets
    return correct.float().mean()


def balanced_accuracy(predictions: Predictions, targets: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the classes that occur in ``targets`` of the share of their examples that is recognised.

    Example:
        >>> balanced_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
        tensor(0.5000)
    """
    correct = _classes("balanced_accuracy", predictions, targets) == targets
    classes, group, sizes = torch.unique(targets, return_inverse=True, return_counts=True)
    hits = torch.bincount(group[correct], minlength=len(classes))
    recall: Tensor = hits / sizes
    return recall.mean()


def negative_log_likelihood(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean of ``-log p(target)``, in nats.

    Example:
        >>> negative_log_likelihood(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.6931)
    """
    _check_logits("negative_log_likelihood", logits, targets)
    return F.cross_entropy(_wide(logits), targets)


def brier_score(logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over examples of ``sum_c (p_c - 1[c = target]) ** 2``, in [0, 2] (Brier 1950; not halved for two classes).

    Example:
        >>> brier_score(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.5000)
    """
    _check_logits("brier_score", logits, targets)
    probabilities = _wide(logits).softmax(dim=1)
    one_hot = F.one_hot(targets, logits.shape[1])
    return (probabilities - one_hot).square().sum(dim=1).mean()


def expected_calibration_error(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], num_bins: int = 15
) -> Float[Tensor, ""]:
    """Expected calibration error (ECE) of the predicted class, in [0, 1] (Guo et al. 2017, eq. 5).

    Examples fall by confidence into ``num_bins`` equal bins ``(lower, upper]``; each bin adds its share of the
    examples times ``|mean confidence - accuracy|``. PS-KD reports 10 bins in percent; Guo et al. use 15.

    Raises:
        ValueError: for ``num_bins < 1``, or shapes that do not agree.

    Example:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]]).log()
        >>> expected_calibration_error(logits, torch.tensor([0, 1, 1, 1]), num_bins=10)
        tensor(0.2500)
    """
    if num_bins < 1:
        raise ValueError(f"expected_calibration_error: num_bins must be >= 1, got {num_bins}")
    confidence, correct = _confidence("expected_calibration_error", logits, targets)
    inner_edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype, device=logits.device)[1:-1]
    # right=False puts a confidence that equals an edge into the bin below it. One-hot rows instead of a scatter
    # with addition, which is not deterministic on a GPU.
    membership = F.one_hot(torch.bucketize(confidence, inner_edges), num_bins).to(confidence.dtype)
    gaps = (membership * (confidence - correct.to(confidence.dtype))[:, None]).sum(dim=0)
    return gaps.abs().sum() / len(targets)


def area_under_risk_coverage(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Area under the risk-coverage curve (AURC): mean over k of the error rate among the k most confident examples.

    Confidence is the largest probability; equal confidences keep the order they are given in (Geifman and El-Yaniv 2019;
    PS-KD reports it times 1000).

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]).log()
        >>> area_under_risk_coverage(logits, torch.tensor([0, 0, 0]))  # (0/1 + 1/2 + 1/3) / 3
        tensor(0.2778)
    """
    confidence, correct = _confidence("area_under_risk_coverage", logits, targets)
    order = confidence.argsort(descending=True, stable=True)
    errors = (~correct[order]).cumsum(dim=0)
    return (errors.to(confidence.dtype) / _ranks(errors)).mean()


def excess_area_under_risk_coverage(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Excess AURC (E-AURC): AURC minus that of the same errors ranked last; 0 for a perfect ranking.

    With e errors among n examples the perfect ranking has ``(1/n) sum_{j=1..e} j / (n - e + j)``.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]).log()
        >>> excess_area_under_risk_coverage(logits, torch.tensor([0, 0, 0]))  # the wrong one should come last
        tensor(0.1667)
    """
    achieved = area_under_risk_coverage(logits, targets)
    _, correct = _confidence("excess_area_under_risk_coverage", logits, targets)
    perfect = (~correct).sort().values.cumsum(dim=0)  # False before True: errors last
    return achieved - (perfect.to(achieved.dtype) / _ranks(perfect)).mean()


def optimal_temperature(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], low: float = 0.01, high: float = 100.0
) -> Float[Tensor, ""]:
    """The temperature T in [low, high] at which ``logits / T`` has the least negative log-likelihood (Guo et al. 2017).

    Fit it on validation data, divide the test logits by it. One number: it changes confidences, never predictions. The
    likelihood is convex in 1/T, so its slope is bisected, in float64, to all digits. Where every prediction is right there
    is no optimum inside, and the result is ``low``.

    Raises:
        ValueError: unless 0 < low < high, or for shapes that do not agree.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
        >>> temperature = optimal_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> (logits[0] / temperature).softmax(0)
        tensor([0.7500, 0.2500])
    """
    _check_logits("optimal_temperature", logits, targets)
    if not 0 < low < high:
        raise ValueError(f"optimal_temperature: need 0 < low < high, got {low} and {high}")
    wide = logits.double()
    given = wide.gather(1, targets[:, None]).mean()
    # Bounds of log(1/T); the slope of the likelihood in 1/T is the mean logit under the model minus that of the targets.
    small, large = (torch.tensor(1 / t, dtype=torch.float64, device=logits.device).log() for t in (high, low))
    for _ in range(60):
        middle = (small + large) / 2
        scale = middle.exp()
        slope = ((scale * wide).softmax(1) * wide).sum(1).mean() - given
        small, large = torch.where(slope < 0, middle, small), torch.where(slope < 0, large, middle)
    return (-(small + large) / 2).exp().to(_wide(logits).dtype)


def memorization(
    predictions: Predictions, given_labels: Int[Tensor, " batch"], true_labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Share of the wrongly labelled examples that are predicted as their wrong label; NaN if none is wrong.

    Example:
        >>> given, true = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 0])
        >>> memorization(torch.tensor([0, 1, 0, 0]), given, true)
        tensor(0.5000)
    """
    if given_labels.shape != true_labels.shape:
        raise ValueError(
            f"memorization: given_labels and true_labels must have one shape, got {tuple(given_labels.shape)} "
            f"and {tuple(true_labels.shape)}"
        )
    wrong = given_labels != true_labels
    learned = _classes("memorization", predictions, given_labels) == given_labels
    return (learned & wrong).sum() / wrong.sum()


def mean_squared_error(predictions: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over all entries of ``(prediction - target) ** 2``.

    Example:
        >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    _check_same_shape("mean_squared_error", predictions, targets)
    return (_wide(predictions) - _wide(targets)).square().mean()


def r2_score(predictions: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """Coefficient of determination: 1 minus the squared error over that of the mean; averaged over outputs.

    As in scikit-learn an output whose target is constant counts 1 if it is predicted exactly, else 0.

    Example:
        >>> r2_score(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.5000)
    """
    _check_same_shape("r2_score", predictions, targets)
    if len(targets) < 2:
        raise ValueError(f"r2_score: needs at least two examples, got {len(targets)}")
    predictions = _wide(predictions).reshape(len(predictions), -1)
    targets = _wide(targets).reshape(len(targets), -1)
    residual = (predictions - targets).square().sum(dim=0)
    spread = (targets - targets.mean(dim=0)).square().sum(dim=0)
    constant = torch.where(residual == 0, 1.0, 0.0)
    return torch.where(spread > 0, 1 - residual / spread, constant).mean()


def peak_signal_to_noise_ratio(
    predictions: Float[Tensor, "*shape"],
    targets: Float[Tensor, "*shape"],
    *,
    peak: float = 1.0,
    batched: bool = False,
) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio (PSNR) in dB: ``10 log10(peak ** 2 / mean squared error)``; inf without error.

    Args:
        peak: the range of the signal: 1 for images in [0, 1], 255 for 8-bit ones.
        batched: the first dimension counts images: return the mean of their PSNRs, as papers report it, instead of
            the PSNR of all entries together.

    Raises:
        ValueError: if ``peak <= 0`` or the shapes differ.

    Example:
        >>> peak_signal_to_noise_ratio(torch.full((4,), 0.5), torch.full((4,), 0.6))
        tensor(20.0000)
    """
    _check_same_shape("peak_signal_to_noise_ratio", predictions, targets)
    if not peak > 0:
        raise ValueError(f"peak_signal_to_noise_ratio: peak must be > 0, got {peak}")
    squared = (_wide(predictions) - _wide(targets)).square()
    error = squared.reshape(len(squared), -1).mean(dim=1) if batched else squared.mean()
    return (10 * torch.log10(peak**2 / error)).mean()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _ranks(like: Tensor) -> Tensor:
    return torch.arange(1, len(like) + 1, device=like.device)


def _classes(caller: str, predictions: Tensor, targets: Tensor) -> Tensor:
    if predictions.is_floating_point():
        _check_logits(caller, predictions, targets)
        return predictions.argmax(dim=1)
    _check_same_shape(caller, predictions, targets)
    return predictions


def _confidence(caller: str, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    _check_logits(caller, logits, targets)
    confidence, predicted = _wide(logits).softmax(dim=1).max(dim=1)
    return confidence, predicted == targets


def _check_logits(caller: str, logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"{caller}: need logits (batch, classes) and integer targets (batch,), got {tuple(logits.shape)} "
            f"and {targets.dtype} {tuple(targets.shape)}"
        )
    _check_not_empty(caller, logits)


def _check_same_shape(caller: str, predictions: Tensor, targets: Tensor) -> None:
    if predictions.shape != targets.shape:
        raise ValueError(
            f"{caller}: predictions and targets must have one shape, got {tuple(predictions.shape)} and "
            f"{tuple(targets.shape)}"
        )
    _check_not_empty(caller, predictions)


def _check_not_empty(caller: str, predictions: Tensor) -> None:
    if predictions.numel() == 0:
        raise ValueError(f"{caller}: needs at least one example, got none")
