"""Lines of Python that repeat a study's trial at settings that were found, or learn in it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...lab.trial import Setting
from ..tune_snippet import tuner_words


def run_settings(slug: str, arm: str, settings: Mapping[str, Setting], seed: int, metric: str) -> str:
    """The study's own trial at given settings.

    Example:
        >>> print(run_settings("elr", "elr", {"strength": 3.0}, 1000, "accuracy").splitlines()[-1])
        find_study('elr').run(trial).metrics['accuracy']
    """
    return "\n".join(
        [
            "from wellposed.lab.trial import Trial",
            "from wellposed.studies.finding import find_study",
            "",
            *_trial(slug, arm, settings, seed),
            f"find_study({slug!r}).run(trial).metrics[{metric!r}]",
        ]
    )


def learn_study(slug: str, arm: str, settings: Mapping[str, Setting], seed: int, method: str) -> str:
    """The study's problem as a model with data, and a tuner on it; the learning rate stays where it begins."""
    name, tuner = tuner_words(method, "problem.optimizer")
    return "\n".join(
        [
            "from functools import partial",
            "",
            "from wellposed import fit",
            "from wellposed.lab.trial import Trial",
            "from wellposed.studies.tunable import find_tunable",
            f"from wellposed.tuning import {name}",
            "",
            *_trial(slug, arm, settings, seed),
            f"problem = find_tunable({slug!r})(trial)",
            f"tuner = {tuner}",
            "result = fit(problem.model, problem.train, validation=problem.validation, epochs=problem.epochs,",
            "             regularizer=problem.regularizer, tuner=tuner, seed=trial.seed)",
            "{name: float(h()) for name, h in problem.strengths.items()}",
        ]
    )


def _trial(slug: str, arm: str, settings: Mapping[str, Setting], seed: int) -> list[str]:
    return [
        "settings = {",
        *_wrapped([f"{name!r}: {value!r}" for name, value in settings.items()]),
        "}",
        f'trial = Trial({slug!r}, {arm!r}, "laptop", "evaluate", settings, seed={seed}, fingerprint="")',
    ]


def _wrapped(items: Sequence[str], width: int = 88) -> list[str]:
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) + 2 > width:
            lines.append("")
        lines[-1] += f" {item}," if lines[-1] else f"    {item},"
    return lines
