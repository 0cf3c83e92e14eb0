"""The claims of a study's record, as its page shows them: verdict, facts, and a forest plot of all contrasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..papers.catalogue import Card, Claim
from .study_arms import contrast_order
from .study_figures import Claimed, EstimateRow, estimate_plot
from .study_words import (
    NumberStyle,
    deciding,
    interval_key,
    labels_of,
    margin_words,
    number_style,
    typeset,
    verdict_sentence,
)
from .verdicts import judge_effect, judge_equivalence

MARKS = {
    "supported": "▲", "holds": "✓", "refuted": "▼", "fails": "✗", "inconclusive": "≈", "not testable here": "–",
    "not judged": "○",
}  # fmt: skip
_TONES = {"supported": "good", "holds": "good", "refuted": "against", "fails": "against"}
_KINDS = {
    "effect": "an effect: every comparison must exceed the margin",
    "equivalence": "an equivalence: every comparison must lie within the margin",
    "non-inferiority": "non-inferiority: no comparison may fall below the margin",
    "exact": "exact: every listed case must hold, no seeds are involved",
    "scale": "a claim about the paper's own scale; shown, never counted",
}


def joined_claims(record: Mapping[str, Any], card: Card) -> list[tuple[dict[str, Any], Claim]]:
    """Every claim of the record with what only its card says."""
    registered = {claim.id: claim for claim in card.claims}
    found = []
    for entry in record["claims"]:
        claim = registered.get(entry["id"]) or Claim(entry["id"], "scale", entry["statement"])
        word = "not testable here" if entry["kind"] == "scale" else entry["verdict"]
        found.append(({**entry, "verdict": word, "non_inferiority": claim.non_inferiority}, claim))
    return found


def claim_views(record: Mapping[str, Any], card: Card, order: Sequence[str]) -> list[dict[str, Any]]:
    """What the page shows of each claim, in the card's order, the primary one first."""
    found = [_view(entry, claim, record, order) for entry, claim in joined_claims(record, card)]
    return sorted(found, key=lambda view: not view["primary"])


def _view(entry: dict[str, Any], claim: Claim, record: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    labels = labels_of(record)
    style = number_style(entry)
    names = contrast_order(entry, order)
    return {
        "id": entry["id"],
        "statement": entry["statement"],
        "primary": entry["primary"],
        "verdict": verdict_words(entry, record["scale"]),
        "qualifier": entry["qualifier"] if deciding(entry) is not None else "",
        "mark": MARKS[entry["verdict"]],
        "tone": _TONES.get(entry["verdict"], "open"),
        "short": typeset(short_numbers(entry, style)),
        "rest": _rest(entry, record, labels),
        "facts": _facts(entry, claim, style, record["scale"]),
        "command": entry.get("command", ""),
        "forest": [_forest(entry, names, labels, style, narrow) for narrow in (False, True)] if names else [],
        "rows": [_numbers(entry, name, labels, style) for name in names],
        "judged": deciding(entry) is not None,
    }


def _rest(entry: Mapping[str, Any], record: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The verdict's sentence without the words of the verdict, which the page sets apart."""
    sentence = verdict_sentence(entry, record["scale"], record["seeds"], labels)
    return typeset(sentence.removeprefix(verdict_words(entry, record["scale"])))


def verdict_words(entry: Mapping[str, Any], scale: str) -> str:
    """The word, with its scale where it depends on one: "refuted at laptop scale"."""
    word: str = entry["verdict"]
    return f"{word} at {scale} scale" if word in ("supported", "refuted", "inconclusive") else word


def short_numbers(entry: Mapping[str, Any], style: NumberStyle) -> str:
    """The numbers of a claim for a table."""
    found = deciding(entry)
    if found is not None:
        return f"{style.estimate(found.estimate)} {style.interval(found.low, found.high)}"
    return f"{entry['cases']:,} cases" if entry.get("cases") else ""


def _facts(entry: Mapping[str, Any], claim: Claim, style: NumberStyle, scale: str) -> list[tuple[str, list[str]]]:
    """What was computed, against which margin and for what reason, in which regime, how sure."""
    kind = "non-inferiority" if entry["non_inferiority"] else entry["kind"]
    facts = [("kind", [_KINDS[kind]])]
    if claim.estimand:
        facts.append(("computed", [claim.estimand]))
    if entry["margin"] is not None:
        unit = f" {style.unit}" if style.form == "plain" and style.unit and entry["margin"] else ""
        reason = f": {claim.reason}" if claim.reason else ""
        facts.append(("margin", [f"{margin_words(entry, style)}{unit}{reason}"]))
    if entry.get("regime"):
        facts.append(("regime", [_condition(found) for found in entry["regime"]]))
    elif claim.regime and entry["kind"] in ("effect", "equivalence"):
        facts.append(("regime", [f"{claim.regime} (not judged{' at smoke scale' if scale == 'smoke' else ''})"]))
    if deciding(entry) is not None:
        facts.append(("how sure", [_certainty(entry)]))
    return [(name, [typeset(line) for line in lines]) for name, lines in facts]


def _condition(found: Mapping[str, Any]) -> str:
    value = "not a number" if found["value"] is None else f"{found['value']:.3g}"
    return f"{found['text']}: found {value}, {'holds' if found['holds'] else 'does not hold'}"


def _certainty(entry: Mapping[str, Any]) -> str:
    """At which level the intervals were drawn, and the other test that must agree."""
    contrasts, level, found = entry["contrasts"], entry["level"], deciding(entry)
    assert found is not None
    text = f"intervals at {_percent(level)}"
    if len(contrasts) > 1:
        joint = f"{_percent(1 - (1 - level) / len(contrasts))}, so that all {len(contrasts)} hold together at {_percent(level)}"
        text = (
            f"intervals at {joint}"
            if entry["verdict"] == "refuted"
            else f"{text} each; to refute they are drawn at {joint}"
        )
    label = "" if len(contrasts) == 1 else " of the comparison that decides"
    return f"{text}; sign-flip p at the margin{label}: {_p(contrasts[found.name]['sign_flip_p'])}"


def _forest(
    entry: Mapping[str, Any], names: Sequence[str], labels: Mapping[str, str], style: NumberStyle, narrow: bool
) -> str:
    rows = [_row(entry, name, labels, style) for name in names]
    margin, log = entry["margin"], style.form != "plain"
    two_sided = entry["kind"] == "equivalence" and not entry["non_inferiority"]
    low = -margin if entry["kind"] == "equivalence" else margin
    claimed = Claimed(low, margin if two_sided else None, typeset(f"margin {margin_words(entry, style)}"))
    unit = ("per cent" if style.form == "percent" else "ratio") + ", on a log scale" if log else entry["unit"]
    words = "tinted: as claimed" if two_sided else "right of the margin: as claimed"
    title = f"Claim {entry['id']}: {len(names)} comparison{'s' if len(names) > 1 else ''} with intervals and margin"
    x_label = f"{unit} ({words})" if unit else words
    return estimate_plot(rows, x_label, title, narrow, claimed, style.form, key=f"claim{entry['id']}")


def _row(entry: Mapping[str, Any], name: str, labels: Mapping[str, str], style: NumberStyle) -> EstimateRow:
    contrast = entry["contrasts"][name]
    label, values = _label(entry, name, labels), [v for v in contrast["values"] if v is not None]
    if "interval" not in contrast:
        return EstimateRow(label, values, None, "not judged")
    low, high = contrast[interval_key(entry)]
    numbers = typeset(f"{style.number(contrast['estimate'])} {style.interval(low, high)}")
    return EstimateRow(label, values, (contrast["estimate"], low, high), numbers, _says(entry, values))


def _label(entry: Mapping[str, Any], name: str, labels: Mapping[str, str]) -> str:
    if not name:
        return "all seeds"
    return f"over {labels[name]}" if entry["kind"] == "effect" and name in labels else labels.get(name, name)


def _says(entry: Mapping[str, Any], values: Sequence[float]) -> str:
    """What one comparison says by itself: "above" the margin as claimed, "below" it, or neither ("open")."""

    def word(level: float) -> str:
        if entry["kind"] == "effect":
            return judge_effect({"": values}, entry["margin"], level=level).word
        free = entry["non_inferiority"]
        return judge_equivalence({"": values}, entry["margin"], level=level, non_inferiority=free).word

    if word(entry["level"]) == "supported":
        return "above"
    return "below" if word(1 - (1 - entry["level"]) / len(entry["contrasts"])) == "refuted" else "open"


def _numbers(entry: Mapping[str, Any], name: str, labels: Mapping[str, str], style: NumberStyle) -> dict[str, Any]:
    """A line of the table behind the forest plot."""
    contrast = entry["contrasts"][name]
    values = [("–" if v is None else typeset(style.number(v))) for v in contrast["values"]]
    line = {"label": _label(entry, name, labels), "values": values}
    if "interval" in contrast:
        line |= {
            "estimate": typeset(style.estimate(contrast["estimate"])),
            "interval": typeset(style.interval(*contrast["interval"])),
            "refuting": typeset(style.interval(*contrast["refuting_interval"])),
            "p": _p(contrast["sign_flip_p"]),
        }
    return line


def _p(p: float) -> str:
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"{p:.3f}"


def _percent(level: float) -> str:
    return f"{100 * level:.4g} %"
