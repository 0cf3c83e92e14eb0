"""What the ledger says of each paper's primary claim, in words; read from a file that `wellposed ledger` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "verdicts.json"
CHANCE = 0.05
"""A primary claim is judged at 95 %: at most this share of lines is decided wrongly by chance."""


@cache
def load_verdicts() -> dict[str, dict[str, Any]]:
    """The primary verdict of each studied paper, by slug; empty before the first study."""
    path = files(__package__).joinpath(FILE)
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return found


def expected_wrong(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """How many lines of the ledger are expected to be wrong by chance, in one sentence."""
    decided = sum(line["verdict"] in ("supported", "refuted") for line in lines.values())
    return (
        f"{len(lines)} primary claim{_s(len(lines))} tested: {decided} decided, {len(lines) - decided} inconclusive. A line is "
        f"decided wrongly by chance in at most 5 of 100 studies, even if every truth lay exactly at its margin: of these "
        f"{len(lines)}, at most {CHANCE * len(lines):.2g} are expected to be wrong (more where values are skewed)."
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"
