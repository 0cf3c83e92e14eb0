"""The ledger: what each laptop-scale study found, one JSON file a study, and the checks that keep it true."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema

from ..papers.catalogue import Card, load_cards
from .files import write_atomically
from .record import claims_by_id, ledger_entry, seeds_of, verdict_entry
from .study import Study, judge_claims, protocol_of
from .study_words import labels_of, verdict_sentence

_SUMMARY = ("id", "statement", "verdict", "qualifier")
SCHEMA_FILE = "ledger.schema.json"
_REGISTERED = ("kind", "primary", "statement", "unit", "margin", "non_inferiority")


class LedgerError(ValueError):
    """A record may not enter the ledger."""


def export(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write a record to `FOLDER/SLUG.json`: every verdict, as it came out.

    Raises:
        LedgerError: for a run at another scale than "laptop", or not as the card registers it.
    """
    slug = record["slug"]
    if record["scale"] != "laptop":
        raise LedgerError(f"{slug}: only runs at laptop scale enter the ledger, this one is '{record['scale']}'")
    if not record["as_registered"]:
        raise LedgerError(
            f"{slug}: run with other seeds or settings than the card registers; it does not enter the ledger"
        )
    entry = _with_replay(ledger_entry(record), read_ledger(folder).get(slug))
    validate(entry, slug)
    return write_entry(entry, folder)


def _with_replay(entry: dict[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a replay of the same trials found stays: its stamp, and exact claims as they were computed again."""
    if known is None or "replay" not in known or known["fingerprint"] != entry["fingerprint"]:
        return entry
    if any(arm["metrics"] != entry["arms"].get(name, {}).get("metrics") for name, arm in known["arms"].items()):
        return entry
    again = {claim["id"]: claim for claim in known["claims"] if claim["kind"] == "exact"}
    claims = [again.get(claim["id"], claim) for claim in entry["claims"]]
    return {**entry, "claims": claims, "replay": known["replay"]}


def write_entry(entry: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `FOLDER/SLUG.json` with sorted keys."""
    text = json.dumps(entry, sort_keys=True, indent=1, allow_nan=False)
    return write_atomically(Path(folder) / f"{entry['slug']}.json", text + "\n")


def read_ledger(folder: str | Path) -> dict[str, dict[str, Any]]:
    """All entries by slug.

    Raises:
        LedgerError: for a file that is no JSON, naming it.
    """
    entries = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            entries[path.stem] = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise LedgerError(f"{path}: {error}") from error
    return entries


def validate(entry: Mapping[str, Any], slug: str) -> None:
    """Raise unless an entry fits the schema.

    Raises:
        LedgerError: naming the place, and what is wrong there.
    """
    schema = json.loads(files(__package__).joinpath(SCHEMA_FILE).read_text("utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    error = jsonschema.exceptions.best_match(validator.iter_errors(entry))
    if error is not None:
        place = "/".join(str(part) for part in error.absolute_path) or "the top"
        raise LedgerError(f"{slug}: at {place}: {error.message[:200]}")


def faults(entry: Mapping[str, Any], card: Card, study: Study) -> list[str]:
    """What is wrong with an entry: it does not fit the schema, or says other things than its card or its own numbers.

    The claims are computed again from the per-seed metrics, and the verdicts from the claims.

    Returns:
        One sentence a fault; none for an entry that is right.
    """
    try:
        validate(entry, card.slug)
    except LedgerError as error:
        return [str(error)]
    found = _differs_from_card(entry, card)
    if not found:
        found = _differs_from_numbers(entry, card, study)
    return [f"{card.slug}: {fault}" for fault in found]


def _differs_from_card(entry: Mapping[str, Any], card: Card) -> list[str]:
    protocol = protocol_of(card)
    claims, registered = claims_by_id(entry), {claim.id: claim for claim in card.claims}
    found = []
    if entry["slug"] != card.slug:
        found.append(f"the file says slug '{entry['slug']}'")
    if set(claims) != set(registered):
        found.append(f"claims differ from the card's: {sorted(set(claims) ^ set(registered))}")
    for name in set(claims) & set(registered):
        for key in _REGISTERED:
            if claims[name][key] != getattr(registered[name], key):
                found.append(
                    f"claim '{name}': {key} is not what the card registers ({getattr(registered[name], key)!r})"
                )
    if entry["seeds"] != protocol.evaluation_seeds:
        found.append(f"seeds differ from the {protocol.seeds} that the card registers")
    if set(entry["arms"]) != set(protocol.arms):
        found.append(f"arms differ from the card's: {sorted(set(entry['arms']) ^ set(protocol.arms))}")
    for name in set(entry["arms"]) & set(protocol.arms):
        arm, rounds = protocol.arms[name], entry["arms"][name]["tuning"]["rounds"]
        wanted = protocol.arms[arm.trials_of].rounds if arm.trials_of else arm.rounds
        if rounds != wanted:
            found.append(f"arm '{name}' was tuned by {rounds} trials, the card registers {wanted}")
    return found


def _differs_from_numbers(entry: Mapping[str, Any], card: Card, study: Study) -> list[str]:
    seeds = seeds_of(entry, protocol_of(card).worst)
    statistical = [claim for claim in card.claims if claim.kind in ("effect", "equivalence")]
    verdicts = judge_claims(study, card, seeds, claims=statistical)
    claims = claims_by_id(entry)
    found = []
    for claim in statistical:
        again = verdict_entry(verdicts[claim.id])
        found += [
            f"claim '{claim.id}': {key} says {claims[claim.id].get(key)!r}, but its own numbers give {value!r}"
            for key, value in again.items()
            if not _close(value, claims[claim.id].get(key))
        ]
    return found


def _close(a: Any, b: Any) -> bool:
    """Equal but for the rounding of the metrics that a ledger keeps."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    if numbers and not isinstance(a, bool) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-7)
    return bool(a == b)


def summary(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the catalogue shows of the ledger: each paper's primary claim, small enough to ship with the package."""
    lines = {}
    for slug, entry in sorted(entries.items()):
        claim = next((c for c in entry["claims"] if c["primary"]), None)
        if claim is not None:
            sentence = verdict_sentence(claim, entry["scale"], entry["seeds"], labels_of(entry))
            lines[slug] = {"date": entry["date"], "sentence": sentence, **{key: claim[key] for key in _SUMMARY}}
            card = load_cards().get(slug)
            beside = card.beside if card is not None else ""
            if other := next((c for c in entry["claims"] if c["id"] == beside), None):
                words = verdict_sentence(other, entry["scale"], entry["seeds"], labels_of(entry))
                lines[slug]["beside"] = {"statement": other["statement"], "sentence": words}
    return lines


__all__ = ["LedgerError", "export", "faults", "read_ledger", "summary", "validate", "write_entry"]
