"""`wellposed tune` on a paper's study: its method's strengths, on the study's own problem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .choice import PreparedStudy


def tune_study_and_report(prepared: PreparedStudy, console: Console) -> Path:
    """Tune, print, and write the report; returns the page.

    Raises:
        UserError: if the budget ended before two seeds were done.
        TuningError: if no configuration could be run.
    """
    from rich.console import Console

    from .answer import answer_study
    from .job import run_study_tuning
    from .page import write_study_page
    from .result import collect_study, write_study_tuning
    from .terminal import print_study_header, print_study_tuning

    print_study_header(prepared, console)
    finished = run_study_tuning(prepared, Console(stderr=True))
    result, schedule = collect_study(finished)
    folder = prepared.options.output
    write_study_tuning(result, schedule, folder)
    page = write_study_page(result, folder)
    print_study_tuning(result, answer_study(result), prepared.notes, folder, console)
    return page
