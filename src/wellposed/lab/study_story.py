"""What the paper says, what was seen here, and why the two may differ: sentences drawn from the card and the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..papers.catalogue import Card, Claim
from .study_arms import METHOD, headline, published_rows
from .study_claims import joined_claims
from .study_words import capital, deciding, labels_of, plural, typeset, verdict_sentence

_ANSWERED = ("supported", "refuted", "holds", "fails")


def answer(record: Mapping[str, Any], card: Card) -> tuple[str, str]:
    """The page's first sentence, and the claim that it answers ("" at paper scale)."""
    if record["scale"] == "paper":
        return _beside_published(record, card), ""
    primary = next((entry for entry, _ in joined_claims(record, card) if entry["primary"]), None)
    if primary is None:
        return "This study registers no primary claim.", ""
    said = typeset(verdict_sentence(primary, record["scale"], record["seeds"], labels_of(record)))
    return f"{capital(said)}.", primary["statement"]


def _beside_published(record: Mapping[str, Any], card: Card) -> str:
    count = plural(len(record["seeds"]), "seed")
    row = next((row for row in published_rows(record, card) if row["role"] == METHOD), None)
    if row is None:
        return f"{card.name} in its published configuration, {count}."
    label = headline(record)[1]
    return f"{capital(row['label'])} reaches {row['ours']} ({label}); published: {row['published']}. {capital(count)}, no verdict."


def story(record: Mapping[str, Any], card: Card) -> dict[str, Any]:
    """The three columns, with the line above them."""
    claims, labels = joined_claims(record, card), labels_of(record)
    said = [verdict_sentence(entry, record["scale"], record["seeds"], labels) for entry, _ in claims]
    pairs = [(claim, capital(typeset(text))) for (_, claim), text in zip(claims, said, strict=True)]
    return {
        "agreement": _agreement(claims, record["scale"]),
        "pairs": [{"statement": claim.statement, "seen": seen} for claim, seen in pairs],
        "why": _why(record, card, claims),
    }


def _agreement(claims: list[tuple[dict[str, Any], Claim]], scale: str) -> str:
    words = [entry["verdict"] for entry, _ in claims if entry["kind"] != "scale"]
    against = sum(word in ("refuted", "fails") for word in words)
    answered = sum(word in _ANSWERED for word in words)
    if scale == "smoke":
        return "Nothing was judged: this was a smoke run."
    if not answered:
        return "No claim could be decided here."
    undecided = words.count("inconclusive")
    rest = f" {undecided} could not be decided." if undecided else ""
    of = f"{answered - against} of {plural(len(words), 'claim')} that can be tested here came out as the paper says"
    if not against:
        return f"Where both speak they agree: {of}.{rest}"
    return f"{of}, {against} did not.{rest}"


def _why(record: Mapping[str, Any], card: Card, claims: list[tuple[dict[str, Any], Claim]]) -> list[str]:
    """Reasons, each from the data; the most general first."""
    found = [f"Scale. This ran on: {record['protocol']['problem']}."]
    published = [claim.statement for _, claim in claims if claim.kind == "scale"]
    if published:
        found[0] += f" The paper's own: {' '.join(published)}"
    found += [_tuning(record, claims), *_missed_regimes(claims)]
    if close := _close(claims):
        found.append(close)
    found += [f"Deviation from the paper. {text}" for text in card.deviations]
    return [text for text in found if text]


def _tuning(record: Mapping[str, Any], claims: list[tuple[dict[str, Any], Claim]]) -> str:
    """That baselines are tuned as the method is, and what it did for the strongest rival."""
    tuned = [name for name, arm in record["arms"].items() if arm["tuning"]["rounds"]]
    if not tuned or record["scale"] == "smoke":
        return ""
    protocol = record["protocol"]
    text = (
        f"Baselines. {plural(len(tuned), 'arm')}, baselines as well as the method, chose among "
        f"{protocol['tuning_rounds']} configurations each (its own number where the card says so), on "
        f"{plural(protocol['tuning_seeds'], 'seed')} that the evaluation does not use; a published baseline may not have been "
        "tuned so."
    )
    primary = next((entry for entry, _ in claims if entry["primary"]), None)
    weakest = deciding(primary) if primary is not None else None
    rival = record["arms"].get(weakest.name) if weakest is not None else None
    if rival is not None:
        before, after = rival["tuning"]["default_score"], rival["tuning"]["score"]
        if before is not None and after is not None and after > before:
            text += (
                f" Tuning took the validation score of {rival['label']} from {before:.4g} (defaults) to {after:.4g}."
            )
    return text


def _missed_regimes(claims: list[tuple[dict[str, Any], Claim]]) -> list[str]:
    """What of the phenomenon is not there at this scale, once each."""
    missed: dict[str, str] = {}
    for entry, _ in claims:
        for condition in entry.get("regime", []):
            if not condition["holds"]:
                value = "no number" if condition["value"] is None else f"{condition['value']:.3g}"
                missed[condition["text"]] = value
    return [typeset(f"The phenomenon. Asked was: {text}; found was {value}.") for text, value in missed.items()]


def _close(claims: list[tuple[dict[str, Any], Claim]]) -> str:
    judged = [entry for entry, _ in claims if entry["verdict"] == "inconclusive" and not entry["qualifier"]]
    open_ = [entry["id"] for entry in judged]
    if not open_:
        return ""
    return (
        f"Noise. The seeds do not decide {', '.join(open_)}: the number of seeds was fixed before the run, and is not raised "
        "after looking."
    )


def scales(card: Card) -> list[dict[str, Any]]:
    """How to run the study at each scale, with what that needs."""
    paper, run = card.protocol.get("paper"), f"wellposed run {card.slug}"
    published = {
        "name": "paper",
        "command": "",
        "notes": ["Not offered: the card writes down no published configuration."],
    }
    if paper is not None:
        needs = [f"Data: {paper['data']}.", f"Cost: {paper['cost']}."]
        published = {
            "name": "paper",
            "command": f"{run} --scale paper",
            "notes": ["The published configuration.", *needs],
        }
    smoke = "Every arm and claim, end to end, in seconds. It shows that they run; nothing is judged."
    laptop = f"As registered, with verdicts{f': {card.cost}' if card.cost else ''}. A killed run goes on where it was."
    return [
        {"name": "smoke", "command": f"{run} --scale smoke", "notes": [smoke]},
        {"name": "laptop", "command": run, "notes": [laptop]},
        published,
    ]
