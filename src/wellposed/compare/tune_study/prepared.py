"""`PreparedStudy`: a study's arm, what of it is tuned, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...lab.protocol import Protocol, StudyArm
from ...lab.space import Choice, Range
from ...lab.study import Study
from ...lab.trial import Setting
from ...papers.catalogue import Card
from .options import StudyTuneOptions


@dataclass
class PreparedStudy:
    """A job whose arguments all fit together.

    Attributes:
        study, card, protocol, arm, options: as found.
        space: what a search tunes.
        defaults: settings of the arm as registered.
        ledger: settings that the ledger holds for the arm, or None.
        ledger_rounds: configurations that the ledger's search tried.
        metric: what is compared.
        words: the metric in words.
        learned: settings that a method learns within a training; empty for a search.
        left_out: settings that it could not learn, and why.
        notes: what a reader must know.
    """

    study: Study
    card: Card
    protocol: Protocol
    arm: StudyArm
    options: StudyTuneOptions
    space: Mapping[str, Range | Choice]
    defaults: dict[str, Setting]
    ledger: dict[str, Setting] | None
    ledger_rounds: int
    metric: str
    words: str
    learned: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
