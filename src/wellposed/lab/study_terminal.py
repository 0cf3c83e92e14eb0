"""What a study prints: as wide as the terminal allows, whole words, and no colour where there is no terminal."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.text import Text

from ..papers.catalogue import Card, Claim
from .page import duration
from .protocol import Protocol
from .study import protocol_of
from .study_arms import METHOD, arm_decimals, arm_lines, grouped, headline, published_rows
from .study_claims import MARKS, joined_claims, short_numbers
from .study_run import SMOKE_SEEDS, StudyOptions
from .study_story import answer
from .study_words import deciding, labels_of, margin_words, number_style, plural, run_notes, verdict_sentence

__all__ = ["print_study", "print_study_header", "verdict_sentence"]

STYLES = {
    "supported": "bold green", "holds": "bold green", "refuted": "bold yellow", "fails": "bold yellow", "inconclusive": "",
    "not testable here": "dim", "not judged": "dim",
}  # fmt: skip
SHORTEST = 14


def print_study_header(card: Card, options: StudyOptions, console: Console) -> None:
    """What is about to be done, before it begins."""
    protocol, smoke = protocol_of(card), options.scale == "smoke"
    paper = protocol.paper if options.scale == "paper" else None
    console.print()
    console.print(Text.assemble((card.name, "bold"), f" · {options.scale} scale"))
    if paper is not None:
        seeds, cost = paper.seeds, paper.cost
        lines = [f"needs {paper.data}", f"{plural(len(paper.arms), 'arm')} as published, untuned"]
    else:
        seeds, cost = (SMOKE_SEEDS, "seconds") if smoke else (protocol.seeds, card.cost)
        lines = [protocol.problem, _tuning_plan(protocol, smoke)]
    workers = "one process" if options.engine == "serial" else plural(options.workers, "worker")
    lines.append(
        f"{plural(options.seeds or seeds, 'evaluation seed')} · {workers}" + (f" · takes {cost}" if cost else "")
    )
    for line in lines:
        console.print(Text(line))
    if options.scale == "laptop" and (options.overrides or options.seeds not in (None, protocol.seeds)):
        console.print(Text("note: other seeds or settings than the card registers: this run will not enter the ledger"))


def _tuning_plan(protocol: Protocol, smoke: bool) -> str:
    rounds = [1 if smoke else arm.rounds for arm in protocol.arms.values() if arm.space]
    arms = plural(len(protocol.arms), "arm")
    if not rounds:
        return f"{arms}, nothing to tune"
    seeds = 1 if smoke else protocol.tuning_seeds
    each = (
        plural(rounds[0], "configuration")
        if len(set(rounds)) == 1
        else f"{min(rounds)} to {max(rounds)} configurations"
    )
    trials = plural(sum(rounds) * seeds, "trial")
    return f"{arms} · {len(rounds)} tuned: {each} × {plural(seeds, 'seed')} each, {trials}"


def print_study(record: Mapping[str, Any], card: Card, console: Console, folder: str | Path) -> None:
    """The primary verdict, a line a claim, the arms by group, and where the report is."""
    first, statement = answer(record, card)
    console.print()
    if statement:
        console.print(Text(f"The claim: {statement}"))
    console.print(Text(first.replace("−", "-"), style="bold"))
    for note in run_notes(record, card):
        console.print(Text(f"note: {note}"))
    if record["claims"]:
        console.print()
        console.print(claims_table(record, card, console.width))
    console.print()
    console.print(published_table(record, card) if "paper" in record else arms_table(record, card, console.width))
    console.print()
    console.print(
        Text(f"took {duration(record['seconds'])}, {duration(record['compute_seconds'])} of computing in all trials")
    )
    console.print(Text(f"report  {Path(folder) / 'index.html'}"), soft_wrap=True)
    console.print(Text(f"numbers {Path(folder) / 'study.json'}"), soft_wrap=True)
    console.print(Text("the same command goes on where a run was killed, and tries failed trials again"))


def claims_table(record: Mapping[str, Any], card: Card, width: int = 80) -> Group:
    """A line a claim: id, verdict, estimate with interval, margin; the number of seeds stands in the head.

    What belongs to a verdict follows on a line of its own, in whole words. Where the width does not allow for all,
    the units go first, then the margins; then ids are shortened.
    """
    claims = joined_claims(record, card)
    heads = ["claim", "verdict", f"estimate, {plural(len(record['seeds']), 'seed')}", "margin"]
    columns = 4
    rows = [_claim_cells(entry, record["scale"], with_unit=True) for entry, _ in claims]
    if sum(_widths([heads, *rows], columns)) > width:
        rows = [_claim_cells(entry, record["scale"], with_unit=False) for entry, _ in claims]
    if sum(_widths([heads, *rows], columns)) > width:
        columns = 3
    widths = _widths([heads, *rows], columns)
    widths[0] = max(SHORTEST, widths[0] - max(0, sum(widths) - width))
    parts = [Text(_joined(heads, widths), style="dim", no_wrap=True)]
    for (entry, claim), row in zip(claims, rows, strict=True):
        line = Text(_joined(row, widths), style="bold" if entry["primary"] else "", no_wrap=True)
        line.highlight_words([row[1]], STYLES[entry["verdict"]])
        parts += [line, *(Text(said, style="dim") for said in _aside(entry, claim, labels_of(record), width))]
    return Group(*parts)


def _claim_cells(entry: Mapping[str, Any], scale: str, with_unit: bool) -> list[str]:
    style, word = number_style(entry), entry["verdict"]
    if not with_unit and style.form == "plain":
        style = dataclasses.replace(style, unit="")
    margin = "" if entry["margin"] is None else margin_words(entry, style)
    at = f" ({scale})" if word in ("supported", "refuted") else ""
    return [entry["id"], f"{MARKS[word]} {word}{at}", short_numbers(entry, style), margin]


def _aside(entry: Mapping[str, Any], claim: Claim, labels: Mapping[str, str], width: int) -> Iterator[str]:
    """What qualifies a verdict: its word, the contrast that decided, a counterexample, the command of a scale claim."""
    found, said = deciding(entry), []
    if entry["qualifier"]:
        said.append(entry["qualifier"])
    if found is not None and found.name:
        word = "decided" if entry["verdict"] == "refuted" else "weakest"
        said.append(f"{word} {f'against {labels[found.name]}' if found.name in labels else f'at {found.name}'}")
    if case := entry.get("counterexample"):
        off = "not finite" if case["error"] is None else f"{case['error']:.1e}"
        said.append(f"{case['name']}: error {off}, tolerance {case['tolerance']:.0e}")
    if entry["verdict"] == "not testable here" and claim.command:
        said.append(f"would be tested by: {claim.command}")
    if said:
        yield from textwrap.wrap("; ".join(said), width, initial_indent="    ", subsequent_indent="    ")


def arms_table(record: Mapping[str, Any], card: Card, width: int = 80) -> Group:
    """The arms by group, best first: mean of the headline metric with its 95 % interval, and the time of a run."""
    metric, label = headline(record)
    lines = arm_lines(record, card, metric)
    groups = grouped(lines, card.protocol.get("worst", {}).get(metric))
    decimals, seeds = arm_decimals(lines), len(record["seeds"])
    rest = [line for line in lines if line.mean is None]
    groups += [("measured otherwise", rest)] if rest else []
    cells = {
        line.name: [line.label, line.role, line.score(decimals), "" if line.seconds is None else duration(line.seconds)]
        for line in lines
    }
    heads = ["arm", "role", label, "a run"]
    if sum(_widths([heads, *cells.values()], 4)) > width:
        heads[2] = metric
    widths = _widths([heads, *cells.values()], 4)
    widths[0] = max(SHORTEST, widths[0] - max(0, sum(widths) - width))
    total = min(width, sum(widths))
    parts = [Text(_joined(heads, widths), style="dim", no_wrap=True)]
    for name, found in groups:
        if name:
            rule = f"─── {name} "
            parts.append(Text(rule + "─" * max(0, total - cell_len(rule)), style="dim", no_wrap=True))
        for line in found:
            style = "bold" if line.role == METHOD else ""
            parts.append(Text(_joined(cells[line.name], widths), style=style, no_wrap=True))
            if trouble := line.trouble(seeds):
                parts.append(Text(f"    {trouble}", style="red"))
    return Group(*parts)


def published_table(record: Mapping[str, Any], card: Card) -> Group:
    """The published numbers beside ours."""
    rows = [[row["label"], row["published"], row["ours"], row["gap"]] for row in published_rows(record, card)]
    heads = [headline(record)[1], "published", "here", "difference"]
    widths = _widths([heads, *rows], 4)
    return Group(
        *(Text(_joined(row, widths), style="" if number else "dim") for number, row in enumerate([heads, *rows]))
    )


def _widths(lines: Sequence[Sequence[str]], columns: int) -> list[int]:
    """Width of each column with the gap before it."""
    longest = [max(cell_len(text) for text in column) for column in zip(*lines, strict=True)]
    return [width + (2 if number else 0) for number, width in enumerate(longest[:columns])]


def _joined(texts: Sequence[str], widths: Sequence[int]) -> str:
    """A line of as many columns as there are widths: words to the left, numbers to the right."""
    found = ""
    for number, (text, width) in enumerate(zip(texts, widths, strict=False)):
        room = width - (2 if number else 0)
        shown = text if cell_len(text) <= room else set_cell_size(text, room - 1) + "…"
        if number < 2:
            found += ("  " if number else "") + set_cell_size(shown, room)
        else:
            found += " " * (width - cell_len(shown)) + shown
    return found.rstrip()
