"""What `wellposed tune` prints: what it is about to do, and what came of it."""

from __future__ import annotations

import statistics as plain
from collections.abc import Collection
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..lab.page import duration
from .printing import VERDICT_STYLES, counted, marked, plain_table, say, say_code, say_notes, say_report
from .tune_answer import Answer, Contrast
from .tune_job import Prepared
from .tune_options import TuneOptions
from .tune_result import TuneResult
from .tune_words import ratio, time_ratio

MOST_ROWS = 16


def print_tune_header(prepared: Prepared, console: Console) -> None:
    """What is about to be done, before it begins."""
    task, options, plan = prepared.task, prepared.options, prepared.plan
    console.print()
    say(
        console,
        Text.assemble((task.name, "bold"), f" · {task.describe()} · model: {prepared.model}"),
        task.describe_split(),
        f"{options.chosen.title}: {options.about}",
    )
    if plan is not None:
        learned = [s for s in plan.strengths if s.label not in plan.left_out]
        names = ", ".join(s.label + (f" ×{len(s.labels)}" if len(s.labels) > 1 else "") for s in learned)
        say(console, f"learning: {names}")
    say(console, _amount(options, prepared.epochs))
    say_notes(console, header_notes(prepared))


def header_notes(prepared: Prepared) -> list[str]:
    """What a reader must know before it begins."""
    return [*prepared.task.notes, *(prepared.plan.notes if prepared.plan else [])]


def _amount(options: TuneOptions, epochs: int) -> str:
    each = f" of {options.trainings} trainings" if options.trainings > 1 else ""
    long = f" · {epochs} epochs a training, the best kept" if epochs else ""
    workers = counted(options.workers, "worker")
    return f"initial values against {options.method}{each}, {options.seeds} seeds each{long} · {workers}"


def print_tuning(result: TuneResult, found: Answer, printed: Collection[str], folder: object, console: Console) -> None:
    """The numbers, the answer, the learned values, the lines that apply them, and where the report is."""
    console.print()
    console.print(contrast_table(result, found))
    console.print()
    console.print(Text(found.sentence, style="bold"))
    console.print()
    console.print(values_table(result))
    say_notes(console, (note for note in result.notes if note not in printed))
    if found.outdone:
        console.print("\nUse it, with one penalty for all features:")
        say_code(console, result.again)
    elif found.values_help and result.usage:
        console.print(f"\nUse it (the values of seed {result.best_seed}, which did best on validation data):")
        say_code(console, result.usage)
    elif found.helps and result.again:
        console.print("\nUse it: the values alone do not carry the gain, so learn in your own training:")
        say_code(console, result.again)
    elif result.usage:
        say(console, "\nThe lines that apply the learned values anyway are in the report.")
    say_report(console, folder, schedule=bool(result.replay))


def contrast_table(result: TuneResult, found: Answer) -> Table:
    """Each measure with a line for each arm, and the paired difference to the initial values."""
    table = plain_table("", "mean", "against initial values")
    for lines in measures(result, found):
        table.add_row(lines[0].measure, "", "")
        for line in lines:
            gap, style = marked(line.gap, line.verdict), VERDICT_STYLES[line.verdict]
            table.add_row(f"  {line.arm}", line.mean, gap, style=style)
    table.add_row("wall time", "", "")
    for arm, took, times in zip(result.arms, seconds(result), time_ratios(result), strict=True):
        table.add_row(f"  {arm.label}", took, f"{counted(arm.trainings, 'training')} {times:>6}")
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
    found = [time_ratio(result.untuned.seconds, arm.seconds) for arm in result.arms[1:]]
    return ["", *("–" if times is None else f"{ratio(times)}×" for times in found)]


def values_table(result: TuneResult) -> Table:
    """Every value: where it began, what the best seed learned, and the range over seeds."""
    table = plain_table("learned", "initial", f"seed {result.best_seed}", "range over seeds")
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
