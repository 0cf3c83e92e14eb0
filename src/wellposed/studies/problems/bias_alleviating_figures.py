"""BA-LoRA's figures: accuracy by the noise of pretraining, and what all three terms gain on each rival."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...lab.figures import line_plot
from ...lab.statistics import mean_interval
from ...lab.study_figures import EstimateRow, estimate_plot

if TYPE_CHECKING:
    from ...lab.study import Figure

LEVELS = {"p00": 0.0, "p30": 0.3, "p60": 0.6}
SHOWN = {
    "trio": "BA-LoRA",
    "pissa_kl": "PiSSA + KL alone",
    "pissa": "PiSSA",
    "lora": "LoRA",
    "teacher": "no adaptation",
}
RIVALS = {
    "lora": "LoRA",
    "pissa": "PiSSA",
    "lora_kl": "LoRA + KL alone",
    "pissa_kl": "PiSSA + KL alone",
    "trio_no_cr": "without consistency",
    "trio_no_dr": "without diversity",
    "trio_no_svd": "without the spectral term",
    "pissa_balanced": "PiSSA, class weights",
    "pissa_wise": "PiSSA, WiSE-FT",
}
BY_NOISE = (
    "Balanced test accuracy, mean and range over the seeds; every arm is tuned anew at each share of wrong labels."
)
GAINS = (
    "Balanced test accuracy of BA-LoRA minus that of each rival, with 30 % wrong labels in pretraining (mean with 95 % "
    "interval, and every seed). Right of 0 BA-LoRA is better. The row of PiSSA + KL alone shows what its other two terms add."
)


def drawn(run: Any) -> list[Figure]:
    """Both figures of a finished run."""
    from ...lab.study import Figure

    found = []
    if lines := accuracy_by_noise(run):
        svg = line_plot(lines, "share of wrong labels in pretraining", "balanced test accuracy", "Accuracy by noise")
        found.append(Figure("Does a noisier start call for more regularization?", BY_NOISE, svg))
    if rows := gains(run):
        svg = estimate_plot(rows, "accuracy of BA-LoRA minus the rival's", "Gain of BA-LoRA on each rival")
        found.append(Figure("What the three terms gain, and on whom", GAINS, svg))
    return found


def accuracy_by_noise(run: Any) -> dict[str, tuple[list[float], list[list[float]]]]:
    """For each arm that all seeds finished at all levels: the levels, and the accuracies of each seed."""
    lines = {}
    for arm, label in SHOWN.items():
        columns = [run.arms[f"{arm}_{level}"].metric("acc", run.protocol.worst) for level in LEVELS]
        if all(columns) and len({len(column) for column in columns}) == 1:
            lines[label] = (list(LEVELS.values()), [list(seed) for seed in zip(*columns, strict=True)])
    return lines


def gains(run: Any) -> list[EstimateRow]:
    """One row a rival at p = 0.3."""
    own = run.arms["trio_p30"].metric("acc", run.protocol.worst)
    rows = []
    for rival, label in RIVALS.items():
        other = run.arms[f"{rival}_p30"].metric("acc", run.protocol.worst)
        if len(own) != len(other) or len(own) < 2:
            continue
        differences = [a - b for a, b in zip(own, other, strict=True)]
        found = mean_interval(differences)
        kind = "above" if found.low > 0 else "below" if found.high < 0 else "open"
        numbers = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        rows.append(EstimateRow(label, differences, (found.estimate, found.low, found.high), numbers, kind))
    return rows
