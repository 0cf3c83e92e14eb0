"""What `wellposed tune` shows while it runs: where each training is, and every hyperparameter's value now."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..lab.progress import Watch

EVERY = 0.2
"""Seconds between two reports of a training, and between two looks at them."""

STALE = 60.0
"""A report that was not renewed for so many seconds belongs to a training that was killed."""


class Report:
    """Where one training is, in a file that another process reads; costs nothing where nobody looks.

    Args:
        folder: of the reports, or None.
        title: of the training.
    """

    def __init__(self, folder: str | Path | None, title: str) -> None:
        self.path = None if folder is None else Path(folder) / f"{title.replace(' ', '-')}.json"
        self.title = title
        self._next = 0.0

    def write(self, step: int | None, steps: int | None, loss: float | None, values: Mapping[str, float]) -> None:
        """Say where the training is, unless it was said a moment ago; one that does not tell has values alone."""
        if self.path is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        content = {"title": self.title, "step": step, "steps": steps, "loss": loss, "values": dict(values)}
        draft = self.path.with_suffix(".part")
        try:
            draft.write_text(json.dumps(content), "utf-8")
            os.replace(draft, self.path)
        except OSError:  # a full disk must not end a training over a table that nobody keeps
            self.path = None

    def end(self) -> None:
        """The training is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """All reports that are fresh, in the order of their titles."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            if time.time() - path.stat().st_mtime < STALE:
                found.append(json.loads(path.read_text("utf-8")))
        except (OSError, json.JSONDecodeError):
            continue  # it ended while we looked
    return found


def live_table(reports: list[dict[str, Any]], most: int = 4) -> Table:
    """One column a training: step, validation loss, and each hyperparameter's value now.

    Example:
        >>> report = {"title": "stn 1000", "step": 40, "steps": 90, "loss": 0.5, "values": {"dropout": 0.07}}
        >>> live_table([report]).row_count
        3
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    shown = reports[:most]
    for report in shown:
        table.add_column(report["title"], justify="right", no_wrap=True)
    if not shown:
        return table
    if any(r["step"] is not None for r in shown):
        table.add_row("step", *("" if r["step"] is None else f"{r['step']:,}/{r['steps']:,}" for r in shown))
    if any(r["loss"] is not None for r in shown):
        table.add_row("validation loss", *("" if r["loss"] is None else f"{r['loss']:.4f}" for r in shown))
    for label in dict.fromkeys(label for r in shown for label in r["values"]):
        table.add_row(label, *(f"{r['values'][label]:.3g}" if label in r["values"] else "" for r in shown))
    return table


class TuneWatch:
    """The bar of finished trainings and the live table in a terminal; a few plain lines elsewhere.

    Args:
        console: where it goes.
        folder: of the reports.
    """

    def __init__(self, console: Console | None, folder: Path) -> None:
        self.console = console or Console(stderr=True)
        self.folder = folder
        self._watch = None if self.console.is_terminal else Watch(self.console)
        self._progress = Progress(
            TextColumn("{task.description:<8}"), BarColumn(bar_width=36), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._task: Any = None
        self._begun = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> TuneWatch:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)  # of a run that was killed
        if self._watch is None:
            self._live.start()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._watch is None:
            self._thread.join()
            self._live.stop()
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
        self.folder.rmdir()

    def stage(self, name: str, total: int) -> None:
        """Begin, or extend, the trainings to do."""
        begun, self._begun = self._begun, True
        if self._watch is not None:
            if begun:
                self._watch.extend(total)
            else:
                self._watch.stage(name, total)
        elif not begun:
            self._task = self._progress.add_task(name, total=total)
        else:
            self._progress.update(self._task, total=total)

    def advance(self) -> None:
        """One more is done."""
        if self._watch is not None:
            self._watch.advance()
        else:
            self._progress.advance(self._task)

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._live.update(self._shown(), refresh=True)

    def _shown(self) -> RenderableType:
        return Group(self._progress, live_table(read_reports(self.folder)))
