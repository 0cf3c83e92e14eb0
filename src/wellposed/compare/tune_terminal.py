"""What `wellposed tune` prints: what it is about to do, and what came of it."""

from __future__ import annotations

import statistics as plain
from collections.abc import Collection
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..lab.page import duration
from .tune_answer import Answer, Contrast, ratio
from .tune_job import Prepared
from .tune_options import TuneOptions
from .tune_result import TuneResult

MOST_ROWS = 16
MARKS = {1: "▲", 0: "≈", -1: "▼"}


def print_tune_header(prepared: Prepared, console: Console) -> None:
    """What is about to be done, before it begins."""
    task, options, plan = prepared.task, prepared.options, prepared.plan
    console.print()
    console.print(Text.assemble((task.name, "bold"), f" · {task.describe()} · model: {prepared.model}"), soft_wrap=True)
    console.print(Text(task.describe_split()), soft_wrap=True)
    console.print(Text(f"{options.chosen.title}: {options.about}"), soft_wrap=True)
    if plan is not None:
        learned = [s for s in plan.strengths if s.label not in plan.left_out]
        names = ", ".join(s.label + (f" ×{len(s.labels)}" if len(s.labels) > 1 else "") for s in learned)
        console.print(Text(f"learning: {names}"), soft_wrap=True)
    console.print(Text(_amount(options, prepared.epochs)), soft_wrap=True)
    for note in header_notes(prepared):
        console.print(Text(f"note: {note}"), soft_wrap=True)


def header_notes(prepared: Prepared) -> list[str]:
    """What a reader must know before it begins."""
    return [*prepared.task.notes, *(prepared.plan.notes if prepared.plan else [])]


def _amount(options: TuneOptions, epochs: int) -> str:
    each = f" of {options.trainings} trainings" if options.trainings > 1 else ""
    long = f" · {epochs} epochs a training, the best kept" if epochs else ""
    workers = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
    return f"initial values against {options.method}{each}, {options.seeds} seeds each{long} · {workers}"


def print_tuning(result: TuneResult, found: Answer, printed: Collection[str], folder: object, console: Console) -> None:
    """The numbers, the answer, the learned values, the lines that apply them, and where the report is."""
    console.print()
    console.print(contrast_table(result, found))
    console.print()
    console.print(Text(found.sentence, style="bold"))
    console.print()
    console.print(values_table(result))
    for note in [note for note in result.notes if note not in printed]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if found.outdone:
        console.print("\nUse it, with one penalty for all features:")
        _print_code(result.again, console)
    elif found.values_help and result.usage:
        console.print(f"\nUse it (the values of seed {result.best_seed}, which did best on validation data):")
        _print_code(result.usage, console)
    elif found.helps and result.again:
        console.print("\nUse it: the values alone do not carry the gain, so learn in your own training:")
        _print_code(result.again, console)
    elif result.usage:
        console.print(Text("\nThe lines that apply the learned values anyway are in the report."), soft_wrap=True)
    console.print(Text(f"\nreport    {folder}/index.html"), soft_wrap=True)
    if result.replay:
        console.print(Text(f"schedule  {folder}/schedule.json"), soft_wrap=True)
    console.print(Text("rerun or extend: the same command (finished trainings are kept)"), soft_wrap=True)


def _print_code(code: str, console: Console) -> None:
    for line in code.splitlines():
        console.print(Text(f"    {line}"), soft_wrap=True)


def contrast_table(result: TuneResult, found: Answer) -> Table:
    """Each measure with a line for each arm, and the paired difference to the initial values."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for title in ("mean", "against initial values"):
        table.add_column(title, justify="right", no_wrap=True)
    for lines in measures(result, found):
        table.add_row(lines[0].measure, "", "")
        for line in lines:
            style = {1: "bold green", -1: "dim"}.get(line.verdict, "")
            mark = f" {MARKS[line.verdict]}" if line.gap else ""
            table.add_row(f"  {line.arm}", line.mean, f"{line.gap}{mark}", style=style)
    table.add_row("wall time", "", "")
    for arm, took, times in zip(result.arms, seconds(result), time_ratios(result), strict=True):
        trained = f"{arm.trainings} training{'' if arm.trainings == 1 else 's'}"
        table.add_row(f"  {arm.label}", took, f"{trained} {times:>6}")
    return table


@dataclass(frozen=True)
class Line:
    """One measure of one arm, as a table shows it.

    Attributes:
        measure: only in the first line of each.
        arm: its label.
        mean: with half the width of its interval.
        gap: difference to the initial values, empty for themselves.
        verdict: as in `Contrast`.
    """

    measure: str
    arm: str
    mean: str
    gap: str = ""
    verdict: int = 0


def measures(result: TuneResult, found: Answer) -> list[list[Line]]:
    """The lines of the test score and of the test loss."""
    groups = []
    for number, first in enumerate((found.score, found.loss)):
        lines = [Line(f"test {first.label}", result.untuned.label, first.mean(first.untuned))]
        for arm, contrasts in zip(result.arms[1:], [(found.score, found.loss), found.third], strict=False):
            contrast: Contrast = contrasts[number]
            lines.append(Line("", arm.label, contrast.mean(contrast.tuned), contrast.gap, contrast.verdict))
        groups.append(lines)
    return groups


def seconds(result: TuneResult) -> list[str]:
    """Median wall time of each arm."""
    known = [[s for s in arm.seconds if s is not None] for arm in result.arms]
    return [duration(plain.median(found)) if found else "–" for found in known]


def time_ratios(result: TuneResult) -> list[str]:
    """Median ratio of wall times to the initial values, empty for themselves."""
    found = [""]
    for arm in result.arms[1:]:
        ratios = [b / a for a, b in zip(result.untuned.seconds, arm.seconds, strict=True) if a and b]
        found.append(f"{ratio(plain.median(ratios))}×" if ratios else "–")
    return found


def values_table(result: TuneResult) -> Table:
    """Every value: where it began, what the best seed learned, and the range over seeds."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("learned", no_wrap=True)
    for title in ("initial", f"seed {result.best_seed}", "range over seeds"):
        table.add_column(title, justify="right", no_wrap=True)
    rows = value_rows(result)
    if len(rows) > MOST_ROWS:  # of hundreds of features only the ends are of interest here
        rows = sorted(rows, key=lambda row: float(row[2]))
        half = MOST_ROWS // 2
        rows = [*rows[:half], [f"… {len(rows) - 2 * half} more", "", "", ""], *rows[-half:]]
    for line in rows:
        table.add_row(*line)
    return table


def value_rows(result: TuneResult) -> list[list[str]]:
    """Label, initial value, value of the best seed, range over seeds."""
    good = [seed for seed in result.seeds if seed not in result.tuned.failures]
    rows = []
    for strength in result.strengths:
        for label in strength["labels"]:
            values = result.tuned.values.get(label, [])
            if not values:
                continue
            first = result.untuned.values.get(label, [None])[0]
            chosen = values[good.index(result.best_seed)]
            span = "fixed" if strength["left_out"] else f"{min(values):.3g} to {max(values):.3g}"
            rows.append([label, "–" if first is None else f"{first:.3g}", f"{chosen:.3g}", span])
    return rows
