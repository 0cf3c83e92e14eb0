"""Early-learning regularization as published: CIFAR-10 with wrong labels, ResNet-34 (arXiv 2007.00151, table 1)."""

from __future__ import annotations

from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...losses import EarlyLearning, EarlyLearningPlus, GeneralizedCrossEntropy, SymmetricCrossEntropy
from .images import MethodFactory, chosen, prepare, run_images

METHODS: dict[str, MethodFactory] = {
    "ce": lambda s, task: None,
    "gce": lambda s, task: GeneralizedCrossEntropy(s["q"]),
    "sce": lambda s, task: SymmetricCrossEntropy(s["alpha"], s["beta"], s["log_zero"]),
    "elr": lambda s, task: EarlyLearning(task.num_examples, task.num_classes, s["strength"], s["momentum"]),
    "elr_plus": lambda s, task: EarlyLearningPlus(
        task.num_examples, task.num_classes, s["strength"], s["momentum"], s["alpha"], s["decay"]
    ),
}


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm."""
    return run_images(trial, chosen(METHODS))


STUDY = Study(slug="elr", run=run, estimands={}, headline=("accuracy", "test accuracy, points"), prepare=prepare)
