"""The subcommand `wellposed tune`, a thin shell over `wellposed.compare.tune` and `wellposed.compare.tune_study`."""

from __future__ import annotations

import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .compare.command_line import Engine, command_line, cores, parse_duration, parse_names
from .compare.tune_options import METHODS, SEARCH_TRIALS
from .study_commands import REPORTS, parse_setting


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(tune)


def tune(
    data: Annotated[
        str,
        typer.Argument(help="A data set's name, CSV, Parquet, .npz, a folder of images by class; or a paper's slug."),
    ],
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
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels to which images of a folder are resized; 32.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="Of a study: its arm; the paper's first by default.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Of a study: configurations of a search, 8 by default.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of a study: NAME=VALUE that is not tuned, e.g. epochs=3.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    engine: Annotated[Engine, typer.Option(help="loky: worker processes; serial: this one.")] = Engine.loky,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; wellposed-report/tune-NAME by default.")
    ] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Learn hyperparameters on YOUR data, or on a paper's study, and say whether that beat leaving them alone."""
    from .compare.tune_options import TuneOptions, check_tune_options
    from .compare.tune_study.naming import refuse_options, study_slug

    slug = study_slug(data)
    if slug is not None:
        of_data = {
            "--learn": learn, "--target": target, "--noise": noise, "--model": model, "--epochs": epochs,
            "--trials": trials, "--task": task, "--drop-missing": drop_missing, "--image-size": image_size,
        }  # fmt: skip
        instead = {"--trials": "--rounds", "--epochs": f"--set epochs={epochs}", "--learn": "--arm"}
        refuse_options(data, of_data, "data", instead)
        page = _tune_study(slug, method, arm, rounds, settings or [], budget, seeds, workers, engine, output)
    else:
        of_study = {"--arm": arm, "--rounds": rounds, "--set": settings}
        refuse_options(data, of_study, "a study", {"--arm": "--learn", "--rounds": "--trials"})
        options = TuneOptions(
            method=method, learn=parse_names(learn), model=model, seeds=seeds, epochs=epochs, trials=trials,
            budget=None if budget is None else parse_duration(budget), workers=cores() if workers is None else workers,
            engine=engine.value, output=output or REPORTS / f"tune-{Path(data).stem or 'data'}", command=command_line(),
        )  # fmt: skip
        check_tune_options(options)
        # Only after the words are checked: reading data takes a second, and torch another.
        from .compare.source import read_source
        from .compare.task import Task

        source = read_source(data, target, drop_missing=drop_missing, image_size=image_size or 32, task=task)
        prepared = Task.prepare(source, noise)
        from .compare.tune import tune_and_report

        page = tune_and_report(prepared, replace(options, features=source.features), Console(soft_wrap=False))
    if open_report:
        webbrowser.open(page.resolve().as_uri())


def _tune_study(
    slug: str,
    method: str,
    arm: str | None,
    rounds: int | None,
    settings: list[str],
    budget: str | None,
    seeds: int,
    workers: int | None,
    engine: Engine,
    output: Path | None,
) -> Path:
    from .compare.tune_study.options import StudyTuneOptions, check_study_options

    options = StudyTuneOptions(
        method=method, arm=arm, rounds=rounds, seeds=seeds, budget=None if budget is None else parse_duration(budget),
        overrides=dict(parse_setting(text) for text in settings), workers=cores() if workers is None else workers,
        engine=engine.value, output=output or REPORTS / f"tune-{slug}", command=command_line(),
    )  # fmt: skip
    check_study_options(options)
    # Only after the words are checked: torch takes a second.
    from .compare.tune_study.choice import prepare_study
    from .compare.tune_study.run import tune_study_and_report
    from .papers.catalogue import find_card
    from .studies.finding import find_study
    from .studies.tunable import tunable_papers, with_offer

    prepared = prepare_study(with_offer(find_study(slug)), find_card(slug), options, tunable_papers())
    return tune_study_and_report(prepared, Console(soft_wrap=False))
