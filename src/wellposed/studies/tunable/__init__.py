"""Studies that offer their training as a model with data, for `wellposed tune`; one module a paper, found by slug.

They stand apart from the studies themselves: an offer changes no trial, so it must not change a study's fingerprint.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ...lab.study import Study, TuneOffer


def find_tunable(slug: str) -> TuneOffer | None:
    """The offer of a study, or None where it makes none.

    Example:
        >>> find_tunable("elr").__name__, find_tunable("maid")
        ('offer', None)
    """
    name = f"{__name__}.{slug.replace('-', '_')}"
    return None if find_spec(name) is None else cast("TuneOffer", import_module(name).offer)


def tunable_papers() -> list[str]:
    """Slugs of the studies that make an offer, sorted.

    Example:
        >>> tunable_papers()
        ['elr', 'nested-dropout', 'ps-kd', 'weight-compander']
    """
    from ..finding import studied_papers

    return [slug for slug in studied_papers() if find_spec(f"{__name__}.{slug.replace('-', '_')}") is not None]


def with_offer(study: Study) -> Study:
    """A study with its offer, unless it brings one of its own."""
    return study if study.tunable is not None else replace(study, tunable=find_tunable(study.slug))
