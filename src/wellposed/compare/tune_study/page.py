"""The page of `wellposed tune STUDY`: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...lab.figures import line_plot
from ...lab.page import figure, render
from ...lab.scatter import scatter_plot
from ..page import KINDS, split_answer
from ..printing import MARKS
from ..tune_figures import Lines, curve, places, so_far
from .answer import answer_study
from .job import LEDGER
from .result import StudyTuneResult
from .terminal import settings_rows
from .training import is_number


def study_page(result: StudyTuneResult) -> str:
    """The page as text."""
    found = answer_study(result)
    first, more = split_answer(found.sentence)
    header, rows = settings_rows(result)
    return render(
        "tune_study.html.j2",
        "wellposed.compare",
        result=result,
        found=found,
        answer=first,
        more=more,
        marks=MARKS,
        kinds=KINDS,
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
        lines: Lines = {result.method_label: so_far([scores], max)}
        return figure(line_plot(lines, "configuration", "best score so far", "Best score by configuration"))
    if not result.tuned.curves.get("validation loss"):
        return None
    lines = {result.method_label: curve(result.tuned.curves, "epoch", "validation loss")}
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
        if not result.tuned.curves.get(name):
            continue
        lines: Lines = {result.method_label: curve(result.tuned.curves, "epoch", name)}
        held = None if kept is None or kept.settings is None else kept.settings.get(name)
        if isinstance(held, (int, float)):
            epochs = places(result.tuned.curves, "epoch")
            lines["ledger"] = (epochs, [[float(held)] * len(epochs)])
        svg = line_plot(lines, "epoch", name, f"{name} by epoch", log_y=log, narrow=True)
        drawn.append({"label": name, "svg": figure(svg)})
    return drawn


def _tried_values(result: StudyTuneResult, name: str) -> dict[str, tuple[list[float], list[float]]] | None:
    """Values and scores of every configuration, of the registered one and of the best; None for what is no number."""
    if not all(is_number(settings[name]) for settings, _ in result.history):
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
