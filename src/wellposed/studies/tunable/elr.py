"""The digits with wrong labels of ELR's study, as a model with data; strength and weight decay are learned."""

from __future__ import annotations

from ...indexed_dataset import TensorLoader
from ...lab.trial import Trial
from ...lab.tune_problem import NotTunable, TuneProblem
from ..elr import METHODS
from ..problems.noisy_digits import CLASSES, noisy_digits
from ..training import accuracy, multilayer_perceptron
from .strengths import sgd, step_decay, with_decay


def offer(trial: Trial) -> TuneProblem:
    """What `studies.elr.run` trains on digits.

    Raises:
        NotTunable: for an arm on the linear problem, or with two networks.

    Example:
        >>> settings = {"problem": "digits", "noise": "uniform", "rate": 0.4, "loss": "elr", "strength": 3.0,
        ...             "momentum": 0.7, "learning_rate": 0.05, "weight_decay": 1e-3, "epochs": 60}
        >>> problem = offer(Trial("elr", "elr", "laptop", "evaluate", settings, 1000, "f"))
        >>> sorted(problem.strengths), problem.epochs, len(problem.train)
        (['strength', 'weight_decay'], 60, 16)
    """
    settings, seed = trial.settings, trial.seed
    if settings["problem"] != "digits" or settings["loss"] == "elr_plus":
        raise NotTunable(f"elr does not offer the arm '{trial.arm}': it offers one network on digits")
    problem = noisy_digits(seed, float(settings["rate"]), settings["noise"])  # type: ignore[arg-type]
    found, method = with_decay("elr", trial, METHODS[str(settings["loss"])])
    return TuneProblem(
        model=multilayer_perceptron([64, 512, 512, CLASSES], seed),
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
