"""From a prepared study to a printed answer and a written report; what `wellposed tune STUDY` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..page import write_page
from ..tune_record import write_tuning
from .answer import answer_study
from .job import run_study_tuning
from .page import study_page
from .prepared import PreparedStudy
from .result import collect_study
from .terminal import print_study_header, print_study_tuning


def tune_study_and_report(prepared: PreparedStudy, console: Console) -> Path:
    """Tune, print, and write the report; returns the page.

    Raises:
        UserError: if the budget ended before two seeds were done.
        TuningError: if no configuration could be run.
    """
    print_study_header(prepared, console)
    finished = run_study_tuning(prepared, Console(stderr=True))
    result, schedule = collect_study(finished)
    folder = prepared.options.output
    write_tuning(result, schedule, folder)
    page = write_page(study_page(result), folder)
    print_study_tuning(result, answer_study(result), prepared.notes, folder, console)
    return page
