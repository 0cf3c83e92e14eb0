"""What `wellposed tune` can be asked for: its methods and options, checked before anything is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from .amounts import check_amounts, check_budget
from .errors import UserError, suggestion

UNTUNED = "untuned"
"""The arm that keeps the initial values."""

APPLIED = "applied"
"""The arm that trains with a schedule's learned values, fixed from the start: what copying the numbers is worth."""

SINGLE = "single"
"""The arm of a linear model with one learned penalty for all features: what one would tune otherwise."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as `--method` takes it.
        label: in tables.
        title: in full.
        about: one sentence in plain words.
        search: whether it trains many times, `--trials` in all.
        schedule: whether values change along one training.
        derivative: whether it learns only what the training loss has a derivative in.
        linear: whether it trains a linear model of its own instead of the network.
    """

    name: str
    label: str
    title: str
    about: str
    search: bool = False
    schedule: bool = False
    derivative: bool = False
    linear: bool = False


METHODS = {
    method.name: method
    for method in (
        Method(
            "stn", "STN", "self-tuning network (STN)",
            "learns during one training: the network's weights respond to the hyperparameters, which descend the "
            "validation loss through that response (arXiv 1903.03088)", schedule=True,
        ),
        Method(
            "delta-stn", "Delta-STN", "self-tuning network with a centred response (Delta-STN)",
            "as stn, with a response that is trained apart from the weights (arXiv 2010.13514); about twice as slow",
            schedule=True,
        ),
        Method(
            "bo-rep", "BO-REP", "bilevel descent with normalised momentum (BO-REP)",
            "learns during one training by second derivatives (arXiv 2401.09587): only what the loss is differentiable "
            "in, so no dropout rate", schedule=True, derivative=True,
        ),
        Method(
            "maid", "MAID", "adaptive inexact descent (MAID)",
            "learns one penalty for each feature of a linear model, by exact descent on the validation loss "
            "(arXiv 2308.10098); not of a network", linear=True,
        ),
        Method("tpe", "TPE", "Bayesian search (Optuna's TPE)", "trains --trials times, each proposed from those before", True),
        Method("random", "random search", "random search", "trains --trials times at random values", True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class JobOptions:
    """How to learn and for how long, on data or on a study.

    Attributes:
        method: name of the method.
        seeds: how often initialisation and order are drawn anew.
        budget: wall-clock seconds in all, or None for no limit.
        workers: processes.
        engine: "loky" or "serial".
        output: folder of the report.
        command: the command line, for the report.
    """

    method: str = "stn"
    _: KW_ONLY
    seeds: int = 6
    budget: float | None = None
    workers: int = 2
    engine: str = "loky"
    output: Path = Path("wellposed-report")
    command: str = ""

    @property
    def chosen(self) -> Method:
        """The method itself."""
        return METHODS[self.method]


@dataclass(frozen=True)
class TuneOptions(JobOptions):
    """What to learn on data, and how; the rest as in `JobOptions`.

    Attributes:
        learn: names of strengths, or None for the usual ones.
        model: `module:function` of the user's model, or None.
        epochs: of one training; None chooses by the size of the data.
        trials: trainings of a search; None for its default.
        features: names of the features, where the data have such.
    """

    learn: Sequence[str] | None = None
    model: str | None = None
    epochs: int | None = None
    trials: int | None = None
    features: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """What the method does, with the number of its trainings."""
        return self.chosen.about.replace("--trials times", f"{self.trainings} times")

    @property
    def trainings(self) -> int:
        """Trainings of the method for each seed."""
        return (self.trials or SEARCH_TRIALS) if self.chosen.search else 1


SEARCH_TRIALS = 8


def check_method(method: str, offered: Collection[str]) -> None:
    """Check a method's name.

    Args:
        method: what was asked for.
        offered: names of the methods that may be taken.

    Raises:
        UserError: for a name that is not known at all.
    """
    if method not in METHODS:
        raise UserError(f"--method must be one of {', '.join(offered)}, got '{method}'.{suggestion(method, offered)}")


def check_tune_options(options: TuneOptions) -> None:
    """Check what does not depend on the data.

    Raises:
        UserError: naming the option, its value and what is allowed.

    Example:
        >>> check_tune_options(TuneOptions(method="sdn"))
        Traceback (most recent call last):
        wellposed.compare.errors.UserError: --method must be one of stn, ..., got 'sdn'. Did you mean 'stn'?
    """
    check_method(options.method, METHODS)
    check_amounts(("--seeds", options.seeds, 2), ("--epochs", options.epochs, 1), ("--trials", options.trials, 2),
                  ("--workers", options.workers, 1))  # fmt: skip
    check_budget(options.budget)
    method = options.chosen
    if options.trials is not None and not method.search:
        searches = " and ".join(name for name, known in METHODS.items() if known.search)
        raise UserError(f"--trials applies to {searches}: '{method.name}' learns within one training")
    if method.linear:
        for name, given in (("--learn", options.learn), ("--model", options.model), ("--epochs", options.epochs)):
            if given is not None:
                raise UserError(
                    f"{name} does not apply to --method {method.name}, which learns one penalty for each feature of a "
                    f"linear model; for a network take one of {', '.join(n for n, m in METHODS.items() if not m.linear)}"
                )
