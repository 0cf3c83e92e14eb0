"""The subcommand `wellposed tune`, a thin shell over `wellposed.compare.tune`."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .compare.tune_options import METHODS, SEARCH_TRIALS

REPORTS = Path("wellposed-report")


class TuneEngine(StrEnum):
    """How trainings run."""

    loky = "loky"
    serial = "serial"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(tune)


def tune(
    data: Annotated[str, typer.Argument(help="A data set's name, CSV, Parquet, .npz, or a folder of images by class.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "stn",
    learn: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: weight-decay, dropout, label-smoothing, input-noise (all by default), or a method of "
            "the catalogue whose strength can be learned, e.g. elr."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict, for CSV and Parquet.")] = None,
    noise: Annotated[float, typer.Option(help="Flip this share of the training labels, as a stress test.")] = 0.0,
    model: Annotated[str | None, typer.Option(help="Your model: module:function.")] = None,
    budget: Annotated[str | None, typer.Option(help="Wall-clock limit, e.g. 90s, 10m, 1h; seeds are left out.")] = None,
    seeds: Annotated[int, typer.Option(help="How often both arms train; fewer than 6 cannot show a difference.")] = 6,
    epochs: Annotated[int | None, typer.Option(help="Epochs of one training; by the size of the data.")] = None,
    trials: Annotated[int | None, typer.Option(help=f"Trainings of a search, {SEARCH_TRIALS} by default.")] = None,
    task: Annotated[str | None, typer.Option(help="classification or regression; found from the target.")] = None,
    drop_missing: Annotated[bool, typer.Option("--drop-missing", help="Leave out rows with missing values.")] = False,
    image_size: Annotated[int, typer.Option(help="Side in pixels to which images of a folder are resized.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    engine: Annotated[TuneEngine, typer.Option(help="loky: worker processes; serial: this one.")] = TuneEngine.loky,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; wellposed-report/tune-NAME by default.")
    ] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Learn hyperparameters while training on YOUR data, and say whether that beat leaving them alone."""
    from .commands import parse_duration
    from .compare.tune_options import TuneOptions, check_tune_options

    options = TuneOptions(
        method=method, learn=None if learn is None else [name.strip() for name in learn.split(",") if name.strip()],
        model=model, budget=None if budget is None else parse_duration(budget), seeds=seeds, epochs=epochs,
        trials=trials, workers=_cores() if workers is None else workers, engine=engine.value,
        output=output or REPORTS / f"tune-{Path(data).stem or 'data'}",
        command=shlex.join(["wellposed", *sys.argv[1:]]),
    )  # fmt: skip
    check_tune_options(options)
    # Only after the words are checked: reading data takes a second, and torch another.
    from .compare.source import read_source
    from .compare.task import Task

    source = read_source(data, target, drop_missing=drop_missing, image_size=image_size, task=task)
    prepared = Task.prepare(source, noise)
    options = replace(options, features=source.features)
    from .compare.tune import tune_and_report

    page = tune_and_report(prepared, options, Console(soft_wrap=False))
    if open_report:
        webbrowser.open(page.resolve().as_uri())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
