"""What `wellposed tune STUDY` prints: what it is about to do, and what came of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...lab.page import duration
from ...lab.trial import Setting
from ..printing import VERDICT_STYLES, counted, marked, plain_table, say, say_code, say_notes, say_report
from .answer import StudyAnswer
from .job import LEDGER
from .prepared import PreparedStudy
from .result import StudyTuneResult


def print_study_header(prepared: PreparedStudy, console: Console) -> None:
    """What is about to be done, before it begins."""
    options, method = prepared.options, prepared.options.chosen
    console.print()
    title = f" · {prepared.card.name} · arm {prepared.arm.name}: {prepared.arm.label}"
    say(
        console,
        Text.assemble((prepared.card.slug, "bold"), title),
        f"{method.title}: {options.about}",
        f"{'tuning' if method.search else 'learning'}: {', '.join(prepared.learned or prepared.space)}",
        _amount(prepared),
    )
    say_notes(console, prepared.notes)


def _amount(prepared: PreparedStudy) -> str:
    options = prepared.options
    workers = counted(options.workers, "worker")
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
    say(console, f"{result.words}{f', {result.unit}' if result.unit else ''}{less}")
    console.print(arms_table(result, found))
    console.print()
    console.print(Text(found.sentence, style="bold"))
    console.print()
    console.print(settings_table(result))
    say_notes(console, (note for note in result.notes if note not in printed))
    if result.history:
        took = duration(result.tuning_seconds)
        count = len(result.history) * result.tuning_seeds
        say(console, f"tuning took {count} trainings, {took} in all")
    if found.values_help or found.helps:
        code = result.usage if found.values_help else result.again
        console.print("\nUse it:" if found.values_help else "\nThe values alone do not carry the gain, so learn again:")
        say_code(console, code)
    say_report(console, folder, schedule=bool(result.again))


def arms_table(result: StudyTuneResult, found: StudyAnswer) -> Table:
    """Each arm with its mean, the paired difference to the defaults, and the time of a training."""
    table = plain_table("", "mean", "against the defaults", "a training")
    for line in found.lines:
        gap, style = marked(line.gap, line.verdict), VERDICT_STYLES[line.verdict]
        table.add_row(line.label, line.mean, gap, line.time, style=style)
    return table


def settings_table(result: StudyTuneResult) -> Table:
    """Every setting that was tuned: as registered, as found, and as the ledger holds it."""
    header, rows = settings_rows(result)
    table = plain_table(*header)
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
