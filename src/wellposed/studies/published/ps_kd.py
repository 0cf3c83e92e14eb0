"""Progressive self-distillation as published: CIFAR-100, pre-activation ResNet-18 (arXiv 2006.12000, table 1)."""

from __future__ import annotations

from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...losses import LabelSmoothing, ProgressiveSelfDistillation
from .images import MethodFactory, chosen, prepare, run_images

METHODS: dict[str, MethodFactory] = {
    "ce": lambda s, task: None,
    "label_smoothing": lambda s, task: LabelSmoothing(s["smoothing"]),
    "ps_kd": lambda s, task: ProgressiveSelfDistillation(task.num_examples, task.num_classes, s["alpha"]),
}


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm."""
    return run_images(trial, chosen(METHODS))


STUDY = Study(slug="ps-kd", run=run, estimands={}, headline=("accuracy", "test accuracy, points"), prepare=prepare)
