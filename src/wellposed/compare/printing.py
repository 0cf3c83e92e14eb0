"""Lines and tables as all commands print them: plain text, wrapped by the terminal alone, and tables without boxes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

MARKS = {1: "▲", 0: "≈", -1: "▼"}
"""By verdict: better beyond noise, no difference beyond noise, worse."""

VERDICT_STYLES = {1: "bold green", 0: "", -1: "dim"}


def say(console: Console, *lines: str | Text) -> None:
    """Print lines as they are, however long; markup has no meaning in them."""
    for line in lines:
        console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def say_notes(console: Console, notes: Iterable[str]) -> None:
    """What a reader must know."""
    say(console, *(f"note: {note}" for note in notes))


def say_code(console: Console, code: str) -> None:
    """Lines to copy."""
    say(console, *(f"    {line}" for line in code.splitlines()))


def say_report(console: Console, folder: object, schedule: bool) -> None:
    """Where a tuning's files are, and how it goes on."""
    say(console, f"\nreport    {folder}/index.html")
    if schedule:
        say(console, f"schedule  {folder}/schedule.json")
    say(console, "rerun or extend: the same command (finished trainings are kept)")


def plain_table(first: str, *others: str) -> Table:
    """A table without a box: names to the left, numbers to the right.

    Args:
        first: title of the names.
        others: titles of the numbers.

    Example:
        >>> table = plain_table("setting", "initial", "learned")
        >>> [column.justify for column in table.columns]
        ['left', 'right', 'right']
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def marked(gap: str, verdict: int) -> str:
    """A difference with the sign of its verdict; nothing for what is compared with itself."""
    return f"{gap} {MARKS[verdict]}" if gap else gap


def counted(count: int, thing: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "worker"), counted(2, "worker")
        ('1 worker', '2 workers')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"
