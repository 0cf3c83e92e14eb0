"""Letter recognition of PS-KD's study, as a model with data; the share of the past and weight decay are learned."""

from __future__ import annotations

from torch import Tensor

from ...indexed_dataset import TensorLoader
from ...lab.trial import Trial
from ...lab.tune_problem import TuneProblem
from ...metrics import negative_log_likelihood
from ..ps_kd import METHODS, _jittered, draw_problem, network
from .strengths import sgd, step_decay, with_decay


def offer(trial: Trial) -> TuneProblem:
    """What `studies.ps_kd.run` trains.

    Example:
        >>> settings = {"problem": "mixture", "loss": "ps_kd", "alpha": 0.8, "learning_rate": 0.1, "weight_decay": 5e-4,
        ...             "epochs": 60, "train_size": 192, "validation_size": 64, "test_size": 200}
        >>> problem = offer(Trial("ps-kd", "ps_kd", "laptop", "evaluate", settings, 1000, "f"))
        >>> sorted(problem.strengths), len(problem.train)
        (['alpha', 'weight_decay'], 3)
    """
    settings, seed = trial.settings, trial.seed
    problem = draw_problem(settings, seed)
    found, method = with_decay("ps-kd", trial, lambda s: METHODS[str(settings["loss"])](s, problem))
    return TuneProblem(
        model=network(problem.train.shape[1], problem.classes, seed),
        train=TensorLoader(problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed, transform=_jittered),
        validation=TensorLoader(problem.validation, problem.validation_labels, batch_size=128, shuffle=True, seed=seed),
        test=TensorLoader(problem.test, problem.test_labels, batch_size=2048),
        regularizer=method,
        strengths=found,
        epochs=int(settings["epochs"]),
        optimizer=sgd(settings, found, nesterov=True),
        factor=step_decay,
        metric=_nll,
    )


def _nll(logits: Tensor, labels: Tensor) -> float:
    return float(negative_log_likelihood(logits, labels))
