"""What `wellposed tune STUDY` prints: what it is about to do, and what came of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...lab.page import duration
from ...lab.trial import Setting
from ..tune_terminal import MARKS
from .answer import StudyAnswer
from .choice import PreparedStudy
from .job import LEDGER
from .result import StudyTuneResult


def print_study_header(prepared: PreparedStudy, console: Console) -> None:
    """What is about to be done, before it begins."""
    options, method = prepared.options, prepared.options.chosen
    console.print()
    title = f" · {prepared.card.name} · arm {prepared.arm.name}: {prepared.arm.label}"
    lines = [
        Text.assemble((prepared.card.slug, "bold"), title),
        Text(f"{method.title}: {options.about}"),
        Text(f"{'tuning' if method.search else 'learning'}: {', '.join(prepared.learned or prepared.space)}"),
        Text(_amount(prepared)),
        *(Text(f"note: {note}") for note in prepared.notes),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _amount(prepared: PreparedStudy) -> str:
    options = prepared.options
    workers = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
    rivals = "registered defaults" + (" and the ledger's settings" if prepared.ledger is not None else "")
    search = ""
    if options.chosen.search:
        search = f"{options.configurations} configurations on {prepared.protocol.tuning_seeds} tuning seeds, then "
    return f"{search}{options.method} against {rivals}, {options.seeds} seeds each · {workers}"


def print_study_tuning(
    result: StudyTuneResult, found: StudyAnswer, printed: Collection[str], folder: Path, console: Console
) -> None:
    """The numbers, the answer, the settings, the lines that repeat them, and where the report is."""
    console.print()
    less = " (less is better)" if result.lower_is_better else ""
    console.print(Text(f"{result.words}{f', {result.unit}' if result.unit else ''}{less}"), soft_wrap=True)
    console.print(arms_table(result, found))
    console.print()
    console.print(Text(found.sentence, style="bold"))
    console.print()
    console.print(settings_table(result))
    for note in [note for note in result.notes if note not in printed]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if result.history:
        took = duration(result.tuning_seconds)
        count = len(result.history) * result.tuning_seeds
        console.print(Text(f"tuning took {count} trainings, {took} in all"), soft_wrap=True)
    if found.values_help or found.helps:
        code = result.usage if found.values_help else result.again
        console.print("\nUse it:" if found.values_help else "\nThe values alone do not carry the gain, so learn again:")
        for line in code.splitlines():
            console.print(Text(f"    {line}"), soft_wrap=True)
    console.print(Text(f"\nreport    {folder}/index.html"), soft_wrap=True)
    if result.again:
        console.print(Text(f"schedule  {folder}/schedule.json"), soft_wrap=True)
    console.print(Text("rerun or extend: the same command (finished trainings are kept)"), soft_wrap=True)


def arms_table(result: StudyTuneResult, found: StudyAnswer) -> Table:
    """Each arm with its mean, the paired difference to the defaults, and the time of a training."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for title in ("mean", "against the defaults", "a training"):
        table.add_column(title, justify="right", no_wrap=True)
    for line in found.lines:
        style = {1: "bold green", -1: "dim"}.get(line.verdict, "")
        mark = f" {MARKS[line.verdict]}" if line.gap else ""
        table.add_row(line.label, line.mean, f"{line.gap}{mark}", line.time, style=style)
    return table


def settings_table(result: StudyTuneResult) -> Table:
    """Every setting that was tuned: as registered, as found, and as the ledger holds it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    header, rows = settings_rows(result)
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def settings_rows(result: StudyTuneResult) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the settings that were tuned."""
    learns, kept = result.tuned.settings is None, result.find(LEDGER)
    header = ["setting", "registered"]
    header += [f"seed {result.best_seed}", "range over seeds"] if learns else [result.method_label]
    header += ["ledger"] if kept is not None else []
    good = [seed for seed in result.seeds if seed not in result.tuned.failures]
    rows = []
    for name in result.tuned_names:
        row = [name, _shown((result.untuned.settings or {}).get(name))]
        if learns:
            values = result.tuned.values.get(name, [])
            if values:
                chosen = values[good.index(result.best_seed)]
                row += [f"{chosen:.3g}", f"{min(values):.3g} to {max(values):.3g}"]
            else:
                row += ["–", "–"]
        else:
            row.append(_shown((result.tuned.settings or {}).get(name)))
        if kept is not None:
            row.append(_shown((kept.settings or {}).get(name)))
        rows.append(row)
    return header, rows


def _shown(value: Setting | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
