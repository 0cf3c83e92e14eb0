"""What the ledger says of each paper's primary claim, in words; read from a file that `wellposed ledger` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "verdicts.json"
CHANCE = 0.05
"""A primary claim is judged at 95 %: at most this share of verdicts with a direction are wrong by chance."""


@cache
def load_verdicts() -> dict[str, dict[str, Any]]:
    """The primary verdict of each studied paper, by slug; empty before the first study."""
    path = files(__package__).joinpath(FILE)
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return found


def verdict_sentence(claim: Mapping[str, Any], scale: str, seeds: int) -> str:
    """A verdict in one clause, never without its scale.

    Args:
        claim: an entry of a record's or the ledger's claims.
        scale: of the run.
        seeds: how many evaluation seeds it rests on.

    Example:
        >>> claim = {"verdict": "supported", "qualifier": "", "estimate": 2.9, "interval": [2.1, 3.7], "unit": "points",
        ...          "weakest": "gce", "contrasts": 4}
        >>> verdict_sentence(claim, "laptop", 12)
        'supported at laptop scale: +2.9 points [+2.1, +3.7] over the strongest rival (gce), 12 seeds'
    """
    word, qualifier = claim["verdict"], claim.get("qualifier", "")
    if word == "not testable here":
        return "not testable here"
    if word == "not judged":
        return f"not judged: {scale} scale shows that everything runs, no more"
    said = f"{word} at {scale} scale" + (f" ({qualifier})" if qualifier else "")
    if claim.get("estimate") is None:
        return f"{said}, {claim['cases']} cases" if claim.get("cases") else said
    contrasts = claim.get("contrasts", 1)
    many = (contrasts if isinstance(contrasts, int) else len(contrasts)) > 1
    rival = f" over the strongest rival ({claim['weakest']})" if many and claim.get("weakest") else ""
    return f"{said}: {estimate_words(claim)}{rival}, {seeds} seeds"


def estimate_words(claim: Mapping[str, Any]) -> str:
    """An estimate with its interval and unit; a log ratio as a percentage, which is how people read it.

    Example:
        >>> estimate_words({"estimate": 0.1, "interval": [0.05, 0.15], "unit": "log ratio"})
        '+10.5 % [+5.1, +16.2]'
    """
    numbers = [claim["estimate"], *claim["interval"]]
    unit = claim.get("unit", "")
    if unit == "log ratio":
        numbers, unit, digits = [100 * math.expm1(x) for x in numbers], "%", 1
    else:
        digits = _digits(numbers)
    middle, low, high = (f"{x:+.{digits}f}" for x in numbers)
    return f"{middle}{f' {unit}' if unit else ''} [{low}, {high}]"


def _digits(numbers: list[float]) -> int:
    """Decimals that show the width of an interval with two figures."""
    width = abs(numbers[2] - numbers[1])
    return 2 if width <= 0 else max(0, min(4, 1 - math.floor(math.log10(width))))


def expected_wrong(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """How many lines of the ledger are expected to be wrong by chance, in one sentence."""
    judged = sum(line["verdict"] in ("supported", "refuted") for line in lines.values())
    open_ = len(lines) - judged
    return (
        f"{len(lines)} primary claim{_s(len(lines))} tested: {judged} with a direction, {open_} inconclusive. Each verdict with a "
        f"direction is wrong by chance with a probability of at most 5 %, so of these {judged} at most "
        f"{CHANCE * judged:.2g} are expected to be wrong."
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"
