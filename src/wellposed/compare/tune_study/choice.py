"""What is tuned: the study's arm, its registered defaults, and the settings that the ledger holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...datasets.registry import find_dataset, is_installed
from ...lab.protocol import Protocol, StudyArm
from ...lab.study import Study, protocol_of
from ...lab.trial import Setting
from ...papers.catalogue import Card, load_cards
from ..errors import UserError, suggestion
from .options import StudyTuneOptions, check_study_options
from .prepared import PreparedStudy
from .rehearsal import rehearse_study

LEDGERS = (Path("results"), Path(__file__).parents[4] / "results")
"""Where the ledger may be: here, or in the checkout that this package runs from."""


def prepare_study(study: Study, card: Card, options: StudyTuneOptions, offered: Sequence[str] = ()) -> PreparedStudy:
    """Check everything that can be checked without training, and rehearse a method that learns within one.

    Args:
        study: with its offer, where it makes one.
        card: of the same paper.
        options: what to do.
        offered: slugs of the studies that make an offer, for messages.

    Raises:
        UserError: naming what does not fit, and what is allowed.
    """
    check_study_options(options)
    protocol = protocol_of(card)
    arm = _arm(card, protocol, options.arm)
    _check_overrides(arm, protocol, options.overrides)
    if not options.chosen.search and study.tunable is None:
        raise UserError(
            f"--method {options.method} learns within a training, and '{card.slug}' does not offer its own as a model "
            f"with data; {', '.join(offered)} do. For '{card.slug}' take --method tpe or random"
        )
    for name in study.needs:
        if not is_installed(entry := find_dataset(name)):
            raise UserError(entry.how_to_get)
    if study.prepare is not None:
        study.prepare(protocol)
    kept = ledger_entry(card.slug)
    metric = arm.metric or study.headline[0]
    prepared = PreparedStudy(
        study, card, protocol, arm, options,
        {name: part for name, part in arm.space.items() if name not in options.overrides},
        default_settings(arm, protocol, kept) | dict(options.overrides),
        *_of_ledger(arm, kept, options.overrides),
        metric,
        study.headline[1] if metric == study.headline[0] and ";" not in study.headline[1] else metric.replace("_", " "),
    )  # fmt: skip
    if not prepared.space:
        raise UserError(f"--set fixes all that the arm '{arm.name}' could tune: {', '.join(arm.space)}")
    if options.overrides:
        fixed = ", ".join(f"{name}={value}" for name, value in options.overrides.items())
        prepared.notes.append(f"fixed in every arm by --set: {fixed}")
    if prepared.ledger == prepared.defaults:
        prepared.ledger = None
        prepared.notes.append(
            f"the ledger's settings, the best of {prepared.ledger_rounds} configurations, are the registered defaults"
        )
    elif prepared.ledger is None:
        prepared.notes.append(f"no results/{card.slug}.json here: the ledger's settings are not compared")
    if not options.chosen.search:
        rehearse_study(prepared)
    return prepared


def tunable_arms(protocol: Protocol) -> list[str]:
    """Arms that have something to tune, the paper's own first."""
    names = [name for name, arm in protocol.arms.items() if arm.space]
    return sorted(names, key=lambda name: protocol.arms[name].role != "method")


def default_settings(arm: StudyArm, protocol: Protocol, entry: Mapping[str, Any] | None) -> dict[str, Setting]:
    """The arm's registered defaults.

    What it takes from another arm's tuned settings comes from the ledger, and where there is none, from the defaults of
    that arm.
    """
    base: dict[str, Setting] = {}
    if arm.settings_of:
        kept = None if entry is None else entry["arms"].get(arm.settings_of)
        base = dict(kept["settings"]) if kept else default_settings(protocol.arms[arm.settings_of], protocol, entry)
    return {**base, **arm.fixed, **{name: part.middle() for name, part in arm.space.items()}}


def ledger_entry(slug: str) -> dict[str, Any] | None:
    """What the ledger holds of a study, or None."""
    for folder in LEDGERS:
        path = folder / f"{slug}.json"
        if path.is_file():
            try:
                entry: dict[str, Any] = json.loads(path.read_text("utf-8"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is no ledger entry ({error}); write it anew with: wellposed ledger") from error
            return entry
    return None


def _of_ledger(
    arm: StudyArm, entry: Mapping[str, Any] | None, overrides: Mapping[str, Setting]
) -> tuple[dict[str, Setting] | None, int]:
    found = None if entry is None else entry["arms"].get(arm.name)
    if found is None:
        return None, 0
    return {**found["settings"], **overrides}, int(found["tuning"]["rounds"])


def _arm(card: Card, protocol: Protocol, wanted: str | None) -> StudyArm:
    tunable = tunable_arms(protocol)
    if not tunable:
        others = [slug for slug, other in load_cards().items() if other.protocol and tunable_arms(protocol_of(other))]
        raise UserError(f"no arm of '{card.slug}' has anything to tune. Studies that have: {', '.join(others)}")
    if wanted is None:
        return protocol.arms[tunable[0]]
    if wanted not in protocol.arms:
        raise UserError(
            f"--arm: '{card.slug}' has no arm '{wanted}'.{suggestion(wanted, protocol.arms)} With something to tune: "
            f"{', '.join(tunable)}"
        )
    if wanted not in tunable:
        raise UserError(f"--arm: '{wanted}' has nothing to tune; with something to tune: {', '.join(tunable)}")
    return protocol.arms[wanted]


def _check_overrides(arm: StudyArm, protocol: Protocol, overrides: Mapping[str, Setting]) -> None:
    known = sorted({*arm.fixed, *arm.space, *protocol.smoke})
    for name in overrides:
        if name not in known:
            raise UserError(
                f"--set: no setting '{name}' in the arm '{arm.name}'.{suggestion(name, known)} It has: "
                f"{', '.join(known)}"
            )
