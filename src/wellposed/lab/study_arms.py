"""The arms of a study's record as tables and figures need them: in the card's order, by group, with mean and interval."""

from __future__ import annotations

import math
import re
import statistics as plain
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..papers.catalogue import Card
from .statistics import Interval, mean_interval
from .study_words import decimals_for

Item = TypeVar("Item")
METHOD, BASELINE, CONTROL, WITNESS = "method", "baseline", "control", "witness"
ROLE_WORDS = {
    METHOD: "the paper's method",
    BASELINE: "what users would try",
    CONTROL: "isolates a cause",
    WITNESS: "shows whether the phenomenon is here",
}


@dataclass(frozen=True)
class ArmLine:
    """One arm, summed up.

    Attributes:
        name, label, group, role: as registered.
        values: the metric, one a seed that has it; a diverged seed counts as the worst value that the card names.
        mean: with its 95 % interval; None without a value.
        judged: whether the interval may be shown: not at smoke scale, nor for fewer than two values.
        seconds: median time of a trial, None where none finished.
        diverged, failed: numbers of seeds.
    """

    name: str
    label: str
    group: str
    role: str
    values: tuple[float, ...]
    mean: Interval | None
    judged: bool
    seconds: float | None
    diverged: int
    failed: int

    def score(self, decimals: int) -> str:
        """ "78.9 ± 0.5", without the half width where no interval may be shown, "–" without a value."""
        if self.mean is None:
            return "–"
        if not self.judged:
            return f"{self.mean.estimate:,.{decimals}f}"
        return f"{self.mean.estimate:,.{decimals}f} ± {self.mean.half_width:.{decimals}f}"

    def trouble(self, seeds: int) -> str:
        """ "2 of 12 seeds diverged and count as the worst value", or nothing."""
        found = []
        if self.diverged:
            found.append(f"{self.diverged} of {seeds} seeds diverged and count as the worst value")
        if self.failed:
            found.append(f"{self.failed} of {seeds} seeds failed")
        return "; ".join(found)


def arm_lines(record: Mapping[str, Any], card: Card, metric: str) -> list[ArmLine]:
    """All arms in the card's order (a record that was read from a file has lost it)."""
    worst = card.protocol.get("worst", {})
    own = {arm["name"]: arm.get("metric", metric) for arm in card.protocol.get("arms", [])}
    lines = []
    for name in arm_order(record, card):
        wanted = metric if record["scale"] == "paper" else own.get(name, metric)
        lines.append(_line(name, record["arms"][name], wanted, worst.get(wanted), record["scale"]))
    return lines


def arm_order(record: Mapping[str, Any], card: Card) -> list[str]:
    """Names of the arms in the card's order; those that the card lacks come last."""
    protocol = card.protocol.get("paper", {}) if record["scale"] == "paper" else card.protocol
    listed = [arm["name"] for arm in protocol.get("arms", []) if arm["name"] in record["arms"]]
    return [*listed, *(name for name in record["arms"] if name not in listed)]


def contrast_order(claim: Mapping[str, Any], order: Sequence[str]) -> list[str]:
    """Names of a claim's contrasts: arms as the card orders them, all else as people count ("10" after "9")."""
    names = list(claim.get("contrasts", {}))
    known = [name for name in order if name in names]
    return [*known, *sorted((name for name in names if name not in known), key=_natural)]


def _natural(name: str) -> list[tuple[float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    return [(float(part), "") if part[0].isdigit() else (math.inf, part) for part in parts]


def _line(name: str, arm: Mapping[str, Any], metric: str, worst: float | None, scale: str) -> ArmLine:
    found = arm["metrics"].get(metric, [None] * len(arm["status"]))
    # An arm of which no seed has the metric measures something else; it did not score the worst.
    measured = any(value is not None for value in found) or all(status == "diverged" for status in arm["status"])
    values = [
        worst if status == "diverged" and value is None else value
        for value, status in zip(found, arm["status"], strict=True)
        if measured and status in ("finished", "diverged")
    ]
    numbers = tuple(float(value) for value in values if value is not None)
    seconds = [s for s, status in zip(arm["seconds"], arm["status"], strict=True) if status == "finished"]
    return ArmLine(
        name, arm["label"], arm["group"], arm["role"], numbers,
        mean_interval(numbers) if numbers else None,
        scale != "smoke" and len(numbers) > 1,
        plain.median(seconds) if seconds else None,
        arm["status"].count("diverged"),
        arm["status"].count("failed") + arm["status"].count("missing"),
    )  # fmt: skip


def by_group(items: Sequence[Item], group: Callable[[Item], str]) -> list[tuple[str, list[Item]]]:
    """Items under the headings of their groups; those without one come under "other" where there are several groups."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    return [(name or ("other" if len(groups) > 1 else ""), found) for name, found in groups.items()]


def grouped(lines: Sequence[ArmLine], worst: float | None = None) -> list[tuple[str, list[ArmLine]]]:
    """Arms that have the metric by group, each from best to worst; highest first where the card does not say."""
    measured = [line for line in lines if line.mean is not None]
    sign = 1 if worst is not None and measured and worst > plain.median(map(_estimate, measured)) else -1
    groups = by_group(measured, lambda line: line.group)
    return [(name, sorted(found, key=lambda line: sign * _estimate(line))) for name, found in groups]


def _estimate(line: ArmLine) -> float:
    assert line.mean is not None
    return line.mean.estimate


def arm_decimals(lines: Sequence[ArmLine]) -> int:
    """Decimals that all scores of a table share."""
    halves = [line.mean.half_width for line in lines if line.mean is not None and line.judged]
    sizes = [abs(line.mean.estimate) for line in lines if line.mean is not None]
    if halves:
        return decimals_for(plain.median(halves), max(sizes))
    return 1 if not sizes or max(sizes) >= 10 else 3


def headline(record: Mapping[str, Any]) -> tuple[str, str]:
    """The metric of the arms, and its words; at the scale "paper" that of the published numbers."""
    metric, label = record["headline"]
    published = record.get("paper", {}).get("metric", metric)
    return (metric, label) if published == metric else (published, published)


def published_rows(record: Mapping[str, Any], card: Card) -> list[dict[str, str]]:
    """The published numbers beside those of this run, at the scale "paper"; none at others."""
    published = record.get("paper", {}).get("published", {})
    lines = arm_lines(record, card, headline(record)[0])
    decimals = max(2, arm_decimals(lines))
    return [
        {
            "label": line.label,
            "role": line.role,
            "published": f"{published[line.name]:g}",
            "ours": line.score(decimals),
            "gap": "–" if line.mean is None else f"{line.mean.estimate - published[line.name]:+.{decimals}f}",
        }
        for line in lines
        if line.name in published
    ]
