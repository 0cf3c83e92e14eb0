"""What `wellposed tune STUDY` can be asked for, checked before a study is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...lab.trial import Setting
from ..errors import UserError, suggestion
from ..tune_options import METHODS, Method

ROUNDS = 8
"""Configurations of a search, as many as `wellposed tune DATA` trains."""

STUDY_METHODS = tuple(name for name, method in METHODS.items() if not method.linear)


@dataclass(frozen=True)
class StudyTuneOptions:
    """How a study's arm is tuned.

    Attributes:
        method: name of the method.
        arm: of the study; None takes the first of the paper's that has something to tune.
        rounds: configurations of a search; None for its default.
        seeds: evaluation seeds.
        budget: wall-clock seconds in all, or None for no limit.
        overrides: settings that are fixed, and not tuned.
        workers: processes.
        engine: "loky" or "serial".
        output: folder of the report.
        command: the command line, for the report.
    """

    method: str = "stn"
    arm: str | None = None
    rounds: int | None = None
    seeds: int = 6
    budget: float | None = None
    overrides: Mapping[str, Setting] = field(default_factory=dict)
    workers: int = 2
    engine: str = "loky"
    output: Path = Path("wellposed-report")
    command: str = ""

    @property
    def chosen(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def configurations(self) -> int:
        """Configurations that a search tries."""
        return self.rounds or ROUNDS

    @property
    def about(self) -> str:
        """What the method does; a search tries its configurations on tuning seeds, and not on each seed."""
        return self.chosen.about.replace(
            "trains --trials times", f"tries {self.configurations} configurations on tuning seeds"
        )


def check_study_options(options: StudyTuneOptions) -> None:
    """Check what does not depend on the study.

    Raises:
        UserError: naming the option, its value and what is allowed.

    Example:
        >>> check_study_options(StudyTuneOptions(method="sdn"))
        Traceback (most recent call last):
        wellposed.compare.errors.UserError: --method must be one of stn, ..., got 'sdn'. Did you mean 'stn'?
    """
    if options.method not in METHODS:
        raise UserError(
            f"--method must be one of {', '.join(STUDY_METHODS)}, got '{options.method}'."
            f"{suggestion(options.method, STUDY_METHODS)}"
        )
    if options.chosen.linear:
        raise UserError(
            f"--method {options.method} learns the penalties of a linear model; studies train networks: take one of "
            f"{', '.join(STUDY_METHODS)}"
        )
    for name, value, least in (("--seeds", options.seeds, 2), ("--rounds", options.rounds, 2),
                               ("--workers", options.workers, 1)):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if options.budget is not None and options.budget <= 0:
        raise UserError(f"--budget must be positive, got {options.budget:g} s")
    if options.rounds is not None and not options.chosen.search:
        raise UserError(f"--rounds applies to tpe and random: '{options.method}' learns within one training")
