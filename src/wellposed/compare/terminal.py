"""What a comparison prints: as wide as the terminal allows, and no colour where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.text import Text

from .comparison import Finished, Options
from .printing import counted, say, say_code, say_notes
from .ranking import Ranking, Row, signed
from .result import ComparisonResult
from .task import Task

STYLES = {"better": "bold green", "reference": "bold", "within noise": "", "worse": "dim"}
MARKS = {"better": "▲", "reference": " ", "within noise": "≈", "worse": "▼"}
SHORTEST_LABEL = 14


def print_header(task: Task, model: str, arms: int, options: Options, console: Console) -> None:
    """What is about to be done, before it begins."""
    console.print()
    say(
        console,
        Text.assemble((task.name, "bold"), f" · {task.describe()} · model: {model}"),
        task.describe_split(),
        f"{arms} arms · {counted(options.rounds, 'tuning trial')} each on validation data, then {options.seeds} seeds on "
        f"the test set · {counted(options.workers, 'worker')}",
    )
    say_notes(console, task.notes)


def print_result(result: ComparisonResult, finished: Finished, console: Console) -> None:
    """The ranked table, the answer, the lines that apply it, and where the report is."""
    ranking = result.ranking()
    console.print()
    console.print(ranked_table(ranking, metric_label(result), console.width))
    console.print()
    console.print(Text(ranking.sentence, style="bold"))
    if result.issues is not None and result.issues["path"]:
        count, label = result.issues["count"], result.issues["label"]
        say(console, f"{count:,} training labels look wrong to {label}: {result.issues['path']}")
    say_notes(console, result.notes[len(finished.task.notes) :])
    console.print("\nUse it:")
    say_code(console, result.usage)
    folder = finished.options.output
    say(
        console,
        f"\nreport  {folder / 'index.html'}",
        f"script  {folder / 'apply.py'}",
        "rerun or extend: the same command (finished trials are kept)",
    )


def metric_label(result: ComparisonResult) -> str:
    """What the scores are, as tables and figures say it."""
    return "R² × 100" if result.kind == "regression" else result.metric


def ranked_table(ranking: Ranking, metric: str, width: int = 100) -> Group:
    """One line an arm, under a line that says what may be claimed of the arms below it.

    Where the width does not allow for all columns, the heads take two lines; then memory goes, then time; then labels
    are shortened.
    """
    lines = [cells(row, ranking.decimals) for row in ranking.rows]
    columns = 6 if any(line[5] for line in lines) else 5
    heads = [["", "arm", metric, f"against {ranking.baseline.label}", "time", "memory"]]
    if sum(_widths([*heads, *lines], columns)) > width:
        upper, _, lower = metric.rpartition(" ")
        heads = [["", "", upper, "against", "", ""], ["", "arm", lower, ranking.baseline.label, "time", "memory"]]
    while columns > 4 and sum(_widths([*heads, *lines], columns)) > width:
        columns -= 1
    widths = _widths([*heads, *lines], columns)
    widths[1] = max(SHORTEST_LABEL, widths[1] - max(0, sum(widths) - width))
    total = min(width, sum(widths))
    parts = [Text(_joined(head, widths), style="dim", no_wrap=True) for head in heads]
    remaining = iter(lines)
    for title, rows in sections(ranking):
        if title:
            rule = f"  ─── {title} "
            parts.append(Text(rule + "─" * (total - cell_len(rule)), style="dim", no_wrap=True))
        for row in rows:
            parts.append(Text(_joined(next(remaining), widths), style=STYLES[row.group], no_wrap=True))
            if row.failures:
                parts.append(Text(f"     {failed(row, ranking)}", style="red"))
    return Group(*parts)


def sections(ranking: Ranking) -> Iterator[tuple[str, list[Row]]]:
    """Rows by what may be said of them, each group with its title; the best need none.

    Rows stay in the order of their means, so that a noisy arm may stand among better ones, under a title of its own.
    """
    reference = ranking.baseline.label
    titles = {"better": f"better than {reference}", "within noise": f"within noise of {reference}"}

    def group(row: Row) -> str:
        return "within noise" if row.group == "reference" else row.group

    for number, (name, rows) in enumerate(groupby(ranking.rows, group)):
        title = titles.get(name, f"worse than {reference}")
        yield ("" if number == 0 and name == "better" else title), list(rows)


def failed(row: Row, ranking: Ranking) -> str:
    """ "2 of 12 seeds failed and count as the worst score"."""
    return f"{row.failures} of {ranking.seeds} seeds failed and count as the worst score"


def cells(row: Row, decimals: int = 1) -> list[str]:
    """The text of a line: rank, label, score, difference, time, memory."""
    gap, d = row.difference, decimals
    against = "(reference)"
    if gap is not None:
        against = f"{signed(gap.estimate, d)}  [{signed(gap.low, d)}, {signed(gap.high, d)}]"
    return [
        str(row.rank),
        row.label,
        f"{row.mean.estimate:.{d}f} ± {row.mean.half_width:.{d}f}",
        f"{against} {MARKS[row.group]}",
        "" if row.time is None else f"{row.time:.2f}×",
        "" if row.memory is None else f"{row.memory:.2f}×",
    ]


def _widths(lines: Sequence[Sequence[str]], columns: int) -> list[int]:
    """Width of each column with the gap before it."""
    longest = [max(cell_len(text) for text in column) for column in zip(*lines, strict=True)]
    return [width + (2 if number else 0) for number, width in enumerate(longest[:columns])]


def _joined(texts: Sequence[str], widths: Sequence[int]) -> str:
    """A line of as many columns as there are widths: the label to the left, all else to the right."""
    found = ""
    for number, (text, width) in enumerate(zip(texts, widths, strict=False)):
        if number == 1:
            room = width - 2
            shown = text if cell_len(text) <= room else set_cell_size(text, room - 1) + "…"
            found += "  " + set_cell_size(shown, room)
        else:
            found += " " * (width - cell_len(text)) + text
    return found.rstrip()
