"""The page of `wellposed tune STUDY`: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...lab.figures import line_plot
from ...lab.files import write_atomically
from ...lab.page import figure, render
from ...lab.scatter import scatter_plot
from ..tune_report import so_far
from ..tune_terminal import MARKS
from .answer import answer_study
from .job import LEDGER
from .result import StudyTuneResult
from .terminal import settings_rows

Lines = dict[str, tuple[Sequence[float], Sequence[Sequence[float]]]]


def write_study_page(result: StudyTuneResult, folder: str | Path) -> Path:
    """Write index.html.

    Returns:
        Its path.

    Raises:
        WriteError: if it cannot be written; an older page is intact.
    """
    return write_atomically(Path(folder) / "index.html", study_page(result))


def study_page(result: StudyTuneResult) -> str:
    """The page as text."""
    found = answer_study(result)
    first, _, more = found.sentence.partition(". ")
    header, rows = settings_rows(result)
    return render(
        "tune_study.html.j2",
        "wellposed.compare",
        result=result,
        found=found,
        answer=first if not more else f"{first}.",
        more=more,
        marks=MARKS,
        kinds={1: "better", 0: "within-noise", -1: "worse"},
        settings_header=header,
        settings=rows,
        progress_figure=_progress_figure(result),
        value_figures=_value_figures(result),
        every_seed=[(arm.label, [f"{v:.{found.decimals}f}" for v in arm.scores]) for arm in result.arms],
        tried=[_tried(settings, score, result.tuned_names) for settings, score in result.history],
    )


def _progress_figure(result: StudyTuneResult) -> Any:
    """The validation loss by epoch, or the best score so far by configuration."""
    if result.history:
        scores = [score for _, score in result.history if score is not None]
        places, best = so_far([scores], max)
        lines: Lines = {result.method_label: (places, best)}
        return figure(line_plot(lines, "configuration", "best score so far", "Best score by configuration"))
    losses = result.tuned.curves.get("validation loss")
    if not losses:
        return None
    lines = {result.method_label: (_epochs(result), losses)}
    return figure(line_plot(lines, "epoch", "validation loss", "Validation loss by epoch"))


def _value_figures(result: StudyTuneResult) -> list[dict[str, Any]]:
    """One figure a setting: its value by epoch beside the ledger's, or the score of what a search tried."""
    kept = result.find(LEDGER)
    drawn = []
    for name in result.tuned_names:
        log = name in result.logs
        if result.history:
            if (groups := _tried_values(result, name)) is not None:
                svg = scatter_plot(groups, name, "tuning score", f"Tuning score over {name}", log_x=log, narrow=True)
                drawn.append({"label": name, "svg": figure(svg)})
            continue
        if not (found := result.tuned.curves.get(name)):
            continue
        lines: Lines = {result.method_label: (_epochs(result), found)}
        held = None if kept is None or kept.settings is None else kept.settings.get(name)
        if isinstance(held, (int, float)):
            lines["ledger"] = (_epochs(result), [[float(held)] * len(_epochs(result))])
        svg = line_plot(lines, "epoch", name, f"{name} by epoch", log_y=log, narrow=True)
        drawn.append({"label": name, "svg": figure(svg)})
    return drawn


def _epochs(result: StudyTuneResult) -> Sequence[float]:
    return max(result.tuned.curves.get("epoch", [[]]), key=len)


def _tried_values(result: StudyTuneResult, name: str) -> dict[str, tuple[list[float], list[float]]] | None:
    """Values and scores of every configuration, of the registered one and of the best; None for what is no number."""
    if not all(_is_number(settings[name]) for settings, _ in result.history):
        return None
    tried = [(float(settings[name]), score) for settings, score in result.history if score is not None]
    if not tried:
        return None
    groups = {"tried": ([v for v, _ in tried], [s for _, s in tried])}
    first, score = result.history[0]
    if score is not None:
        groups["registered"] = ([float(first[name])], [score])
    value, best = max(tried, key=lambda pair: pair[1])
    groups["best"] = ([value], [best])
    return groups


def _tried(settings: dict[str, Any], score: float | None, names: Sequence[str]) -> tuple[str, str]:
    shown = ", ".join(f"{name}={settings[name]:.3g}" if isinstance(settings[name], float) else f"{name}={settings[name]}"
                      for name in names)  # fmt: skip
    return shown, "diverged" if score is None else f"{score:.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
