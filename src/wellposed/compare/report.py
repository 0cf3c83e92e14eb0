"""The report of a comparison: one HTML file that needs no network."""

from __future__ import annotations

import math
import statistics as plain
from pathlib import Path
from typing import Any

from ..lab.figures import Dot, curves, dot_plot, scatter
from ..lab.files import write_atomically
from ..lab.page import figure, render
from .arms import PLAIN
from .ranking import Ranking, Row
from .result import ArmReport, ComparisonResult
from .terminal import cells, ordered


def write_report(result: ComparisonResult, folder: str | Path) -> Path:
    """Write index.html.

    Returns:
        Its path.

    Raises:
        WriteError: if it cannot be written; an older page is intact.
    """
    return write_atomically(Path(folder) / "index.html", report_page(result))


def report_page(result: ComparisonResult) -> str:
    """The page as text."""
    ranking = result.ranking()
    by_name = {arm.name: arm for arm in result.arms}
    reference = next(row for row in ranking.rows if row.group == "reference")
    shown = list(dict.fromkeys([ranking.winner.name, ranking.rows[0].name, reference.name, PLAIN]))[:3]
    main = [by_name[name] for name in shown if name in by_name]
    others = [by_name[row.name] for row in ranking.rows if row.name not in shown]
    return render(
        "comparison.html.j2",
        "wellposed.compare",
        result=result,
        ranking=ranking,
        reference=reference,
        rows=_table(ranking),
        best={arm.name: max(t["score"] for t in arm.tuning if t["score"] is not None) for arm in result.arms},
        sampling=_sampling_error(result, reference),
        dots=figure(_dots(result, ranking, reference)),
        cost=figure(_cost(ranking, reference)),
        main_curves=figure(_curves(main, result, "Training curves of the arms to look at first")),
        main_count=len(main),
        other_curves=figure(_curves(others, result, "Training curves of the other arms")) if others else None,
    )


def _table(ranking: Ranking) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in ordered(ranking):
        if row is None:
            rows[-1]["divide"] = True
            continue
        p = "" if row.p is None else ("<0.001" if row.p < 0.001 else f"{row.p:.3f}")
        rows.append({"row": row, "cells": cells(row), "p": p, "divide": False})
    return rows


def _sampling_error(result: ComparisonResult, reference: Row) -> float | None:
    """Half width of the binomial 95 % interval of an accuracy on a test set of this size, in points."""
    if result.metric != "accuracy":
        return None
    share = min(max(reference.mean.estimate / 100, 0.01), 0.99)
    return 196 * math.sqrt(share * (1 - share) / result.test_rows)


def _dots(result: ComparisonResult, ranking: Ranking, reference: Row) -> str:
    scores = {arm.name: arm.runs.scores for arm in result.arms}
    rows = [
        Dot(row.label, row.mean.estimate, row.mean.low, row.mean.high, scores[row.name], row.group == "better")
        for row in ranking.rows
    ]
    return dot_plot(
        rows, reference.mean.estimate, f"test {result.metric}, points", "Test scores by arm, with intervals"
    )


def _cost(ranking: Ranking, reference: Row) -> str:
    points = [
        (row.label, row.time, row.mean.estimate - reference.mean.estimate, row.group == "better")
        for row in ranking.rows
        if row.time is not None
    ]
    return scatter(points, f"training time, as a multiple of {reference.label}", "gain, points", "Cost against benefit")


def _curves(arms: list[ArmReport], result: ComparisonResult, title: str) -> str:
    panels = [(arm.label, arm.curves, plain.fmean(arm.stopped) if arm.stopped else None) for arm in arms if arm.curves]
    return curves(panels, f"{result.metric}, points", title)
