"""What all figures share: stand-in colours that the page's style sheet fills in, and the way to inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Matplotlib draws with these stand-ins; the page's style sheet gives them their colours, light or dark.
INK, MUTED, LINE, ACCENT, SECOND, THIRD, PAPER = (f"#0{n}0{n}0{n}" for n in range(1, 8))
_VARIABLES = dict(
    zip(
        (INK, MUTED, LINE, ACCENT, SECOND, THIRD, PAPER),
        ("ink", "muted", "line", "accent", "second", "third", "paper"),
        strict=True,
    )
)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wellposed",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's defaults with the changes of the page, whatever the user's own settings are."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(
    width: float,
    height: float,
    rows: int,
    columns: int,
    margins: tuple[float, float, float, float] | None = None,
    **layout: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, whose state would be the whole process's.

    Args:
        width, height: inches.
        rows, columns: of its grid of axes.
        margins: left, bottom, right and top, as shares of the figure; fitted to the labels if None, which is slower,
            and puts the axes of several figures at different places.
        layout: of the grid, as matplotlib's `GridSpec` takes it.
    """
    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    if margins:
        figure.subplots_adjust(**dict(zip(("left", "bottom", "right", "top"), margins, strict=True)))
    else:
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=layout or None)
    return figure, list(grid.flat)


def to_svg(figure: Figure, title: str, prefix: str) -> str:
    """The figure as an element that scales with the page, has a name for screen readers, and no fixed colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    # Inside HTML neither name spaces nor a size are needed.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # Ids of several figures on one page must not meet.
    prefix = re.sub(r"\W+", "", prefix.lower())
    text = re.sub(r'(id="|href="#|url\(#)', lambda m: f"{m.group(1)}{prefix}-", text)
    # Hundredths of a point are enough for attributes; numbers that are read stay as they are.
    text = re.sub(r'"[^"]*"', lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), re.sub(r"\n\s*", "\n", text))
    name = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
