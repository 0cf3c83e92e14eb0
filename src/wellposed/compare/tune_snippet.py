"""Lines of Python that apply what `wellposed tune` learned: as fixed values, or as the schedule that was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .tune_methods import BILEVEL, LEARNING_RATE, SELF_TUNING
from .tune_plan import Plan

_FIT = "result = fit(model, dataset, validation=validation, regularizer=method, epochs={epochs}, early_stopping=5)"


def apply_values(plan: Plan, values: Mapping[str, float], epochs: int) -> str:
    """The methods with learned values as floats.

    Args:
        plan: what was learned.
        values: by label.
        epochs: of the training that found them.
    """
    code = {strength.label: strength.fixed(values) for strength in plan.strengths}
    made = [part.expression(code) for part in plan.parts]
    imports = [part.imports for part in plan.parts]
    if any("Hyperparameter(" in text for text in made):
        imports += ["import torch", "from wellposed import Hyperparameter"]
    # What the user's own model holds is set in place.
    own = [f"model.get_submodule({s.label!r}).set_({_literal(s.labels, values)})" for s in plan.own]
    return _joined(imports, [*own, *_method(made), _FIT.format(epochs=epochs)])


def replay_schedule(plan: Plan, values: Mapping[str, float], path: str, epochs: int) -> str:
    """The schedule of a training, replayed on a plain network.

    Args:
        plan: what was learned.
        values: the initial ones, by label.
        path: of the schedule's file.
        epochs: of the training that found it.
    """
    names = {strength.label: _variable(strength.label) for strength in plan.strengths}
    own = {s.label: f"model.get_submodule({s.label!r})" for s in plan.own}
    made = [part.expression(names) for part in plan.parts]
    declared = [f"{names[s.label]} = {own.get(s.label) or s.declared(values)}" for s in plan.strengths]
    known = ", ".join(f"{label!r}: {name}" for label, name in names.items())
    imports = [
        "from pathlib import Path", "from wellposed.tuning import ReplaySchedule, Schedule",
        *(part.imports for part in plan.parts),
    ]  # fmt: skip
    if any("Hyperparameter(" in line for line in declared):
        imports.append("from wellposed import Hyperparameter")
    if any("torch." in line for line in declared):
        imports.append("import torch")
    replay = f"ReplaySchedule(schedule, {{{known}}})"
    lines = [f'schedule = Schedule.from_json(Path("{path}").read_text())', *declared, *_method([replay, *made])]
    return _joined(imports, [*lines, _FIT.format(epochs=epochs)])


TUNERS = {
    "stn": ("SelfTuner", "delta=False, "),
    "delta-stn": ("SelfTuner", ""),
    "bo-rep": ("BOREP", ""),
}
"""Class of each method that learns within a training, and what tells it from others of the class."""


def tuner_words(method: str, optimizer: str) -> tuple[str, str]:
    """The class of a method that learns within a training, and the expression that makes its tuner.

    Args:
        method: its name.
        optimizer: what makes the weights' optimizer, as an expression.

    Example:
        >>> name, made = tuner_words("bo-rep", "sgd")
        >>> name, made.startswith("partial(BOREP, inner_optimizer=sgd, outer_lr=")
        ('BOREP', True)
    """
    name, options = TUNERS[method]
    settings = SELF_TUNING if name == "SelfTuner" else BILEVEL
    options += ", ".join(f"{k}={v!r}" for k, v in settings.items() if isinstance(v, (int, float, str)))
    keyword = "inner_optimizer" if name == "BOREP" else "weight_optimizer"
    return name, f"partial({name}, {keyword}={optimizer}, {options})"


def learn_again(plan: Plan, values: Mapping[str, float], method: str, epochs: int) -> str:
    """The same learning in a loop of one's own.

    Args:
        plan: what was learned.
        values: the initial ones, by label.
        method: name of the method.
        epochs: of a training.
    """
    own = {s.label for s in plan.own}
    code = {s.label: s.declared(values, learnable=True) for s in plan.strengths if s.label not in own}
    for label in plan.left_out:
        strength = next(s for s in plan.strengths if s.label == label)
        code[label] = strength.fixed(values)
    name, tuner = tuner_words(method, "sgd")
    imports = [
        "from functools import partial", "import torch", "from wellposed import Hyperparameter",
        f"from wellposed.tuning import {name}", *(part.imports for part in plan.parts),
    ]  # fmt: skip
    lines = [
        *_method([part.expression(code) for part in plan.parts]),
        f"sgd = partial(torch.optim.SGD, lr={LEARNING_RATE}, momentum=0.9, nesterov=True)",
        f"tuner = {tuner}",
        "result = fit(model, dataset, validation=validation, regularizer=method, tuner=tuner, "
        f"epochs={epochs}, early_stopping={epochs})",
        "result.tuner.values()",
    ]
    return _joined(imports, lines)


def _method(made: list[str]) -> list[str]:
    if len(made) == 1:
        return [f"method = {made[0]}"]
    return ["method = Compose(", *(f"    {text}," for text in made), ")"]


def _joined(imports: Iterable[str], lines: list[str]) -> str:
    needed = [*imports, "from wellposed import fit"]
    if "method = Compose(" in lines:
        needed.append("from wellposed import Compose")
    return "\n".join([*merged(needed), "", *lines])


def merged(imports: Iterable[str]) -> list[str]:
    """Import lines, those of one module merged, in the usual order.

    Example:
        >>> merged(["from b import y", "import a", "from b import x"])
        ['import a', 'from b import x, y']
    """
    names: dict[str, set[str]] = {}
    plain = set()
    for line in imports:
        if line.startswith("from "):
            module, _, name = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, set()).update(part.strip() for part in name.split(","))
        else:
            plain.add(line)
    return [*sorted(plain), *(f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names))]


def _literal(labels: list[str], values: Mapping[str, float]) -> str:
    numbers = [f"{values[label]:.4g}" for label in labels]
    return numbers[0] if len(numbers) == 1 else f"torch.tensor([{', '.join(numbers)}])"


def _variable(label: str) -> str:
    name = "".join(c if c.isalnum() else "_" for c in label)
    return name if name[:1].isalpha() else f"strength_{name}"
