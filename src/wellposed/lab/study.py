"""`Study`: a paper's claims as a runnable experiment, and the judging of them from finished trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..papers.catalogue import Card, Claim
from .protocol import Protocol, parse_protocol
from .trial import Outcome, Trial, TrialResult
from .verdicts import LEVEL, Case, Condition, Verdict, judge_effect, judge_equivalence, judge_exact, secondary_level
from .worker import TrialFunction

if TYPE_CHECKING:
    from .tune_problem import TuneProblem

__all__ = [
    "Case", "Condition", "Figure", "MissingTrial", "Protocol", "Seed", "Study", "TrialResult", "TuneOffer",
    "claim_values", "judge_claims", "protocol_of",
]  # fmt: skip


class MissingTrial(LookupError):
    """A claim needs a trial that failed, or that was never run."""


class Metrics(Mapping[str, float]):
    """The metrics of one trial; those of a diverged one are the worst values that the card names.

    Example:
        >>> Metrics("ce", 1000, Outcome("diverged"), {"accuracy": 0.1})["accuracy"]
        0.1
    """

    def __init__(self, arm: str, seed: int, outcome: Outcome | None, worst: Mapping[str, float]) -> None:
        self.where, self.outcome, self.worst = f"arm {arm!r}, seed {seed}", outcome, worst

    @property
    def diverged(self) -> bool:
        """Whether training left the finite numbers."""
        return self.outcome is not None and self.outcome.status == "diverged"

    def __getitem__(self, name: str) -> float:
        if self.outcome is None or self.outcome.status == "failed":
            raise MissingTrial(f"the trial of {self.where} {'is missing' if self.outcome is None else 'failed'}")
        found = self.outcome.metrics.get(name)
        if not self.diverged and found is None:
            raise KeyError(f"the trial of {self.where} has no metric {name!r}; it has {sorted(self.outcome.metrics)}")
        if found is not None and math.isfinite(found):
            return found
        if name not in self.worst:
            raise KeyError(f"{name!r} of {self.where} is not finite, and [protocol.worst] does not say what it counts")
        return self.worst[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.worst if self.diverged or self.outcome is None else self.outcome.metrics)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Seed(Mapping[str, Metrics]):
    """The trials of ONE seed: `seed["elr"]["accuracy"]`."""

    def __init__(self, number: int, outcomes: Mapping[str, Outcome | None], worst: Mapping[str, float]) -> None:
        self.number, self.outcomes, self.worst = number, outcomes, worst

    def __getitem__(self, arm: str) -> Metrics:
        if arm not in self.outcomes:
            raise KeyError(f"the study has no arm {arm!r}; it has {sorted(self.outcomes)}")
        return Metrics(arm, self.number, self.outcomes[arm], self.worst)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)


@dataclass(frozen=True)
class Figure:
    """A figure of a study's page: an `<svg>` element with the words around it."""

    title: str
    caption: str
    svg: str


Estimand = Callable[[Seed], float | Mapping[str, float]]
Regime = Callable[[Sequence[Seed]], Sequence[Condition]]
ExactClaim = Callable[[], Sequence[Case]]
TuneOffer = Callable[[Trial], "TuneProblem"]


@dataclass(frozen=True)
class Study:
    """What a module in `wellposed.studies` defines; claims, arms and budgets stand in the card of the same slug.

    Attributes:
        slug: of the paper.
        run: trains and measures one trial; a top-level function, so that worker processes can import it.
        estimands: by claim: from the trials of one seed to a number, or to one number a contrast; positive is as the
            paper says.
        regimes: by claim: from all seeds to the conditions that show the phenomenon here, on baselines alone.
        exact: by claim: the cases of an identity or a bound, smallest first.
        headline: metric of the page's first figure, and its words: ("accuracy", "test accuracy, points").
        needs: data sets that the laptop scale reads and that are no part of a dependency, as in `wellposed data list`.
        prepare: looks for what the protocol's arms need, before any training at laptop or paper scale, and raises
            `DatasetError` or `StudyError` where it is missing.
        figures: further figures, from the finished run (see `wellposed.lab.study_run.StudyRun`).
        tunable: offers a trial as a model with data, for methods that learn hyperparameters within a training; a
            top-level function. It raises `NotTunable` for an arm that it does not offer.
    """

    slug: str
    run: TrialFunction
    estimands: Mapping[str, Estimand]
    regimes: Mapping[str, Regime] = field(default_factory=dict)
    exact: Mapping[str, ExactClaim] = field(default_factory=dict)
    headline: tuple[str, str] = ("score", "score")
    needs: tuple[str, ...] = ()
    prepare: Callable[[Protocol], None] | None = None
    figures: Callable[[Any], Sequence[Figure]] | None = None
    tunable: TuneOffer | None = None

    def check(self, card: Card) -> None:
        """Raise unless the module defines just what the card registers.

        Raises:
            ValueError: naming the claim that one of them lacks.
        """
        wanted = {
            "estimands": {c.id for c in card.claims if c.kind in ("effect", "equivalence")},
            "exact": {c.id for c in card.claims if c.kind == "exact"},
        }
        for what, ids in wanted.items():
            found = set(getattr(self, what))
            if found != ids:
                raise ValueError(
                    f"study {self.slug!r}: {what} must cover the claims that the card registers; "
                    f"missing: {sorted(ids - found)}, unknown: {sorted(found - ids)}"
                )
        if unknown := set(self.regimes) - wanted["estimands"]:
            raise ValueError(f"study {self.slug!r}: regimes names unknown claims {sorted(unknown)}")
        if without := {c.id for c in card.claims if c.id in wanted["estimands"] and c.regime} - set(self.regimes):
            raise ValueError(f"study {self.slug!r}: the card registers a regime for {sorted(without)}, the module none")


def protocol_of(card: Card) -> Protocol:
    """The protocol that a card registers.

    Raises:
        ValueError: if it registers none, or a wrong one.
    """
    if not card.protocol:
        raise ValueError(f"{card.slug}: the card registers no [protocol]")
    return parse_protocol(card.protocol, card.slug)


def claim_values(study: Study, claim: Claim, seeds: Sequence[Seed]) -> dict[str, list[float]]:
    """The values of a claim's estimand: one list a contrast, one value a seed.

    Raises:
        MissingTrial: if a trial that it needs failed.
        ValueError: if a value is not finite, naming claim and seed.
    """
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        found = study.estimands[claim.id](seed)
        for name, value in found.items() if isinstance(found, Mapping) else {"": found}.items():
            if not math.isfinite(value):
                raise ValueError(f"claim {claim.id!r}, seed {seed.number}: the estimand {name!r} is {value}")
            columns.setdefault(name, []).append(float(value))
    if any(len(column) != len(seeds) for column in columns.values()):
        raise ValueError(f"claim {claim.id!r}: its contrasts differ from seed to seed: {sorted(columns)}")
    return columns


def claim_level(card: Card, claim: Claim) -> float:
    """Confidence of a claim: 95 % for the primary one, 1 - 0.05/k for each of the k secondary ones."""
    secondary = sum(not c.primary and c.kind in ("effect", "equivalence") for c in card.claims)
    return LEVEL if claim.primary else secondary_level(secondary)


def judge_claims(
    study: Study, card: Card, seeds: Sequence[Seed], claims: Sequence[Claim] | None = None
) -> dict[str, Verdict]:
    """Verdicts on the claims of a card (or on some of them), from the evaluation trials of all its seeds.

    A claim of which a trial failed is inconclusive: nothing is judged on fewer seeds than were registered.
    """
    return {claim.id: _judge(study, card, claim, seeds) for claim in (card.claims if claims is None else claims)}


def _judge(study: Study, card: Card, claim: Claim, seeds: Sequence[Seed]) -> Verdict:
    if claim.kind == "scale":
        return Verdict("not testable here")
    if claim.kind == "exact":
        return judge_exact(study.exact[claim.id]())
    assert claim.margin is not None
    try:
        values = claim_values(study, claim, seeds)
        conditions = study.regimes[claim.id](seeds) if claim.id in study.regimes else []
    except MissingTrial as error:
        return Verdict("inconclusive", str(error))
    level = claim_level(card, claim)
    if claim.kind == "equivalence":
        return judge_equivalence(values, claim.margin, conditions, level, claim.non_inferiority)
    return judge_effect(values, claim.margin, conditions, level)
