"""Stage 1 of nested dropout's study, as a model with data: one network with dropout on its features, or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...features import FeatureCompression
from ...indexed_dataset import TensorLoader
from ...lab.trial import Trial
from ...lab.tune_problem import NotTunable, TuneProblem
from ...losses import GeneralizedCrossEntropy, LabelSmoothing
from ...regularizer import Regularizer
from ..nested_dropout import RATE, network
from ..problems.noisy_digits import noisy_digits
from ..training import accuracy
from .strengths import sgd, step_decay, with_decay


def offer(trial: Trial) -> TuneProblem:
    """What `studies.nested_dropout.run` trains in its stage "one".

    Raises:
        NotTunable: for two networks, or nested dropout, whose number of features is chosen after training.

    Example:
        >>> settings = {"stage": "one", "loss": "ce", "kind": "dropout", "p": 0.5, "learning_rate": 0.05,
        ...             "weight_decay": 5e-4, "epochs": 60}
        >>> problem = offer(Trial("nested-dropout", "dropout", "laptop", "evaluate", settings, 1000, "f"))
        >>> sorted(problem.strengths)
        ['p', 'weight_decay']
    """
    settings, seed = trial.settings, trial.seed
    if settings["stage"] != "one" or settings.get("kind") == "nested":
        raise NotTunable(
            f"nested-dropout does not offer the arm '{trial.arm}': it offers one network without nested dropout"
        )
    problem = noisy_digits(seed, RATE, "other")
    # The layer draws one mask rate for the whole batch.
    found, method = with_decay("nested-dropout", trial, _method, per_example=False)
    return TuneProblem(
        model=network(settings, seed),
        train=TensorLoader(problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed),
        validation=TensorLoader(problem.validation, problem.validation_labels, batch_size=128, shuffle=True, seed=seed),
        test=TensorLoader(problem.test, problem.test_labels, batch_size=2048),
        regularizer=method,
        strengths=found,
        epochs=int(settings["epochs"]),
        optimizer=sgd(settings, found),
        factor=step_decay,
        metric=accuracy,
    )


def _method(settings: Mapping[str, Any]) -> Regularizer | None:
    """The arm's method as the study makes it, without turning its numbers into floats."""
    if settings["loss"] == "label_smoothing":
        return LabelSmoothing(settings["smoothing"])
    if settings["loss"] == "gce":
        return GeneralizedCrossEntropy(settings["q"])
    return FeatureCompression("dropout", p=settings["p"]) if settings.get("kind") == "dropout" else None
