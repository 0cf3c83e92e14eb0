"""Lines that apply the winner: to any loop, and as a script that repeats the best run on the user's data."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ..lab.trial import Setting
from ..papers.arms import Arm
from .arms import SHARED, from_data
from .task import Task


def own_settings(arm: Arm, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that belong to the method, not to the recipe; numbers with four significant digits."""
    return {key: rounded(value) for key, value in settings.items() if key not in SHARED}


def rounded(value: Setting) -> Setting:
    """Four significant digits are all that tuning can tell.

    Example:
        >>> rounded(0.0123456), rounded("a"), rounded(3)
        (0.01235, 'a', 3)
    """
    return float(f"{value:.4g}") if isinstance(value, float) else value


def usage(arm: Arm, task: Task, settings: Mapping[str, Setting]) -> str:
    """Lines for a loop of one's own."""
    keywords = ", ".join(f"{k}={v!r}" for k, v in own_settings(arm, settings).items())
    filled = arm.usage.replace("{settings}", keywords)
    filled = filled.replace("{num_examples}", str(task.sizes["train"])).replace("{num_classes}", str(task.num_outputs))
    return filled.strip()


def script(arm: Arm, task: Task, settings: Mapping[str, Setting], folder: str, model: str | None) -> str:
    """A Python script that trains the winner on the prepared data and prints its test score."""
    arguments = {**from_data(arm, task), **arm.fixed, **own_settings(arm, settings)}
    module, _, name = arm.factory.partition(":")
    made = f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" if name else "None"
    shared = {k: rounded(v) for k, v in settings.items() if k in SHARED}
    network = f"load_user_model({model!r}, task, seed=0)" if model else "default_model(task, seed=0)"
    loader = "load_user_model" if model else "default_model"
    return textwrap.dedent(
        f'''\
        """Trains with {arm.label} on {task.name}, as the comparison did, and prints the test score."""

        from wellposed import TensorLoader, fit
        from wellposed.compare import Task, recipe
        from wellposed.compare.models import {loader}
        {f"from {module} import {name}" if name else "# plain training needs no method"}
        from wellposed.evaluation import predict

        task = Task.load({folder!r})
        data = task.tensors(seed=0)
        result = fit(
            {network},
            TensorLoader(data["train_inputs"], data["train_targets"], shuffle=True),
            validation=TensorLoader(data["validation_inputs"], data["validation_targets"]),
            regularizer={made},
            **recipe(task, {shared!r}),
        )
        test = TensorLoader(data["test_inputs"], data["test_targets"])
        print(f"test {{task.metric}}: {{task.score(*predict(result.model, test)):.1f}}")
        '''
    )
