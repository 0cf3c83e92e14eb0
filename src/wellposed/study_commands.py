"""The subcommands about studies: run, report, ledger. Thin shells over the laboratory."""

from __future__ import annotations

import json
import os
import webbrowser
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .compare.command_line import command_line

if TYPE_CHECKING:
    from .lab.study import Study
    from .lab.study_run import StudyRun
    from .lab.trial import Setting
    from .papers.catalogue import Card

REPORTS = Path("wellposed-report")
STUDIES = REPORTS / "studies"
VERDICTS = Path("src/wellposed/papers/verdicts.json")


class StudyEngine(StrEnum):
    """How trials run."""

    loky = "loky"
    serial = "serial"
    ray = "ray"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (run, report, ledger):
        app.command()(command)


def run(
    papers: Annotated[list[str], typer.Argument(help="Slugs of papers, e.g. elr.")],
    scale: Annotated[
        str, typer.Option(help="smoke: seconds, never judged; laptop: the verdicts; paper: as published.")
    ] = "laptop",
    seeds: Annotated[int | None, typer.Option(help="Evaluation seeds; what the card registers by default.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for every arm, e.g. epochs=3.")
    ] = None,
    engine: Annotated[
        StudyEngine | None,
        typer.Option(
            help="loky: processes here (the default); serial: this one (at smoke scale the default); ray: a cluster."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the studies' trials and pages.")] = STUDIES,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Test a paper's claims as its card registers them: tuned baselines, controls, and a verdict with its interval."""
    overrides = dict(parse_setting(text) for text in settings or [])
    from .lab.study_run import SCALES, StudyError, StudyOptions, default_workers, run_study
    from .lab.study_terminal import print_study, print_study_header
    from .papers.catalogue import find_card
    from .studies.finding import find_study

    if scale not in SCALES:
        raise StudyError(f"--scale must be one of {', '.join(SCALES)}, got '{scale}'")
    # A smoke study is shorter than the start of a worker, unless several were asked for.
    chosen = engine or (StudyEngine.serial if scale == "smoke" and workers is None else StudyEngine.loky)
    cards = [find_card(slug) for slug in papers]  # a wrong name must fail before the first study runs
    found = [find_study(card.slug, scale) for card in cards]
    console = Console(soft_wrap=False)
    for card, study in zip(cards, found, strict=True):
        options = StudyOptions(
            scale, output / (card.slug if scale == "laptop" else f"{card.slug}-{scale}"), seeds, overrides,
            workers or (1 if chosen is StudyEngine.serial else default_workers(scale)), chosen.value, command_line(),
        )  # fmt: skip
        print_study_header(card, options, console)
        finished = run_study(study, card, options)
        record, page = _keep(finished)
        print_study(record, card, console, options.output)
        if open_report:
            webbrowser.open(page.resolve().as_uri())


def _keep(finished: StudyRun) -> tuple[dict[str, Any], Path]:
    from .lab.record import make_record, write_record

    folder = finished.options.output
    record = make_record(finished)
    figures = finished.study.figures(finished) if finished.study.figures is not None else ()
    record["figures"] = [{"title": f.title, "caption": f.caption, "svg": f.svg} for f in figures]
    write_record(record, folder)
    return record, _write_page(record, folder)


def _write_page(record: dict[str, Any], folder: Path) -> Path:
    from .lab.study import Figure
    from .lab.study_page import write_study_page
    from .papers.catalogue import find_card

    figures = [Figure(f["title"], f["caption"], f["svg"]) for f in record.get("figures", [])]
    return write_study_page(record, find_card(record["slug"]), folder, figures)


def parse_setting(text: str) -> tuple[str, Setting]:
    """Read `name=value`; numbers and truth values are recognised.

    Raises:
        typer.BadParameter: without a name or a value.

    Example:
        >>> parse_setting("epochs=3"), parse_setting("noise=human"), parse_setting("nesterov=true")
        (('epochs', 3), ('noise', 'human'), ('nesterov', True))
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise typer.BadParameter(f"--set must read NAME=VALUE, e.g. epochs=3, got '{text}'")
    value = value.strip()
    if value.lower() in ("true", "false"):
        return name.strip(), value.lower() == "true"
    for kind in (int, float):
        try:
            return name.strip(), kind(value)
        except ValueError:
            continue
    return name.strip(), value


def report(
    name: Annotated[str | None, typer.Argument(help="A paper's slug, or a comparison; the latest by default.")] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Render the report of a finished study, comparison or tuning again."""
    from .compare.errors import UserError

    folder = _report_folder(name)
    try:
        if (folder / "study.json").is_file():
            from .lab.record import read_record

            page = _write_page(read_record(folder), folder)
        else:
            page = _render(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    typer.echo(f"report  {page}")
    if open_report:
        webbrowser.open(page.resolve().as_uri())


def _render(folder: Path) -> Path:
    """The page of a comparison, or of what was tuned."""
    from .compare.tune_record import is_tuning

    if is_tuning(folder):
        from .compare.tune_again import render_tuning

        return render_tuning(folder)
    from .compare.report import write_report
    from .compare.result import load_result

    return write_report(load_result(folder), folder)


def _report_folder(name: str | None) -> Path:
    from .compare.errors import UserError, suggestion

    found = [*REPORTS.glob("*/results.json"), *STUDIES.glob("*/study.json")]
    if name is None:
        if not found:
            raise UserError(
                "no finished study or comparison here; begin with: wellposed compare digits --noise 0.4, or wellposed run elr"
            )
        return max(found, key=lambda path: path.stat().st_mtime).parent
    for folder in (Path(name), STUDIES / name, REPORTS / name):
        if any((folder / file).is_file() for file in ("study.json", "results.json")):
            return folder
    names = sorted({path.parent.name for path in found})
    raise UserError(
        f"no finished study or comparison '{name}'.{suggestion(name, names)} Here: {', '.join(names) or 'none'}"
    )


def ledger(
    check: Annotated[bool, typer.Option("--check", help="Change nothing: list what is wrong or stale.")] = False,
    replay: Annotated[
        list[str] | None, typer.Option(help="Repeat a stale study's trials of two seeds; if all agree, it is current.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="COMMIT",
            help="With --replay, where this machine rounds otherwise than the entry's: compare with that commit's code, here.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="With --check: stale entries fail, too.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the ledger.")] = Path("results"),
    studies: Annotated[Path, typer.Option(help="Folder of finished studies.")] = STUDIES,
) -> None:
    """Export the verdicts of finished laptop-scale studies to the ledger, and README's table; or check both."""
    if beside is not None and not replay:
        raise typer.BadParameter("--beside COMMIT belongs to --replay SLUG")
    if replay:
        _replay(replay, results, beside)
    elif not check:
        _export(studies, results)
    wrong, stale = _check(results)
    if wrong or (strict and stale):
        raise typer.Exit(1)


def _export(studies: Path, results: Path) -> None:
    from .lab.ledger import LedgerError, export
    from .lab.record import read_record

    for path in sorted(studies.glob("*/study.json")):
        record = read_record(path.parent)
        slug = record["slug"]
        if record["scale"] != "laptop":
            continue
        try:
            typer.echo(f"{slug:<20} exported to {export(record, results)}")
        except LedgerError as error:
            typer.echo(f"not exported: {error}")
    _write_summary(results)


def _write_summary(results: Path) -> None:
    """What the catalogue and the pages show of the ledger, in a checkout of the project."""
    from .lab.ledger import read_ledger, summary
    from .papers.pages import write
    from .papers.verdicts import load_verdicts

    if VERDICTS.parent.is_dir():
        VERDICTS.write_text(_summary_text(summary(read_ledger(results))), "utf-8")
        load_verdicts.cache_clear()
        write(Path.cwd())


def _replay(slugs: list[str], results: Path, beside: str | None) -> None:
    from .compare.errors import UserError
    from .lab.ledger import read_ledger, write_entry
    from .lab.progress import Watch
    from .lab.replay import replay, replay_trials, stamped
    from .lab.study_run import default_workers, study_fingerprint
    from .papers.catalogue import find_card
    from .studies.finding import find_study

    entries = read_ledger(results)
    for slug in slugs:
        card = find_card(slug)
        if card.slug not in entries:
            raise UserError(f"{card.slug} is not in the ledger; it holds: {', '.join(entries) or 'nothing'}")
        entry, study = entries[card.slug], find_study(card.slug)
        if beside is not None:
            _replay_beside(card, study, entry, results, beside)
            continue
        with Watch() as watch:
            wanted = replay_trials(entry, study, card, study_fingerprint(study))
            watch.stage(card.slug, len({trial.key for trial in wanted.values()}))
            found = replay(entry, study, card, workers=default_workers(), on_done=lambda *_: watch.advance())
        if found.stamp is None:
            typer.echo(
                f"{card.slug}: {len(found.differences)} of {found.trials} trials came out otherwise: {found.differences[0]}"
            )
            typer.echo(
                f"if the entry is of another kind of processor: wellposed ledger --replay {card.slug} --beside COMMIT, a "
                f"commit at which it was current; else run it again: wellposed run {card.slug}"
            )
            continue
        write_entry(stamped(entry, found), results)
        typer.echo(f"{card.slug}: {found.trials} trials came out the same to ten digits; the entry is current")
    _write_summary(results)


def _replay_beside(card: Card, study: Study, entry: dict[str, Any], results: Path, revision: str) -> None:
    from .compare.errors import UserError
    from .lab.ledger import write_entry
    from .lab.replay import replay_trials, replayed_beside, stamped
    from .lab.replay_beside import ReplayError, replay_beside
    from .lab.study_run import study_fingerprint

    wanted = replay_trials(entry, study, card, study_fingerprint(study))
    trials = len({trial.key for trial in wanted.values()})
    typer.echo(f"{card.slug}: {trials} trials by the code of {revision}, then by the present code")
    try:
        differences = replay_beside(card.slug, entry, revision, Path.cwd())
    except ReplayError as error:
        raise UserError(str(error)) from error
    if differences:
        typer.echo(f"{card.slug}: {len(differences)} trials came out otherwise: {differences[0]}")
        typer.echo(f"run it again: wellposed run {card.slug}")
        return
    write_entry(stamped(entry, replayed_beside(entry, study, card, revision, trials)), results)
    typer.echo(
        f"{card.slug}: {trials} trials are the same, bit for bit, as by the code of {revision}; the entry is current"
    )


def _summary_text(lines: dict[str, dict[str, Any]]) -> str:
    return json.dumps(lines, indent=1, sort_keys=True) + "\n"


def _check(results: Path) -> tuple[list[str], list[str]]:
    """Print a line a study; returns what is wrong, and which entries are stale."""
    from .lab.ledger import faults, read_ledger, summary
    from .lab.replay import is_current
    from .lab.study_run import study_fingerprint
    from .papers.catalogue import load_cards
    from .papers.pages import stale as stale_pages
    from .studies.finding import UnknownStudy, find_study, studied_papers

    entries, cards = read_ledger(results), load_cards()
    wrong: list[str] = []
    stale: list[str] = []
    for slug, entry in entries.items():
        try:
            if slug not in cards:
                raise UnknownStudy(f"{slug}: no paper has this slug")
            study = find_study(slug)
        except UnknownStudy as error:
            wrong.append(str(error))
            continue
        found = faults(entry, cards[slug], study)
        wrong += found
        old = not is_current(entry, study_fingerprint(study))
        stale += [slug] if old else []
        state = "wrong" if found else "stale: the code changed since it ran" if old else "up to date"
        primary: dict[str, Any] = next((c for c in entry.get("claims", []) if c.get("primary")), {})
        typer.echo(f"{slug:<20} {state:<12} {primary.get('verdict', '')} {primary.get('qualifier', '')}".rstrip())
    for slug in studied_papers():
        if slug not in entries:
            typer.echo(f"{slug:<20} not run     at laptop scale: wellposed run {slug}")
    if VERDICTS.parent.is_dir():
        text = VERDICTS.read_text("utf-8") if VERDICTS.is_file() else ""
        if text != _summary_text(summary(entries)):
            wrong.append(f"{VERDICTS} does not agree with {results}: run wellposed ledger")
        wrong += [
            f"{os.path.relpath(page)} is not what the cards and the ledger give: make docs"
            for page in stale_pages(Path.cwd())
        ]
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        *[f"[red]wrong:[/red] {w}" for w in wrong], sep="\n", end="\n" if wrong else ""
    )
    typer.echo(
        f"{len(entries)} studies in the ledger, {len(stale)} stale, {len(wrong)} fault{'' if len(wrong) == 1 else 's'}"
    )
    return wrong, stale


__all__ = ["REPORTS", "parse_setting", "register"]
