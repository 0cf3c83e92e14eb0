"""The report of a comparison: one HTML file that needs no network."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lab.figures import LINES, Dot, Point, curve_limits, curve_panel, curve_places, dot_plot, scatter
from ..lab.page import figure, render
from .arms import PLAIN
from .page import split_answer, write_page
from .ranking import VISIBLE, ArmRuns, Ranking, Row, signed
from .result import ArmReport, ComparisonResult
from .terminal import MARKS, cells, failed, metric_label, sections


def write_report(result: ComparisonResult, folder: str | Path) -> Path:
    """Write index.html.

    Returns:
        Its path.

    Raises:
        WriteError: if it cannot be written; an older page is intact.
    """
    return write_page(report_page(result), folder)


def report_page(result: ComparisonResult) -> str:
    """The page as text."""
    ranking = result.ranking()
    arms = {arm.name: arm for arm in result.arms}
    in_order = [arms[row.name] for row in ranking.rows]
    first = [arms[name] for name in _look_first(ranking) if arms[name].curves]
    others = [arm for arm in in_order if arm.curves and arm not in first]
    answer, more = split_answer(ranking.sentence)
    panels = _Panels(result, [arm for arm in in_order if arm.curves])
    return render(
        "comparison.html.j2",
        "wellposed.compare",
        result=result,
        ranking=ranking,
        answer=answer,
        more=more,
        baseline=ranking.baseline,
        metric=metric_label(result),
        sections=[(title, [_line(row, ranking) for row in rows]) for title, rows in sections(ranking)],
        has_memory=any(row.memory is not None for row in ranking.rows),
        sampling=_sampling_error(result, ranking.baseline),
        dots=[figure(_dots(result, ranking, narrow)) for narrow in (False, True)],
        costs=[figure(svg) for svg in _costs(ranking)],
        epochs_note=_epochs_note(arms, ranking),
        cost_rows=[_cost_line(row, arms, ranking) for row in ranking.rows],
        legend=[(name, *LINES[name][1:]) for name in LINES if any(name in arm.curves for arm in in_order)],
        first_panels=[panels.one(arm) for arm in first],
        other_panels=[panels.one(arm) for arm in others],
        tuned=[_tuned_line(arm) for arm in in_order],
        every_seed=[(arm.label, [f"{score:.{ranking.decimals}f}" for score in arm.runs.scores]) for arm in in_order],
    )


def _look_first(ranking: Ranking) -> list[str]:
    """The winner (or the best mean), the reference and plain training: what a reader wants side by side."""
    names = {row.name for row in ranking.rows}
    wanted = [ranking.winner.name, ranking.rows[0].name, ranking.reference, PLAIN, ranking.rows[1].name]
    shown = list(dict.fromkeys(name for name in wanted if name in names))[:3]
    if ranking.reference not in shown:
        shown[-1] = ranking.reference
    return [row.name for row in ranking.rows if row.name in shown]


def _line(row: Row, ranking: Ranking) -> dict[str, Any]:
    """A line of the ranking."""
    number, label, score, _, time, memory = cells(row, ranking.decimals)
    gap, d = row.difference, ranking.decimals
    return {
        "kind": row.group.replace(" ", "-"),
        "rank": number,
        "label": label,
        "score": score,
        "gap": "" if gap is None else _typeset(signed(gap.estimate, d)),
        "interval": "reference" if gap is None else _typeset(f"{signed(gap.low, d)} to {signed(gap.high, d)}"),
        "mark": MARKS[row.group].strip(),
        "p": "" if row.p is None else ("< 0.001" if row.p < 0.001 else f"{row.p:.3f}"),
        "time": time,
        "memory": memory,
        "failed": failed(row, ranking) if row.failures else "",
    }


def _typeset(number: str) -> str:
    """With a minus as wide as the plus."""
    return number.replace("-", "−")


def _sampling_error(result: ComparisonResult, reference: Row) -> float | None:
    """Half width of the binomial 95 % interval of an accuracy on a test set of this size, in points."""
    if result.metric != "accuracy":
        return None
    share = min(max(reference.mean.estimate / 100, 0.01), 0.99)
    return 196 * math.sqrt(share * (1 - share) / result.test_rows)


def _dots(result: ComparisonResult, ranking: Ranking, narrow: bool) -> str:
    scores = {arm.name: arm.runs.scores for arm in result.arms}
    rows = []
    for row in ranking.rows:
        gap = row.difference
        ends = None if gap is None else (gap.estimate, gap.low, gap.high)
        rows.append(Dot(row.label, row.mean.estimate, row.mean.low, row.mean.high, scores[row.name], ends, row.group))
    labels = (f"test {metric_label(result)}", f"difference to {ranking.baseline.label}, points")
    name = f"Test {result.metric} of {len(rows)} arms with intervals, and differences to {ranking.baseline.label}"
    return dot_plot(rows, ranking.baseline.mean.estimate, labels, name, narrow)


def _costs(ranking: Ranking) -> list[str]:
    """Gain against time, and against memory where it was measured."""
    drawn = []
    for what, title in (("time", "training time"), ("memory", "peak memory")):
        points = []
        for row in ranking.rows:
            ratio, gap = getattr(row, what), row.difference
            if ratio is not None:
                ends = (0.0, 0.0, 0.0) if gap is None else (gap.estimate, gap.low, gap.high)
                # What is neither a claim nor costly would only crowd the plot.
                named = len(ranking.rows) <= 6 or row.group != "within noise" or ratio >= VISIBLE
                points.append(Point(row.label, ratio, ends, row.group, named))
        # Where no arm costs visibly more or less there is nothing to see but the noise of the measurement.
        if points and (what == "time" or max(p.cost for p in points) >= VISIBLE * min(p.cost for p in points)):
            label = f"{title}, as a multiple of {ranking.baseline.label}"
            drawn.append(scatter(points, label, "gain, points", f"Gain in points against {title}"))
    return drawn


def _cost_line(row: Row, arms: dict[str, ArmReport], ranking: Ranking) -> dict[str, Any]:
    arm, base = arms[row.name], arms[ranking.reference]
    own, other = _seconds_an_epoch(arm), _seconds_an_epoch(base)
    return {
        "label": row.label,
        "kind": row.group.replace(" ", "-"),
        "gain": "" if row.difference is None else _typeset(signed(row.difference.estimate, ranking.decimals)),
        "seconds": _median(arm.runs.seconds),
        "time": row.time,
        "epochs": arm.details.get("epochs"),
        "an_epoch": own / other if own and other else None,
        "mebibytes": _mebibytes(arm.runs),
        "memory": row.memory,
    }


def _epochs_note(arms: dict[str, ArmReport], ranking: Ranking) -> str:
    """Where the winner's time comes from tuning, which chose other numbers of epochs."""
    arm, base = arms[ranking.winner.name], arms[ranking.reference]
    own, other = arm.details.get("epochs"), base.details.get("epochs")
    line = _cost_line(ranking.winner, arms, ranking)
    if not own or not other or not line["an_epoch"] or abs(own - other) < 0.5:
        return ""
    return f"Tuning gave {arm.label} {own:.0f} epochs and {base.label} {other:.0f}; one epoch costs {line['an_epoch']:.2f}×."


def _seconds_an_epoch(arm: ArmReport) -> float | None:
    seconds, epochs = _median(arm.runs.seconds), arm.details.get("epochs")
    return seconds / epochs if seconds and epochs else None


def _mebibytes(runs: ArmRuns) -> float | None:
    found = _median(runs.memory)
    return None if found is None else found / 2**20


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return plain.median(known) if known else None


class _Panels:
    """Training curves of all arms on the same axes."""

    def __init__(self, result: ComparisonResult, arms: Sequence[ArmReport]) -> None:
        self.metric = metric_label(result)
        self.limits = curve_limits([arm.curves for arm in arms]) if arms else (0.0, 1.0)
        self.epochs = max((float(curve_places(arm.curves)[-1]) for arm in arms), default=1.0)

    def one(self, arm: ArmReport) -> dict[str, Any]:
        """A panel with the numbers at its end."""
        ends = {
            name: plain.fmean(seed[-1] for seed in arm.curves[name] if seed)
            for name in ("test", "memorized", "validation", "train")
            if any(arm.curves.get(name, []))
        }
        title = f"Training curves of {arm.label}: {self.metric} by epoch"
        drawn = curve_panel(arm.curves, self.limits, title, arm.stopped, self.epochs)
        kept = plain.median(arm.stopped) if arm.stopped else None
        return {"label": arm.label, "svg": figure(drawn), "ends": ends, "kept": kept}


def _tuned_line(arm: ArmReport) -> dict[str, Any]:
    scores = [entry["score"] for entry in arm.tuning if entry["score"] is not None]
    return {
        "arm": arm,
        "best": max(scores, default=None),
        "first": arm.tuning[0]["score"] if arm.tuning else None,
        "trials": len(arm.tuning),
    }
