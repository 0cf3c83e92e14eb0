"""From prepared data to learned hyperparameters, a printed answer and a written report; what `wellposed tune` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from .page import write_page
from .task import Task
from .tune_answer import answer
from .tune_job import prepare_tuning, run_tuning
from .tune_options import TuneOptions
from .tune_record import write_tuning
from .tune_report import tune_page
from .tune_result import collect_tuning
from .tune_terminal import header_notes, print_tune_header, print_tuning


def tune_and_report(task: Task, options: TuneOptions, console: Console) -> Path:
    """Learn, print, and write the report; returns the page.

    Raises:
        UserError: before any training, for options, names or a model that do not fit the data.
    """
    prepared = prepare_tuning(task, options)
    print_tune_header(prepared, console)
    finished = run_tuning(prepared, Console(stderr=True))
    result, schedule = collect_tuning(finished)
    write_tuning(result, schedule, options.output)
    page = write_page(tune_page(result), options.output)
    print_tuning(result, answer(result), header_notes(prepared), options.output, console)
    return page
