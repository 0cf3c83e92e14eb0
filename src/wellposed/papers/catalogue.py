"""Cards: what each of the 31 papers claims, when its method helps, and where it stands here."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .reading import build, card_files, read_toml

STATUSES = ("planned", "built")
KINDS = ("effect", "equivalence", "exact", "scale")


class UnknownPaper(ValueError):
    """No card has this slug."""


@dataclass(frozen=True)
class Claim:
    """One pre-registered claim.

    Attributes:
        id: short name.
        kind: "effect", "equivalence", "exact" or "scale".
        statement: the claim in one sentence.
        primary: whether it decides the paper's line in the README.
        estimand: what is computed from the trials of one seed.
        margin: smallest value that would still support the claim; None for exact and scale.
        reason: of the margin.
        regime: what must hold for the baseline, so that the phenomenon exists here.
        unit: of the estimand: "points", "log ratio", ...
        non_inferiority: of an equivalence: only the lower bound counts.
        command: of a scale claim: what would test it, where the data and the machines are.
    """

    id: str
    kind: str
    statement: str
    primary: bool = False
    estimand: str = ""
    margin: float | None = None
    reason: str = ""
    regime: str = ""
    unit: str = ""
    non_inferiority: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"claim {self.id!r}: kind must be one of {list(KINDS)}, got {self.kind!r}")
        if self.kind in ("effect", "equivalence") and self.margin is None:
            raise ValueError(f"claim {self.id!r}: an {self.kind} needs a margin")


@dataclass(frozen=True)
class Card:
    """One paper. Attributes are the keys of its TOML file; see `docs/architecture.md`.

    `beside` names a claim whose verdict must stand beside the primary one wherever that is shown alone.
    """

    slug: str
    name: str
    acronyms: tuple[str, ...]
    title: str
    authors: tuple[str, ...]
    arxiv: str
    date: str
    acts_on: str
    summary: str
    use_when: str
    not_when: str
    try_first: str
    status: str = "planned"
    venue: str = ""
    organisation: str = ""
    symbols: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    applies_to: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    reference_code: str = ""
    deviations: tuple[str, ...] = ()
    study: str = ""
    cost: str = ""
    claims: tuple[Claim, ...] = ()
    beside: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"{self.slug}: status must be one of {list(STATUSES)}, got {self.status!r}")
        if not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv):
            raise ValueError(f"{self.slug}: arxiv must read like 2007.00151, got {self.arxiv!r}")
        if not re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", self.date):
            raise ValueError(f"{self.slug}: date must read YYYY-MM or YYYY-MM-DD, got {self.date!r}")
        if sum(claim.primary for claim in self.claims) > 1:
            raise ValueError(f"{self.slug}: only one claim may be primary")
        if self.beside and self.beside not in {claim.id for claim in self.claims}:
            raise ValueError(f"{self.slug}: beside must name a claim, got {self.beside!r}")

    @property
    def year(self) -> str:
        """Year of the first version."""
        return self.date[:4]


@cache
def load_cards() -> dict[str, Card]:
    """All cards by slug, sorted.

    Raises:
        ValueError: for a wrong card, naming file and key.

    Example:
        >>> load_cards()["elr"].arxiv
        '2007.00151'
    """
    cards: dict[str, Card] = {}
    for path in card_files():
        if path.stem == "everyday":
            continue
        entry = {key: value for key, value in read_toml(path).items() if key != "arms"}
        claims = [build(Claim, c, f"{path.name}: claim {c.get('id')!r}") for c in entry.pop("claims", [])]
        card = build(Card, {**entry, "claims": claims}, path.name)
        if card.slug != path.stem:
            raise ValueError(f"{path.name}: slug must equal the file's name, got {card.slug!r}")
        cards[card.slug] = card
    return cards


def find_card(slug: str) -> Card:
    """The card of a slug (or of an acronym, in any case).

    Raises:
        UnknownPaper: with the nearest slug.

    Example:
        >>> find_card("ELR").slug
        'elr'
    """
    cards = load_cards()
    wanted = slug.strip().lower()
    names = {alias.lower(): card for card in cards.values() for alias in (*card.acronyms, card.name)}
    names.update(cards)
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{names[near[0]].slug}'?" if near else ""
    raise UnknownPaper(f"no paper '{slug}'.{hint} List them with: wellposed papers")
