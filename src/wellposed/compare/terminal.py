"""What a comparison prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .comparison import Finished, Options
from .ranking import Ranking, Row
from .result import ComparisonResult
from .task import Task


def print_header(task: Task, model: str, arms: int, options: Options, console: Console) -> None:
    """What is about to be done, before it begins."""
    console.print(f"\n[bold]{task.name}[/bold] · {task.describe()} · model: {model}", highlight=False, soft_wrap=True)
    console.print(task.describe_split(), highlight=False, soft_wrap=True)
    console.print(
        f"{arms} arms · {options.rounds} tuning trials each on validation data, then {options.seeds} seeds on the test set · "
        f"{options.workers} worker{'s' if options.workers > 1 else ''}",
        highlight=False,
        soft_wrap=True,
    )
    for note in task.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def print_result(result: ComparisonResult, finished: Finished, console: Console) -> None:
    """The ranked table, the answer, the lines that apply it, and where the report is."""
    ranking = result.ranking()
    console.print()
    console.print(ranked_table(ranking, result))
    console.print(Text(ranking.sentence, style="bold"))
    for note in result.notes[len(finished.task.notes) :]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if result.issues is not None and result.issues["path"]:
        console.print(
            f"{result.issues['count']} training labels look wrong to {result.issues['label']}: {result.issues['path']}",
            highlight=False,
            soft_wrap=True,
        )
    console.print("\nUse it:", highlight=False)
    for line in result.usage.splitlines():
        console.print(Text(f"    {line}"), soft_wrap=True)
    folder = finished.options.output
    console.print(f"\nreport      {folder / 'index.html'}", highlight=False, soft_wrap=True)
    console.print(f"full script {folder / 'apply.py'}", highlight=False, soft_wrap=True)
    console.print("rerun or extend: the same command (finished trials are kept)", highlight=False)


def ranked_table(ranking: Ranking, result: ComparisonResult) -> Table:
    """One line an arm, with dividers between what is better, within noise of, and worse than the reference."""
    reference = next(row for row in ranking.rows if row.group == "reference")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", justify="right", min_width=2)
    table.add_column("arm", no_wrap=True)
    table.add_column(result.metric, justify="right", no_wrap=True)
    table.add_column(f"against {reference.label}", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for row in ordered(ranking):
        if row is None:
            table.add_section()
            continue
        style = {"better": "bold green", "reference": "bold", "within noise": "", "worse": "dim"}[row.group]
        table.add_row(*cells(row), style=style)
        if row.failures:
            table.add_row("", f"  {row.failures} failed seeds", style="red")
    return table


def ordered(ranking: Ranking) -> list[Row | None]:
    """Rows best first; None where the group changes."""
    found: list[Row | None] = []
    for row in ranking.rows:
        if (found and found[-1] is not None and (found[-1].group == "better") != (row.group == "better")) or (
            found and found[-1] is not None and (found[-1].group == "worse") != (row.group == "worse")
        ):
            found.append(None)
        found.append(row)
    return found


def cells(row: Row) -> list[str]:
    """The text of a line."""
    gap = row.difference
    against = "(reference)" if gap is None else f"{gap.estimate:+.1f}  [{gap.low:+.1f}, {gap.high:+.1f}]"
    mark = {"within noise": " ≈", "better": " ▲", "worse": " ▼", "reference": ""}[row.group]
    return [
        str(row.rank),
        row.label,
        f"{row.mean.estimate:.1f} ± {row.mean.half_width:.1f}",
        against + mark,
        "" if row.time is None else f"{row.time:.2f}×",
        "" if row.memory is None else f"{row.memory:.2f}×",
    ]
