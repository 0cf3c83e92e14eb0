"""The digits in pixel noise of the weight compander's study, as a model with data; a, b and weight decay are learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...indexed_dataset import TensorLoader
from ...lab.trial import Trial
from ...lab.tune_problem import NotTunable, TuneProblem
from ...regularizer import Regularizer
from ...weights import WeightCompander, WeightDecay
from ..problems.digits_in_pixel_noise import convolutional_network, digits_in_pixel_noise
from ..training import accuracy
from .strengths import candidates, sgd, step_decay, taken

# As the study makes them, with the decay of the companded weights where a tuner can learn it.
METHODS: Mapping[str, Callable[[Mapping[str, Any]], Regularizer]] = {
    "base": lambda s: WeightDecay(s["weight_decay"]),
    "wc": lambda s: WeightCompander(s["a"], s["b"], weight_decay=s["weight_decay"]),
    "linear": lambda s: WeightCompander(s["slope"], 1.0, fn="linear", weight_decay=s["weight_decay"]),
    "wc_tight": lambda s: WeightCompander(s["c"], s["c"], units="deviation", weight_decay=s["weight_decay"]),
}


def offer(trial: Trial) -> TuneProblem:
    """What `studies.weight_compander.run` trains.

    Raises:
        NotTunable: for an arm whose method takes no hyperparameter.

    Example:
        >>> settings = {"method": "wc", "a": 0.7, "b": 0.7, "learning_rate": 0.03, "weight_decay": 5e-4, "epochs": 40,
        ...             "dropout": 0.2}
        >>> problem = offer(Trial("weight-compander", "wc", "laptop", "evaluate", settings, 1000, "f"))
        >>> sorted(problem.strengths)
        ['a', 'b', 'weight_decay']
    """
    settings, seed = trial.settings, trial.seed
    if settings["method"] not in METHODS:
        raise NotTunable(
            f"weight-compander does not offer the arm '{trial.arm}': it offers those of the methods {', '.join(METHODS)}"
        )
    problem = digits_in_pixel_noise(seed)
    # One pair (a, b) makes the weights of the whole batch.
    offered = candidates("weight-compander", trial, per_example=False)
    found, method = taken(METHODS[str(settings["method"])], settings, offered)
    assert method is not None
    return TuneProblem(
        model=convolutional_network(seed, float(settings["dropout"])),
        train=TensorLoader(problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed),
        validation=TensorLoader(problem.validation, problem.validation_labels, batch_size=128, shuffle=True, seed=seed),
        test=TensorLoader(problem.test, problem.test_labels, batch_size=2048),
        regularizer=method,
        strengths=found,
        epochs=int(settings["epochs"]),
        optimizer=sgd({**settings, "weight_decay": 0.0}, found),
        factor=step_decay,
        metric=accuracy,
    )
