"""Simulate the verdict rule and write the tables and the figure of docs/verdicts.md; with --check, recompute parts.

The check draws anew, with a twentieth of the repetitions, and fails where a shown number lies outside the Monte-Carlo
error of the two.
"""

from __future__ import annotations

import io
import math
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from wellposed.lab.drawing import ACCENT, INK, LINE, MUTED, PAPER, SECOND, THIRD, house_style, new_figure
from wellposed.lab.simulation import (
    DISTRIBUTIONS,
    Distribution,
    draw,
    effect_shares,
    effect_words,
    equivalence_words,
    half_widths,
    shares,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "verdicts.md"
FIGURE = ROOT / "docs" / "images" / "verdicts-words.svg"
SEEDS = (8, 12, 24)
LINES = 31
FAR = 3.0
"""Standard deviations: where a contrast decides nothing."""

# The page's light colours: a figure in a Markdown file follows no theme.
COLOURS = {
    PAPER: "#fcfbf8", INK: "#1b1f24", MUTED: "#5b636e", LINE: "#cdd1d6", ACCENT: "#0a67a8", SECOND: "#b3470b",
    THIRD: "#8a3f8f",
}  # fmt: skip

Compute = Callable[[np.random.Generator, int], Sequence[float]]


@dataclass(frozen=True)
class Row:
    """Labels, and the shares that stand beside them, from a generator and a number of repetitions."""

    labels: tuple[str, ...]
    compute: Compute


@dataclass(frozen=True)
class Table:
    """A table between markers of the page: shares in %, or times `scale` in the columns that it names."""

    name: str
    header: tuple[str, ...]
    rows: list[Row]
    repetitions: int
    scale: dict[int, int]

    def cells(self, row: Row, repetitions: int, fresh: bool = False) -> list[float]:
        """The numbers of a row; every row has random numbers of its own, and a fresh draw others."""
        seed = [zlib.crc32("|".join((self.name, *row.labels)).encode()), int(fresh)]
        found = row.compute(np.random.default_rng(seed), repetitions)
        return [share * self.scale.get(i, 100) for i, share in enumerate(found)]

    def shown(self, value: float, column: int) -> str:
        return f"{value:.2f}" if column in self.scale else f"{value:.1f}"

    def write(self) -> str:
        lines = ["| " + " | ".join(self.header) + " |"]
        labels = len(self.rows[0].labels)
        lines.append("|" + "---|" * labels + "---:|" * (len(self.header) - labels))
        for row in self.rows:
            numbers = [self.shown(v, i) for i, v in enumerate(self.cells(row, self.repetitions))]
            lines.append("| " + " | ".join((*row.labels, *numbers)) + " |")
        return "\n".join(lines)

    def differences(self, text: str, repetitions: int, rows: slice = slice(None)) -> list[str]:
        """What is wrong with the table on the page: other labels, or numbers beyond Monte-Carlo error."""
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
        labels = len(self.rows[0].labels)
        if tuple(lines[0]) != self.header or [tuple(line[:labels]) for line in lines[2:]] != [
            r.labels for r in self.rows
        ]:
            return [f"{self.name}: header or labels differ from the script"]
        found = []
        for row, line in list(zip(self.rows, lines[2:], strict=True))[rows]:
            for i, (shown, value) in enumerate(
                zip(line[labels:], self.cells(row, repetitions, fresh=True), strict=True)
            ):
                scale = self.scale.get(i, 100)
                share = min(max(float(shown) / scale, 2 / repetitions), 1 - 2 / repetitions)
                error = math.sqrt(share * (1 - share) * (1 / repetitions + 1 / self.repetitions))
                if abs(float(shown) - value) > 4.5 * scale * error + (0.006 if i in self.scale else 0.06):
                    found.append(
                        f"{self.name}, {', '.join(row.labels)}, column {i + 1}: shown {shown}, found {value:.2f}"
                    )
        return found


def coverage() -> Table:
    def row(distribution: Distribution) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            found = []
            for seeds in SEEDS:
                values = draw(distribution, generator, repetitions, seeds)[:, 0]
                mean, half = values.mean(axis=1), half_widths(values, 0.95)
                found.append(float((np.abs(mean) <= half).mean()))
                if seeds == 12:
                    sides = [float((mean - half > 0).mean()), float((mean + half < 0).mean())]
            return found + sides

        return compute

    header = (
        "distribution of a seed's value",
        *(f"{n} seeds" for n in SEEDS),
        "12 seeds: too high",
        "12 seeds: too low",
    )
    return Table("coverage", header, [Row((d.words,), row(d)) for d in DISTRIBUTIONS.values()], 100_000, {})


def null() -> Table:
    def row(distribution: Distribution) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            every = [effect_shares(distribution, generator, repetitions, seeds) for seeds in SEEDS]
            return [s[word] for s in every for word in ("supported", "refuted")]

        return compute

    columns = (f"{n} seeds: {word}" for n in SEEDS for word in ("supported", "refuted"))
    rows = [Row((d.words,), row(d)) for d in DISTRIBUTIONS.values()]
    return Table("null", ("distribution of a seed's value", *columns), rows, 40_000, {})


def margin() -> Table:
    def row(distribution: Distribution, level: float) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            found = []
            for k in (1, 3, 4):
                one, all_ = [1.0] + [1.0 + FAR] * (k - 1), [1.0] * k
                for truths, word in ((one, "supported"), (all_, "refuted")):
                    found.append(effect_shares(distribution, generator, repetitions, 12, truths, 1.0, level)[word])
            return found

        return compute

    header = (
        "distribution of a seed's value",
        "level",
        *(f"{k}: {w}" for k in (1, 3, 4) for w in ("supported", "refuted")),
    )
    levels = ((0.95, "95 %"), (0.99, "99 %"))
    rows = [Row((d.words, words), row(d, level)) for d in DISTRIBUTIONS.values() for level, words in levels]
    return Table("margin", header, rows, 40_000, {})


WORDS = (
    "supported", "inconclusive", "refuted: smaller than claimed", "refuted: absent", "refuted: reversed",
)  # fmt: skip


def words() -> Table:
    def row(truth: float) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            found = effect_shares(DISTRIBUTIONS["normal"], generator, repetitions, 12, [truth], 2.0)
            return [found.get(word, 0.0) for word in WORDS]

        return compute

    truths = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    return Table("words", ("true effect", *WORDS), [Row((f"{t:g}",), row(t)) for t in truths], 20_000, {})


def power() -> Table:
    def row(seeds: int, k: int, level: float) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            normal, found = DISTRIBUTIONS["normal"], []
            for word, sign in (("supported", 1), ("refuted", -1)):
                for distance in distances:
                    truths = [distance] * k if sign > 0 else [-distance] + [FAR] * (k - 1)
                    found.append(effect_shares(normal, generator, repetitions, seeds, truths, 0.0, level)[word])
            return found

        return compute

    distances = (0.5, 1.0, 1.5, 2.0)
    header = ("seeds", "contrasts", "level", *(f"{w} at {d:g}" for w in ("supported", "refuted") for d in distances))
    rows = [
        Row((str(n), str(k), f"{100 * level:g} %"), row(n, k, level))
        for n in SEEDS for k in (1, 4) for level in (0.95, 0.99)
    ]  # fmt: skip
    return Table("power", header, rows, 4_000, {})


def equivalence() -> Table:
    def row(distribution: Distribution, seeds: int, k: int, bound: float) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            def share(truths: Sequence[float], word: str) -> float:
                values = draw(distribution, generator, repetitions, seeds, k) + np.asarray(truths)[None, :, None]
                return shares(equivalence_words(values, bound))[word]

            rest = [0.0] * (k - 1)
            return [
                share([0.0, *rest], "supported"),
                max(share([side * bound, *rest], "supported") for side in (1, -1)),
                max(share([side * bound] * k, "refuted") for side in (1, -1)),
                share([2 * bound, *rest], "refuted"),
            ]

        return compute

    normal = DISTRIBUTIONS["normal"]
    cases = [(normal, n, 1, bound) for n in SEEDS for bound in (0.5, 1.0, 1.5)]
    cases += [(normal, 12, 3, 1.0), (normal, 12, 4, 1.0)]
    cases += [(d, 12, 1, 1.0) for d in DISTRIBUTIONS.values() if d is not normal]
    header = (
        "distribution of a seed's value", "seeds", "contrasts", "margin", "no difference: supported",
        "at the margin: supported", "at the margin: refuted", "at twice the margin: refuted",
    )  # fmt: skip
    rows = [Row((d.words, str(n), str(k), f"{bound:g}"), row(d, n, k, bound)) for d, n, k, bound in cases]
    return Table("equivalence", header, rows, 10_000, {})


def luck() -> Table:
    def row(size: float) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            normal = DISTRIBUTIONS["normal"]
            every = [effect_shares(normal, generator, repetitions, seeds, luck=size) for seeds in SEEDS]
            return [1 - s["inconclusive"] for s in every]

        return compute

    rows = [Row((f"{size:g}",), row(size)) for size in (0.0, 0.1, 0.25, 0.5, 1.0)]
    return Table("luck", ("shared luck", *(f"{n} seeds" for n in SEEDS)), rows, 20_000, {})


def peeking() -> Table:
    def row(looks: Sequence[int]) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            values = draw(DISTRIBUTIONS["normal"], generator, repetitions, max(looks))
            verdicts = np.stack([effect_words(values[..., :seeds], 0.0) for seeds in looks])
            return [float((verdicts != "inconclusive").any(axis=0).mean())]

        return compute

    rows = [
        Row(("at 12 seeds, once",), row([12])),
        Row(("at 12 seeds, and at 24 where 12 decide nothing",), row([12, 24])),
        Row(("after every seed from 8 to 24",), row(range(8, 25))),
    ]
    return Table("peeking", ("when one looks", "decided, and wrong"), rows, 20_000, {})


def ledger() -> Table:
    def row(distribution: Distribution, truth: Compute, k: int = 1, size: float = 0.0) -> Compute:
        def compute(generator: np.random.Generator, repetitions: int) -> list[float]:
            truths = np.asarray(truth(generator, repetitions))
            values = draw(distribution, generator, repetitions, 12, k) + truths[:, None, None]
            values += size * generator.standard_normal((repetitions, 1, 1))
            found = effect_words(values, 0.0)
            supported, refuted = found == "supported", np.char.startswith(found, "refuted")
            wrong = (supported & (truths <= 0)).mean(), (refuted & (truths >= 0)).mean()
            return [float(share) for share in (*wrong, (found == "inconclusive").mean(), sum(wrong))]

        return compute

    d = DISTRIBUTIONS
    at: Compute = lambda generator, n: np.zeros(n)  # noqa: E731
    nothing: Compute = lambda generator, n: np.full(n, -0.5)  # noqa: E731
    half: Compute = lambda generator, n: generator.choice([-0.5, 1.5], n)  # noqa: E731
    spread: Compute = lambda generator, n: generator.standard_normal(n)  # noqa: E731
    rows = [
        Row(("every truth exactly at its margin", "1"), row(d["normal"], at)),
        Row(("the same, skewed", "1"), row(d["skewed"], at)),
        Row(("the same, one seed in ten diverges", "1"), row(d["diverging"], at)),
        Row(("no method does anything, margins of half a standard deviation", "1"), row(d["normal"], nothing)),
        Row(("half of the methods do nothing, half exceed the margin by 1.5", "1"), row(d["normal"], half)),
        Row(("truths spread around their margins by 1", "1"), row(d["normal"], spread)),
        Row(("the same, against four rivals", "4"), row(d["normal"], spread, k=4)),
        Row(("the same, one rival, and one seed in ten diverges", "1"), row(d["diverging"], spread)),
        Row(("the same, one rival, normal, and shared luck of 0.25", "1"), row(d["normal"], spread, size=0.25)),
    ]
    header = (
        "what is true",
        "contrasts",
        "wrongly supported",
        "wrongly refuted",
        "inconclusive",
        f"wrong lines of {LINES}",
    )
    return Table("ledger", header, rows, 40_000, {3: LINES})


def tables() -> list[Table]:
    """All tables of the page, in its order."""
    return [words(), peeking(), coverage(), null(), margin(), power(), equivalence(), luck(), ledger()]


def section(text: str, name: str) -> re.Match[str]:
    """Where a table stands on the page."""
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- end -->)", text, re.S)
    if found is None:
        raise ValueError(f"{PAGE.name} has no markers for the table {name!r}")
    return found


def draw_figure(repetitions: int = 4_000) -> None:
    """Left: how often each word falls, over the true effect. Right: how often a claim is decided, over the distance."""
    with house_style(), matplotlib.rc_context({"svg.fonttype": "path"}):
        figure, (left, right) = new_figure(9.4, 3.7, 1, 2, margins=(0.065, 0.145, 0.985, 0.85), wspace=0.16)
        _words_panel(left, repetitions)
        _power_panel(right, repetitions)
        out = io.StringIO()
        figure.savefig(out, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    FIGURE.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")


def _words_panel(axes: Axes, repetitions: int) -> None:
    truths = np.linspace(-1.5, 4.0, 111)
    bottom = np.zeros(len(truths))
    found = []
    for truth in truths:
        generator = np.random.default_rng(1)  # the same numbers at every place: smooth lines
        found.append(effect_shares(DISTRIBUTIONS["normal"], generator, repetitions, 12, [truth], 2.0))
    fills = ((SECOND, 0.95), (SECOND, 0.6), (SECOND, 0.3), (LINE, 0.5), (ACCENT, 0.85))
    names = (
        ("reversed", -1.0, 0.5), ("absent", 0.0, 0.5), ("smaller\nthan\nclaimed", 0.97, 0.62), ("inconclusive", 2.02, 0.42),
        ("supported", 3.3, 0.5),
    )  # fmt: skip
    for word, (colour, alpha), (name, x, y) in zip((*WORDS[:1:-1], *WORDS[1::-1]), fills, names, strict=True):
        share = np.array([shares_.get(word, 0.0) for shares_ in found])
        axes.fill_between(truths, bottom, bottom + share, color=colour, alpha=alpha, linewidth=0)
        bottom += share
        light = name in ("reversed", "supported")
        axes.text(x, y, name, ha="center", va="center", color=PAPER if light else INK)
    axes.axvline(2.0, ymax=0.38, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.axvline(2.0, ymin=0.46, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.text(2.0, 1.015, "margin", ha="center", va="bottom", color=MUTED)
    axes.set(xlim=(-1.5, 4.0), ylim=(0, 1), xlabel="true effect, in standard deviations over seeds")
    axes.set_title("How often each word falls: 12 seeds, margin 2", loc="left", pad=18)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _power_panel(axes: Axes, repetitions: int) -> None:
    distances = np.linspace(-2.5, 2.5, 81)
    styles = {8: (MUTED, (0, (1.2, 1.4))), 12: (INK, "-"), 24: (THIRD, (0, (5, 2)))}
    for seeds, (colour, dashes) in styles.items():
        found = [
            effect_shares(DISTRIBUTIONS["normal"], np.random.default_rng(1), repetitions, seeds, [distance])
            for distance in distances
        ]
        axes.plot(distances, [s["supported"] for s in found], color=colour, linestyle=dashes, label=f"{seeds} seeds")
        axes.plot(distances, [s["refuted"] for s in found], color=colour, linestyle=dashes)
    axes.text(-2.3, 1.02, "refuted", ha="left", va="bottom", color=SECOND)
    axes.text(2.3, 1.02, "supported", ha="right", va="bottom", color=ACCENT)
    axes.axvline(0.0, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.text(0.0, 1.015, "margin", ha="center", va="bottom", color=MUTED)
    axes.set(xlim=(-2.5, 2.5), ylim=(0, 1.0), xlabel="true effect minus margin, in standard deviations over seeds")
    axes.set_title("How often a claim is decided: one contrast, 95 %", loc="left", pad=18)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.12), frameon=False)


def main() -> int:
    text = PAGE.read_text("utf-8")
    if "--check" in sys.argv:
        wrong = [w for t in tables() for w in t.differences(section(text, t.name)[0], max(400, t.repetitions // 20))]
        print("\n".join(wrong) or "docs/verdicts.md agrees with the simulation", file=sys.stderr)
        return 1 if wrong else 0
    for table in tables():
        found = table.write()
        print(f"{table.name}\n{found}\n", flush=True)
        place = section(text, table.name)
        text = text[: place.start()] + found + text[place.end() :]
    PAGE.write_text(text, "utf-8")
    draw_figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
