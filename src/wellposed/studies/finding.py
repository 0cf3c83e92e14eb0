"""Which papers have a study, and finding it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from ..papers.catalogue import find_card, load_cards

if TYPE_CHECKING:
    from ..lab.study import Study


class UnknownStudy(ValueError):
    """A paper has no study yet."""


def studied_papers() -> list[str]:
    """Slugs of the papers that have a study, sorted.

    Example:
        >>> "elr" in studied_papers()
        True
    """
    return [slug for slug in load_cards() if find_spec(_module(slug)) is not None]


def find_study(slug: str, scale: str = "laptop") -> Study:
    """The study of a paper, by slug or acronym.

    Args:
        slug: of the paper.
        scale: "paper" finds the published configuration, any other the study whose claims are judged.

    Raises:
        UnknownPaper: for a paper that is not in the catalogue.
        UnknownStudy: for one whose study is not written yet.
    """
    card = find_card(slug)
    if find_spec(_module(card.slug)) is None:
        raise UnknownStudy(
            f"'{card.slug}' has no study yet (status: {card.status}). Studies: {', '.join(studied_papers())}"
        )
    module = _module(card.slug, "published." if scale == "paper" else "")
    if find_spec(module) is None:
        raise UnknownStudy(f"'{card.slug}' has no published configuration written down yet")
    return cast("Study", import_module(module).STUDY)


def _module(slug: str, room: str = "") -> str:
    return f"{__package__}.{room}{slug.replace('-', '_')}"
