"""Weight compander as published: CIFAR-100, ResNet-50 (arXiv 2306.16993, table I), with the controls that it lacks.

For weights far below the bound the compander is a learning rate larger by (a/b)^2. The controls are plain training at
that rate, and the linear compander of the same slope.
"""

from __future__ import annotations

from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...weights import WeightCompander
from .images import MethodFactory, chosen, prepare, run_images

METHODS: dict[str, MethodFactory] = {
    "base": lambda s, task: None,
    "wc": lambda s, task: WeightCompander(s["a"], s["b"]),
    "linear": lambda s, task: WeightCompander(s["a"], s["b"], fn="linear"),
}


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm."""
    return run_images(trial, chosen(METHODS, "method"))


STUDY = Study(
    slug="weight-compander", run=run, estimands={}, headline=("accuracy", "test accuracy, points"), prepare=prepare
)
