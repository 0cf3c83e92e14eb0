"""What `wellposed tune STUDY` can be asked for, checked before a study is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...lab.trial import Setting
from ..amounts import check_amounts, check_budget
from ..errors import UserError
from ..tune_options import METHODS, JobOptions, check_method

ROUNDS = 8
"""Configurations of a search, as many as `wellposed tune DATA` trains."""

STUDY_METHODS = tuple(name for name, method in METHODS.items() if not method.linear)


@dataclass(frozen=True)
class StudyTuneOptions(JobOptions):
    """How a study's arm is tuned; the rest as in `JobOptions`.

    Attributes:
        arm: of the study; None takes the first of the paper's that has something to tune.
        rounds: configurations of a search; None for its default.
        overrides: settings that are fixed, and not tuned.
    """

    arm: str | None = None
    rounds: int | None = None
    overrides: Mapping[str, Setting] = field(default_factory=dict)

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
    check_method(options.method, STUDY_METHODS)
    if options.chosen.linear:
        raise UserError(
            f"--method {options.method} learns the penalties of a linear model; studies train networks: take one of "
            f"{', '.join(STUDY_METHODS)}"
        )
    check_amounts(("--seeds", options.seeds, 2), ("--rounds", options.rounds, 2), ("--workers", options.workers, 1))
    check_budget(options.budget)
    if options.rounds is not None and not options.chosen.search:
        raise UserError(f"--rounds applies to tpe and random: '{options.method}' learns within one training")
