"""A study's numbers and verdicts in words: one wording for the terminal, the page and the ledger."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..papers.catalogue import Card

_FACTOR_FROM = math.log(3)
_MOST_DECIMALS = 6


@dataclass(frozen=True)
class NumberStyle:
    """How the numbers of one claim are written.

    Attributes:
        unit: "points", "%", "", ...; put behind an estimate.
        decimals: after the point.
        form: "plain"; a log ratio as "percent" change, or as a "factor" where that would be hundreds of per cent.
    """

    unit: str
    decimals: int
    form: Literal["plain", "percent", "factor"] = "plain"

    def value(self, number: float) -> float:
        """The number in the form that is shown."""
        return _shown(number, self.form)

    def number(self, number: float) -> str:
        """Signed, without its unit.

        Example:
            >>> NumberStyle("points", 1).number(-0.02), NumberStyle("%", 0, "percent").number(0.29)
            ('+0.0', '+34')
        """
        shown = self.value(number)
        if self.form == "factor":
            return f"{shown:.{self.decimals}f}×" if 1e-4 < shown < 1e5 else f"{shown:.1e}×"
        if shown and (self.decimals >= _MOST_DECIMALS or abs(shown) >= 1e5):
            return f"{shown:+.1e}"
        return f"{round(shown, self.decimals) + 0.0:+.{self.decimals}f}"

    def estimate(self, number: float) -> str:
        """With its unit: "+2.9 points"."""
        return " ".join(part for part in (self.number(number), self.unit) if part)

    def interval(self, low: float, high: float) -> str:
        """Both ends: "[+2.1, +3.7]"."""
        return f"[{self.number(low)}, {self.number(high)}]"

    def exact(self, number: float) -> str:
        """A registered number, which no rounding may change; without its unit, but with its per cent.

        Example:
            >>> NumberStyle("points", 0).exact(0.65), NumberStyle("%", 0, "percent").exact(0.29)
            ('+0.65', '+33.6 %')
        """
        if not number:
            return "0"
        shown = self.value(number)
        if self.form == "factor":
            return f"{shown:.3g}×"
        return f"{shown:+.3g} %" if self.form == "percent" else f"{shown:+g}"


@dataclass(frozen=True)
class Deciding:
    """The contrast on which a verdict rests, with the interval that decided."""

    name: str
    estimate: float
    low: float
    high: float


def interval_key(claim: Mapping[str, Any]) -> str:
    """Which intervals of a claim's contrasts decided: those of refutation are wider where there are several."""
    return "refuting_interval" if claim["verdict"] == "refuted" else "interval"


def deciding(claim: Mapping[str, Any]) -> Deciding | None:
    """The weakest contrast of a judged claim; of a refuted one that which refutes it. None where there is none."""
    contrasts = {name: c for name, c in claim.get("contrasts", {}).items() if c.get("interval")}
    if not contrasts:
        return None
    which, name = interval_key(claim), claim["weakest"]
    if claim["verdict"] == "refuted" and claim["qualifier"] == "above the margin":
        name = max(contrasts, key=lambda n: float(contrasts[n][which][0]))
    elif claim["verdict"] == "refuted":
        name = min(contrasts, key=lambda n: float(contrasts[n][which][1]))
    return Deciding(name, contrasts[name]["estimate"], *contrasts[name][which])


def number_style(claim: Mapping[str, Any]) -> NumberStyle:
    """Decimals that the interval deserves, and that never show a bound on the wrong side of the margin."""
    found = deciding(claim)
    if found is not None:
        numbers = [found.estimate, found.low, found.high]
    else:
        numbers = [v for c in claim.get("contrasts", {}).values() for v in c["values"] if v is not None] or [0.0]
    form: Literal["plain", "percent", "factor"] = "plain"
    if claim.get("unit") == "log ratio":
        form = "factor" if max(map(abs, numbers)) > _FACTOR_FROM else "percent"
    shown = [_shown(n, form) for n in numbers]
    decimals = decimals_for((max(shown) - min(shown)) / 2, max(map(abs, shown)))
    margin = claim.get("margin")
    for bound in (margin, None if margin is None or claim["kind"] != "equivalence" else -margin):
        if bound is not None and found is not None:
            decimals = _apart(shown[1:], _shown(bound, form), decimals)
    unit = {"plain": claim.get("unit") or "", "percent": "%", "factor": ""}[form]
    return NumberStyle(unit, decimals, form)


def decimals_for(half_width: float, size: float = 0.0) -> int:
    """Decimals that a number with this half width deserves: one digit that means something, and one that nearly does.

    Example:
        >>> [decimals_for(half) for half in (30.0, 3.0, 0.8, 0.05, 0.014)]
        [0, 1, 1, 2, 3]
    """
    if not math.isfinite(half_width) or half_width <= 0:
        return 2 if not size else max(0, min(_MOST_DECIMALS, 2 - math.floor(math.log10(size))))
    return max(0 if half_width >= 20 else 1, min(_MOST_DECIMALS, math.ceil(-math.log10(half_width / 2))))


def _apart(numbers: Sequence[float], bound: float, decimals: int) -> int:
    """More decimals, until no rounded number lies on the other side of the bound, or upon it."""

    def misleads(number: float) -> bool:
        return number != bound and (round(number, decimals) - bound) * (number - bound) <= 0

    while decimals < _MOST_DECIMALS - 1 and any(map(misleads, numbers)):
        decimals += 1
    return decimals


def _shown(number: float, form: str) -> float:
    if form == "plain":
        return number
    ratio = math.exp(max(-300.0, min(300.0, number)))
    return ratio if form == "factor" else 100 * (ratio - 1)


def verdict_sentence(
    claim: Mapping[str, Any], scale: str, seeds: int | Sequence[int], labels: Mapping[str, str] | None = None
) -> str:
    """A claim's verdict with its numbers, as every place says it. "Refuted" never stands without its scale.

    Args:
        claim: as `wellposed.lab.record.claim_entry` makes it.
        scale: of the record.
        seeds: evaluation seeds, or their number.
        labels: of the record's arms (see `labels_of`): a contrast named after an arm is a rival, any other is a case.
            Without them every named contrast of an effect counts as a rival.

    Example:
        >>> claim = {"kind": "effect", "verdict": "supported", "qualifier": "", "unit": "points", "margin": 0.0,
        ...          "weakest": "gce", "contrasts": {"gce": {"estimate": 2.9, "interval": [2.1, 3.7]},
        ...                                          "ce": {"estimate": 5.0, "interval": [4.0, 6.0]}}}
        >>> verdict_sentence(claim, "laptop", 12)
        'supported at laptop scale: +2.9 points [+2.1, +3.7] over its strongest rival gce, 12 seeds'
    """
    word, qualifier = claim["verdict"], claim["qualifier"]
    if claim["kind"] == "scale":
        return "not testable here: it needs the paper's own data or models"
    if word == "not judged":
        return f"not judged at {scale} scale"
    if claim["kind"] == "exact":
        return _exact_sentence(claim)
    head, found = f"{word} at {scale} scale", deciding(claim)
    if found is None:
        return f"{head}: {qualifier or 'there is nothing to judge'}"
    style = number_style(claim)
    text = f"{head}{f' ({qualifier})' if qualifier else ''}: {style.estimate(found.estimate)} "
    text += " ".join(
        part for part in (style.interval(found.low, found.high), _against(claim, found.name, labels)) if part
    )
    aside = [f"log ratio {found.estimate:+.2f}"] if style.form != "plain" else []
    if claim["margin"]:
        aside.append(f"margin {margin_words(claim, style)}")
    text += f" ({', '.join(aside)})" if aside else ""
    return f"{text}, {seeds if isinstance(seeds, int) else len(seeds)} seeds"


def _exact_sentence(claim: Mapping[str, Any]) -> str:
    cases, case = claim["cases"], claim.get("counterexample")
    if case is None:
        among = f"in all {cases:,} cases" if cases > 1 else "in its one case"
        return f"holds {among} (largest error {claim['largest_error']:.1e})"
    off = "is not a finite number" if case["error"] is None else f"is off by {case['error']:.1e}"
    return (
        f"fails: {case['name']} {off} (tolerance {case['tolerance']:.0e}; {cases:,} {'cases' if cases > 1 else 'case'})"
    )


def margin_words(claim: Mapping[str, Any], style: NumberStyle) -> str:
    """The margin as a reader needs it: "+1", "±1" for an equivalence, "-1" for non-inferiority."""
    if claim["kind"] != "equivalence":
        return style.exact(claim["margin"])
    if claim.get("non_inferiority"):
        return style.exact(-claim["margin"])
    if style.form == "plain":
        return style.exact(claim["margin"]).replace("+", "±")
    return f"{style.exact(-claim['margin'])} to {style.exact(claim['margin'])}"


def _against(claim: Mapping[str, Any], name: str, labels: Mapping[str, str] | None) -> str:
    if not name:
        return ""
    several = len(claim["contrasts"]) > 1
    label = name if labels is None else labels.get(name, name)
    if claim["kind"] == "effect" and (labels is None or name in labels):
        word = "over" if claim["verdict"] == "supported" else "against"
        # A label of several words needs a comma to be told from the sentence.
        rival = f"its strongest rival{',' if ' ' in label else ''} {label}" if several else label
        return f"{word} {rival}"
    return f"at its weakest, {label}" if several else f"for {label}"


def labels_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The labels of the arms of a record or ledger entry, by name; also by what the names of arms with one label begin
    with: a study that runs a method on several problems compares `soba`, its arms are `soba_r4` and `soba_rnn`.

    Example:
        >>> labels_of({"arms": {"soba_r4": {"label": "SOBA"}, "soba_rnn": {"label": "SOBA"}}})["soba"]
        'SOBA'
    """
    labels = {name: arm["label"] for name, arm in record["arms"].items()}
    stems: dict[str, set[str]] = {}
    for name, label in labels.items():
        parts = name.split("_")
        for end in range(1, len(parts)):
            stems.setdefault("_".join(parts[:end]), set()).add(label)
    return {**{stem: min(found) for stem, found in stems.items() if len(found) == 1}, **labels}


def run_notes(record: Mapping[str, Any], card: Card) -> list[str]:
    """What a reader must know before any number: nothing was judged, not as registered, trials failed."""
    notes, seeds = [], len(record["seeds"])
    if record["scale"] == "smoke":
        notes.append(
            f"A smoke run: it shows that the study runs, on {seeds} seeds and with training cut short. Nothing is judged, "
            "and its numbers say nothing about the method."
        )
    elif record["scale"] == "paper":
        notes.append(
            "Paper scale: the published configuration as it is, untuned. Its numbers stand beside the published ones; "
            "no verdict is drawn, and nothing enters the ledger."
        )
    if not record["as_registered"]:
        registered = card.protocol.get("seeds")
        other = record["scale"] == "laptop" and registered is not None and registered != seeds
        what = f"{seeds} seeds instead of the {registered} in its card" if other else "settings that are not its card's"
        notes.append(f"Not as registered: this run took {what}. It does not enter the ledger.")
    if failed := _failed(record):
        notes.append(failed)
    return notes


def _failed(record: Mapping[str, Any]) -> str:
    where = [
        f"{arm['label']} (seed {seed})"
        for arm in record["arms"].values()
        for seed, status in zip(record["seeds"], arm["status"], strict=True)
        if status in ("failed", "missing")
    ]
    if not where:
        return ""
    errors = [error for arm in record["arms"].values() if "failed" in arm["status"] for error in arm["errors"]]
    total = len(record["seeds"]) * len(record["arms"])
    names = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
    reason = f" The first says: {errors[0]}." if errors else ""
    return (
        f"{len(where)} of {total} evaluation trials failed: {names}.{reason.replace('..', '.')} A claim that needs one of "
        "them is inconclusive. The same command tries them again."
    )


def typeset(text: str) -> str:
    """With a true minus before numbers, as wide as a plus, and true signs of comparison.

    Example:
        >>> typeset("-0.3 [-1.2, +0.6] early-stopped, >= 1e-3")
        '−0.3 [−1.2, +0.6] early-stopped, ≥ 1e-3'
    """
    return re.sub(r"(?<![\w-])-(?=[\d.])", "−", text).replace(">=", "≥").replace("<=", "≤")


def capital(text: str) -> str:
    """With a capital letter first."""
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    """ "1 seed", "1,200 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
