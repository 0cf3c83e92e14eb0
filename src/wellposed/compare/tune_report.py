"""The page of `wellposed tune`: one HTML file that needs no network."""

from __future__ import annotations

import statistics as plain
from typing import Any

from ..lab.figures import line_plot
from ..lab.page import figure, render
from ..lab.scatter import scatter_plot
from .page import KINDS, split_answer
from .printing import MARKS
from .tune_answer import Answer, answer
from .tune_figures import Lines, curve, so_far
from .tune_result import TuneResult
from .tune_terminal import measures, seconds, time_ratios, value_rows


def tune_page(result: TuneResult) -> str:
    """The page as text."""
    found = answer(result)
    first, more = split_answer(found.sentence)
    return render(
        "tune.html.j2",
        "wellposed.compare",
        result=result,
        found=found,
        answer=first,
        more=more,
        measures=measures(result, found),
        marks=MARKS,
        kinds=KINDS,
        validation=[f"{plain.fmean(arm.validation_losses):.4f}" for arm in result.arms],
        seconds=seconds(result),
        ratios=time_ratios(result),
        values=value_rows(result),
        loss_figure=_loss_figure(result),
        value_figures=_value_figures(result),
        place=_place(result),
        every_seed=_every_seed(result, found),
    )


def _place(result: TuneResult) -> str:
    """What the horizontal axis of the method's curves counts."""
    return next((name for name in ("training", "features") if name in result.tuned.curves), "epoch")


def _loss_figure(result: TuneResult) -> Any:
    place = _place(result)
    lines: Lines = {}
    if place == "training":
        best = so_far(result.tuned.curves["validation loss"], min)
        svg = line_plot({result.tuned.label: best}, place, f"lowest validation {result.loss_name} so far",
                        f"Lowest validation {result.loss_name} by training")  # fmt: skip
        return figure(svg)
    for arm in (result.untuned, result.tuned):
        if place in arm.curves and "validation loss" in arm.curves:
            lines[arm.label] = curve(arm.curves, place, "validation loss")
    if not lines:
        return None
    return figure(
        line_plot(lines, place, f"validation {result.loss_name}", f"Validation {result.loss_name} by {place}")
    )


def _value_figures(result: TuneResult) -> list[dict[str, Any]]:
    """One figure a strength; several lines where it has several values."""
    curves, place = result.tuned.curves, _place(result)
    if place == "training":
        return [{"label": label, "svg": svg} for label, svg in _tried(result)]
    drawn = []
    for strength in result.strengths:
        if strength["left_out"] or place not in curves:
            continue
        lines: Lines = {}
        if strength["label"] in curves and len(strength["labels"]) > 1:  # one for each feature, sorted
            lines["sorted"] = curve(curves, place, strength["label"])
        for label in strength["labels"]:
            if label in curves:
                short = label.removeprefix(strength["label"]).strip() or label
                lines[short] = curve(curves, place, label)
        if lines:
            svg = line_plot(
                lines,
                place,
                strength["label"],
                f"{strength['label']} by {place}",
                log_y=bool(strength["log"]),
                narrow=True,
            )
            drawn.append({"label": strength["label"], "svg": figure(svg)})
    return drawn


def _tried(result: TuneResult) -> list[tuple[str, Any]]:
    """The validation loss of every training of a search over each of its values."""
    curves = result.tuned.curves
    losses = curves["validation loss"]
    kept = [seed.index(min(seed)) for seed in losses]
    drawn = []
    for strength in result.strengths:
        for label in strength["labels"]:
            if label not in curves:
                continue
            values = curves[label]
            groups = {
                "tried": ([v for seed in values for v in seed], [v for seed in losses for v in seed]),
                "initial values": ([seed[0] for seed in values], [seed[0] for seed in losses]),
                "kept": (
                    [seed[at] for seed, at in zip(values, kept, strict=True)],
                    [seed[at] for seed, at in zip(losses, kept, strict=True)],
                ),
            }
            what = f"validation {result.loss_name}"
            svg = scatter_plot(groups, label, what, f"{what} over {label}", log_x=bool(strength["log"]), narrow=True)
            drawn.append((label, figure(svg)))
    return drawn


def _every_seed(result: TuneResult, found: Answer) -> list[tuple[str, list[str]]]:
    rows = []
    for arm in result.arms:
        rows.append((f"{arm.label}: {found.score.label}", [f"{v:.{found.score.decimals}f}" for v in arm.scores]))
        rows.append((f"{arm.label}: {found.loss.label}", [f"{v:.{found.loss.decimals}f}" for v in arm.losses]))
    return rows
