"""Progress of long work: bars in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Watch:
    """Shows how far each stage of a run is.

    In a terminal: one bar a stage with elapsed and remaining time. Elsewhere (a log file, CI): a line whenever
    another tenth of a stage is done, without control codes.

    Example:
        >>> import io
        >>> console = Console(file=io.StringIO())
        >>> with Watch(console) as watch:
        ...     watch.stage("tuning", 2)
        ...     watch.advance()
        ...     watch.advance()
        >>> console.file.getvalue().splitlines()[-1].startswith("tuning 2/2")
        True
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=36),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=self.console)
        self._name, self._total, self._done, self._task = "", 0, 0, None
        self._started = time.monotonic()

    def __enter__(self) -> Watch:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` pieces of work."""
        self._name, self._total, self._done = name, total, 0
        self._started = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total)  # type: ignore[assignment]

    def extend(self, total: int) -> None:
        """The stage under way turned out to have another number of pieces of work."""
        self._total = total
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=total)

    def advance(self) -> None:
        """One more piece is done."""
        self._done += 1
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)
        elif self._bars is None and self._at_a_tenth():
            seconds = time.monotonic() - self._started
            self.console.print(f"{self._name} {self._done}/{self._total}  {seconds:.0f} s", highlight=False)

    def end_stage(self) -> None:
        """The stage ended, perhaps before all of its work (a deadline)."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=max(1, self._done), completed=max(1, self._done))

    def _at_a_tenth(self) -> bool:
        before = 10 * (self._done - 1) // max(1, self._total)
        return self._done == self._total or 10 * self._done // max(1, self._total) > before
