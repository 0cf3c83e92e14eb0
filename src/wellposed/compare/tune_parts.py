"""What `wellposed tune` can learn: named strengths, the methods that read them, and the lines that apply them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..features import Dropout, InputNoise
from ..hyperparameter import Hyperparameter
from ..losses import LabelSmoothing
from ..regularizer import Regularizer
from ..weights import WeightDecay
from ..weights.weight_decay import decayed_names
from .task import Task
from .tune_dropout import DropoutLayers, dropout_layers

Bounds = tuple[float, float, bool]
"""Lowest and highest value of a search, and whether its scale is logarithmic."""

MOST_DECAYS = 12
"""A model with more weight matrices has one weight decay for all: a search over dozens would find nothing."""


@dataclass
class Strength:
    """One hyperparameter under a name that people read.

    Attributes:
        label: e.g. "dropout".
        hyper: the hyperparameter.
        box: between which values a search proposes.
        entries: what each of its values belongs to, where it has a shape.
    """

    label: str
    hyper: Hyperparameter
    box: Bounds
    entries: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """One label for each value."""
        return [f"{self.label} {entry}" for entry in self.entries] if self.entries else [self.label]

    def values(self) -> dict[str, float]:
        """The present values by label."""
        return dict(zip(self.labels, self.hyper().detach().reshape(-1).tolist(), strict=True))

    def fixed(self, values: Mapping[str, float]) -> str:
        """Python for values by label: a number, or a hyperparameter that is not tuned where there are several."""
        if not self.entries:
            return number(values[self.label])
        return self.declared(values)[:-1] + ", tune=False)"

    def declared(self, values: Mapping[str, float], learnable: bool = False) -> str:
        """Python that makes the hyperparameter with these values; `learnable` as it was when it was learned."""
        numbers = [number(values[label]) for label in self.labels]
        init = f"torch.tensor([{', '.join(numbers)}])" if self.entries else numbers[0]
        h = self.hyper
        where = 'chart="exp"' if h.chart == "exp" else f"{h.low}, {h.high}"
        each = ", per_example=True" if learnable and h.per_example else ""
        return f"Hyperparameter({init}, {where}{each})"


@dataclass
class Part:
    """One name that `--learn` takes, made for a network.

    Attributes:
        name: as `--learn` takes it.
        method: reads the strengths.
        strengths: what is learned.
        imports: the line of Python that the expression needs.
        expression: the method as Python, given the code of each strength by label.
        note: what a reader must know.
    """

    name: str
    method: Regularizer
    strengths: list[Strength]
    imports: str
    expression: Callable[[Mapping[str, str]], str]
    note: str = ""


@dataclass(frozen=True)
class Learnable:
    """One name that `--learn` takes.

    Attributes:
        name: as given on the command line.
        about: in a few words.
        build: makes it for a network and its data.
        tasks: where it applies.
        usual: whether it is learned unless `--learn` says otherwise.
    """

    name: str
    about: str
    build: Callable[[nn.Module, Task], Part]
    tasks: tuple[str, ...] = field(default=("classification", "regression"))
    usual: bool = True


def _weight_decay(model: nn.Module, task: Task) -> Part:
    names = decayed_names(model)
    each = 1 < len(names) <= MOST_DECAYS
    init = torch.full((len(names),), 1e-4) if each else 1e-4
    h = Hyperparameter(init, chart="exp", per_example=True, name="weight decay")

    return Part(
        "weight-decay", WeightDecay(h), [Strength("weight decay", h, (1e-6, 0.1, True), tuple(names) if each else ())],
        "from wellposed.weights import WeightDecay", lambda code: f"WeightDecay({code['weight decay']})",
        f"one weight decay for all {len(names)} weight matrices" if len(names) > MOST_DECAYS else "",
    )  # fmt: skip


def _dropout(model: nn.Module, task: Task) -> Part:
    layers = dropout_layers(model)
    if not layers:
        h = _bounded("dropout", 0.05, 0.8)
        return Part(
            "dropout", Dropout(h), [Strength("dropout", h, (0.0, 0.8, False))],
            "from wellposed.features import Dropout", lambda code: f"Dropout({code['dropout']})",
        )  # fmt: skip
    rates = {name: _bounded(f"dropout {name}", 0.05, 0.8) for name in layers}
    strengths = [Strength(f"dropout {name}", h, (0.0, 0.8, False)) for name, h in rates.items()]

    def expression(code: Mapping[str, str]) -> str:
        found = ", ".join(f"{name!r}: {code[f'dropout {name}']}" for name in layers)
        return f"DropoutLayers({{{found}}})"

    return Part(
        "dropout", DropoutLayers(rates), strengths,
        "from wellposed.compare.tune_dropout import DropoutLayers", expression,
    )  # fmt: skip


def _label_smoothing(model: nn.Module, task: Task) -> Part:
    h = _bounded("label smoothing", 0.02, 0.5)
    return Part(
        "label-smoothing", LabelSmoothing(h), [Strength("label smoothing", h, (0.0, 0.5, False))],
        "from wellposed.losses import LabelSmoothing", lambda code: f"LabelSmoothing({code['label smoothing']})",
    )  # fmt: skip


def _input_noise(model: nn.Module, task: Task) -> Part:
    h = _bounded("input noise", 0.05, 1.0)
    return Part(
        "input-noise", InputNoise(h), [Strength("input noise", h, (0.0, 1.0, False))],
        "from wellposed.features import InputNoise", lambda code: f"InputNoise({code['input noise']})",
    )  # fmt: skip


def _bounded(name: str, init: float, high: float) -> Hyperparameter:
    return Hyperparameter(init, 0.0, high, per_example=True, name=name)


USUAL = (
    Learnable("weight-decay", "weight decay, one for each weight matrix", _weight_decay),
    Learnable("dropout", "dropout rate, one for each dropout layer that the model has, else one", _dropout),
    Learnable("label-smoothing", "label smoothing", _label_smoothing, ("classification",)),
    Learnable("input-noise", "standard deviation of Gaussian noise on the inputs", _input_noise),
)
"""What is learned unless `--learn` says otherwise."""


def number(value: Any) -> str:
    """A learned value as Python writes it, with the digits that learning can tell.

    Example:
        >>> number(0.0123456), number(1.5e-6)
        ('0.01235', '1.5e-06')
    """
    value = float(value)
    return repr(float(f"{value:.4g}")) if math.isfinite(value) else repr(value)
