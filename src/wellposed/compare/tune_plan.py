"""What one training of `wellposed tune` learns: the names chosen, made for a network as one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..bilevel import BilevelProblem
from ..compose import Compose
from ..hyperparameter import Hyperparameter, named_hyperparameters, substituted
from ..regularizer import Regularizer
from ..tuning.search_box import proposed_value
from .errors import UserError, suggestion
from .task import Task
from .tune_catalogue import learnable_arms
from .tune_parts import USUAL, Bounds, Learnable, Part, Strength


@dataclass
class Plan:
    """Strengths to learn, and the method that reads them.

    Attributes:
        parts: in the order of `--learn`.
        own: hyperparameters that the user's model brings along.
        left_out: labels of strengths that a method cannot learn, and why.
    """

    parts: list[Part]
    own: list[Strength] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        methods = [part.method for part in self.parts]
        # Composed even if there is one: the names of hyperparameters then do not depend on how many there are.
        self.method: Regularizer = Compose(*methods)

    @property
    def strengths(self) -> list[Strength]:
        """All of them, those left out included."""
        return [*(strength for part in self.parts for strength in part.strengths), *self.own]

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        found = [part.note for part in self.parts if part.note]
        return [*found, *(f"{label} keeps its initial value: {why}" for label, why in self.left_out.items())]

    def values(self) -> dict[str, float]:
        """The present values by label."""
        return {label: value for strength in self.strengths for label, value in strength.values().items()}

    def boxes(self, problem: BilevelProblem) -> dict[str, Bounds]:
        """Where a search proposes, by the problem's own names; wide enough for the present values."""
        found = {}
        for name, h in problem.hypers.items():
            strength = self.strength_of(h)
            if all(strength is not own for own in self.own):  # these have a range of their own, or are refused
                low, high, log = strength.box
                values = strength.values().values()
                found[name] = (min(low, *values), max(high, *values), log)
        return found

    def set_(self, values: Mapping[str, float]) -> None:
        """Make values by label the present ones."""
        for strength in self.strengths:
            h = strength.hyper
            given = torch.tensor([values[label] for label in strength.labels]).reshape(h.raw.shape)
            h.set_(proposed_value(h, given))

    def strength_of(self, h: Hyperparameter) -> Strength:
        """The strength whose hyperparameter it is."""
        return next(strength for strength in self.strengths if strength.hyper is h)

    def present(self) -> dict[str, torch.Tensor]:
        """The present values by label of the strength, as a `Schedule` records them."""
        return {strength.label: strength.hyper().detach() for strength in self.strengths}


def choose(names: Sequence[str] | None, task: Task) -> list[Learnable]:
    """What to learn: the usual names that apply to the task, or those given.

    Raises:
        UserError: for a name that is unknown, given twice, or does not apply.
    """
    usual = {entry.name: entry for entry in USUAL}
    if names is None:
        return [entry for entry in USUAL if task.kind in entry.tasks]
    known = {**usual, **{entry.name: entry for entry in learnable_arms(task)}}
    if not names:
        raise UserError(f"--learn is empty; allowed: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UserError(f"--learn: no strength '{name}'.{suggestion(name, known)} Allowed: {', '.join(known)}")
        if task.kind not in known[name].tasks:
            fit = [entry.name for entry in known.values() if task.kind in entry.tasks]
            raise UserError(f"--learn: '{name}' does not apply to {task.kind}. Allowed: {', '.join(fit)}")
        if list(names).count(name) > 1:
            raise UserError(f"--learn names '{name}' twice")
    return [known[name] for name in names]


def make_plan(entries: Sequence[Learnable], model: nn.Module, task: Task) -> Plan:
    """The strengths made for a network.

    Raises:
        UserError: if two of them cannot be combined.
    """
    own = [
        Strength(name, h, (h.low, h.high, False), tuple(map(str, range(h.raw.numel()))) if h.raw.ndim else ())
        for name, h in named_hyperparameters(model).items()
    ]
    try:
        return Plan([entry.build(model, task) for entry in entries], own)
    except ValueError as error:
        raise UserError(f"--learn {','.join(entry.name for entry in entries)}: {error}") from error


def leave_out_what_has_no_derivative(plan: Plan, problem: BilevelProblem, sample: tuple[torch.Tensor, ...]) -> None:
    """Fix the strengths in which the training loss has no derivative, and remember why; the problem forgets them.

    Args:
        plan: its hyperparameters get `tune=False`.
        problem: of the method attached to a network.
        sample: a batch.

    Raises:
        UserError: if nothing is left.
    """
    raw = problem.raw()
    problem.begin()
    with substituted({h: raw[name] for name, h in problem.hypers.items()}):
        value = problem.evaluate(problem.inner_loss, problem.params, raw, sample)
    found = torch.autograd.grad(value, list(raw.values()), allow_unused=True)
    for h, gradient in zip(problem.hypers.values(), found, strict=True):
        if h.discrete or gradient is None:
            h.tune = False
            label = plan.strength_of(h).label
            plan.left_out[label] = "the training loss has no derivative in it"
    for name in [name for name, h in problem.hypers.items() if not h.tune]:
        del problem.hypers[name]
    if not problem.hypers:
        raise UserError(
            f"the training loss has no derivative in {' or '.join(plan.left_out)}: take --method stn, tpe or random"
        )
