"""The page of a study: one HTML file that needs no network, from the plain record and the paper's card."""

from __future__ import annotations

import json
import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..papers.catalogue import Card
from .figures import LINES, curve_limits, curve_panel, curve_places
from .files import write_atomically
from .page import figure, render
from .study import Figure
from .study_arms import (
    METHOD,
    ROLE_WORDS,
    WITNESS,
    ArmLine,
    arm_decimals,
    arm_lines,
    arm_order,
    by_group,
    grouped,
    headline,
    published_rows,
)
from .study_claims import claim_views
from .study_figures import EstimateRow, estimate_plot
from .study_story import answer, scales, story
from .study_words import deciding, run_notes, typeset

FILE = "index.html"


def write_study_page(record: Mapping[str, Any], card: Card, folder: str | Path, figures: Sequence[Figure] = ()) -> Path:
    """Write index.html.

    Args:
        record: as `wellposed.lab.record.make_record` makes it, or as it was read.
        card: of the same paper.
        folder: beside `study.json`.
        figures: the study's own.

    Returns:
        Its path.

    Raises:
        WriteError: if it cannot be written; an older page is intact.
    """
    return write_atomically(Path(folder) / FILE, study_page(record, card, figures))


def study_page(record: Mapping[str, Any], card: Card, figures: Sequence[Figure] = ()) -> str:
    """The page as text; the same for a record and for one that was read from a file."""
    record = json.loads(json.dumps(record, sort_keys=True))
    order = arm_order(record, card)
    metric, label = headline(record)
    lines = arm_lines(record, card, metric)
    groups = grouped(lines, card.protocol.get("worst", {}).get(metric))
    first, statement = answer(record, card)
    for claim in (claims := claim_views(record, card, order)):
        claim["forest"] = [figure(svg) for svg in claim["forest"]]
    panels = _panels(record, order)
    looked_at = _look_first(record, order, panels)
    return render(
        "study.html.j2",
        record=record,
        card=card,
        answer=first,
        statement=statement,
        notes=run_notes(record, card),
        claims=claims,
        label=label,
        dots=_dots(groups, label, record),
        roles=[(role, words) for role, words in ROLE_WORDS.items() if any(line.role == role for line in lines)],
        arms=_arm_table(lines, groups, record),
        unmeasured=[line.label for line in lines if line.mean is None],
        metrics=_all_metrics(record, card, order),
        published=published_rows(record, card),
        costs=_costs(lines),
        legend=[(name, *LINES[name][1:]) for name in LINES if any(name in panel["lines"] for panel in panels.values())],
        first_panels=[panels[name] for name in looked_at],
        other_panels=[panel for name, panel in panels.items() if name not in looked_at],
        figures=[{"title": f.title, "caption": f.caption, "svg": figure(f.svg)} for f in figures],
        tuned=by_group([_tuned(record["arms"][name], record) for name in order], lambda line: line["group"]),
        story=story(record, card),
        scales=scales(card),
    )


def _dots(
    groups: Sequence[tuple[str, list[ArmLine]]], label: str, record: Mapping[str, Any]
) -> list[tuple[str, list[Any]]]:
    """A plot a group, wide and narrow: groups are problems of their own, each with an axis of its own."""
    decimals = arm_decimals([line for _, lines in groups for line in lines])
    published = record.get("paper", {}).get("published", {})
    rows = [(name, [_dot(line, decimals, published.get(line.name)) for line in lines]) for name, lines in groups]
    align = [row for _, found in rows for row in found]

    def draw(number: int, narrow: bool) -> Any:
        name, found = rows[number]
        return figure(estimate_plot(found, label, f"Arms by {label} {name}", narrow, align=align, key=f"arms{number}"))

    return [(name, [draw(number, narrow) for narrow in (False, True)]) for number, (name, _) in enumerate(rows)]


def _dot(line: ArmLine, decimals: int, published: float | None) -> EstimateRow:
    assert line.mean is not None
    low, high = (line.mean.low, line.mean.high) if line.judged else (line.mean.estimate, line.mean.estimate)
    ends = (line.mean.estimate, low, high)
    return EstimateRow(line.label, line.values, ends, typeset(line.score(decimals)), line.role, published)


def _arm_table(
    lines: Sequence[ArmLine], groups: Sequence[tuple[str, list[ArmLine]]], record: Mapping[str, Any]
) -> list[tuple[str, list[dict[str, Any]]]]:
    decimals, seeds = arm_decimals(lines), len(record["seeds"])
    rest = [line for line in lines if line.mean is None]
    shown = [*groups, *([("without this metric", rest)] if rest else [])]
    return [
        (
            name,
            [
                {
                    "label": line.label,
                    "role": line.role,
                    "score": typeset(line.score(decimals)),
                    "trouble": line.trouble(seeds),
                }
                for line in found
            ],
        )
        for name, found in shown
    ]


def _all_metrics(record: Mapping[str, Any], card: Card, order: Sequence[str]) -> dict[str, Any]:
    """The mean of every metric of every arm, diverged seeds at their worst values."""
    names = sorted({name for arm in record["arms"].values() for name in arm["metrics"]})
    columns = {name: {line.name: line.mean for line in arm_lines(record, card, name)} for name in names}
    rows = []
    for arm in order:
        means = [columns[name][arm] for name in names]
        label = record["arms"][arm]["label"]
        rows.append((label, ["–" if mean is None else typeset(f"{mean.estimate:.4g}") for mean in means]))
    return {"names": names, "rows": rows}


def _costs(lines: Sequence[ArmLine]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Seconds a run, with the length of a bar in per cent."""
    most = max((line.seconds for line in lines if line.seconds is not None), default=0.0)
    rows = [
        {
            "label": line.label,
            "group": line.group,
            "role": line.role,
            "seconds": line.seconds,
            "share": f"{100 * (line.seconds or 0.0) / (most or 1.0):.1f}",
        }
        for line in lines
    ]
    return by_group(rows, lambda row: row["group"])


def _panels(record: Mapping[str, Any], order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Training curves by arm; the arms of one group share their axes."""
    curves = {name: _curves(record["arms"][name]["curves"]) for name in order}
    curves = {name: found for name, found in curves.items() if any(line in found for line in LINES)}
    panels: dict[str, dict[str, Any]] = {}
    labels = [arm["label"] for arm in record["arms"].values()]
    for name, found in curves.items():
        arm = record["arms"][name]
        peers = [lines for other, lines in curves.items() if record["arms"][other]["group"] == arm["group"]]
        last = max(float(curve_places(lines)[-1]) for lines in peers)
        drawn = curve_panel(found, curve_limits(peers), f"Training curves of {arm['label']} ({name})", epochs=last)
        lines = [line for line in ("test", "memorized", "validation", "train") if line in found]
        ends = {line: typeset(f"{plain.fmean(seed[-1] for seed in found[line]):.3g}") for line in lines}
        panels[name] = {
            "label": arm["label"],
            "group": arm["group"] if labels.count(arm["label"]) > 1 else "",
            "svg": figure(drawn),
            "lines": lines,
            "ends": ends,
        }
    return panels


def _curves(curves: Mapping[str, Sequence[Sequence[float | None]]]) -> dict[str, list[list[float]]]:
    """The curves that every page draws, each seed as far as its numbers are finite; none of a single point."""
    found: dict[str, list[list[float]]] = {}
    for name in ("epoch", *LINES):
        seeds = [_finite(seed) for seed in curves.get(name, [])]
        if kept := [seed for seed in seeds if len(seed) > 1]:
            found[name] = kept
    lengths = [len(seed) for name, seeds in found.items() if name != "epoch" for seed in seeds]
    if "epoch" in found and max(map(len, found["epoch"])) < max(lengths, default=0):
        del found["epoch"]
    return found


def _finite(seed: Sequence[float | None]) -> list[float]:
    found: list[float] = []
    for value in seed:
        if value is None:
            break
        found.append(value)
    return found


def _look_first(record: Mapping[str, Any], order: Sequence[str], panels: Mapping[str, Any]) -> list[str]:
    """Of the arms with curves: the method, the strongest rival of the primary claim, and a witness of its group."""
    primary = next((claim for claim in record["claims"] if claim["primary"]), None)
    found = deciding(primary) if primary is not None else None
    rival = found.name if found is not None else ""
    group = record["arms"][rival]["group"] if rival in record["arms"] else None

    def first(role: str) -> list[str]:
        fitting = [name for name in order if record["arms"][name]["role"] == role and name in panels]
        return [name for name in fitting if record["arms"][name]["group"] == group][:1] or fitting[:1]

    wanted = [*first(METHOD), rival, *first(WITNESS), *order]
    return [name for name in dict.fromkeys(wanted) if name in panels][:3]


def _tuned(arm: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What was tuned in one arm, in which space, and what was chosen."""
    tuning = arm["tuning"]
    base = record["arms"][tuning["of"]]["label"] if tuning["of"] in record["arms"] else tuning["of"]
    knobs = list(tuning["space"]) or sorted({name for entry in tuning["history"] for name in entry["settings"]})
    if tuning["space"]:
        how = f"begins with the settings of {base}" if base else ""
    elif tuning["history"]:
        how = f"chooses among the trials of {base} by a score of its own"
    else:
        how = f"takes the settings of {base}" if base else "nothing to tune"
    return {
        "label": arm["label"],
        "group": arm["group"],
        "chosen": {name: arm["settings"][name] for name in knobs if name in arm["settings"]},
        "fixed": {name: value for name, value in arm["settings"].items() if name not in knobs},
        "how": how,
        **{name: tuning[name] for name in ("space", "history", "rounds", "score", "default_score")},
    }
