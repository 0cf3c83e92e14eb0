"""From prepared data to a printed answer and a written report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from .arms import applicable_arms
from .comparison import Options, compare
from .models import check_model, describe_model
from .report import write_report
from .result import collect, write_files
from .task import Task
from .terminal import print_header, print_result


def compare_and_report(task: Task, options: Options, console: Console) -> Path:
    """Compare, print, and write the report; returns the page.

    Raises:
        UserError: before any training, for options or a model that do not fit the data.
    """
    arms = applicable_arms(task, options.methods)
    model = describe_model(check_model(options.model, task), task)
    print_header(task, model, len(arms), options, console)
    finished = compare(task, options, Console(stderr=True))
    result = collect(finished)
    write_files(result, finished)
    page = write_report(result, options.output)
    print_result(result, finished, console)
    return page
