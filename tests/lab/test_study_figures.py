"""Rows of estimates: deterministic, in the page's colours, every number drawn or pointed at."""

import re

import pytest

from wellposed.lab.study_figures import MARKS, Claimed, EstimateRow, estimate_plot

ROWS = [
    EstimateRow("over <plain> training", [1.0, 2.0, 3.0], (2.0, 1.0, 3.0), "+2.0 [+1.0, +3.0]", "above"),
    EstimateRow("a rival whose name is so long that it takes two lines", [0.1, 0.5], (0.3, -0.2, 0.8), "+0.3", "open"),
    EstimateRow("worse", [-1.0, -1.2], (-1.1, -1.3, -0.9), "−1.1", "below", published=-0.5),
]


def drawn(rows=ROWS, **kwargs):
    return estimate_plot(rows, "points", "A claim", **{"claimed": Claimed(0.5, None, "margin +0.5"), **kwargs})


def dots(svg):
    """How many seeds were drawn."""
    return svg.count("opacity: 0.25")


@pytest.mark.parametrize("narrow", [False, True])
def test_same_bytes_twice_in_the_page_s_colours(narrow):
    svg = drawn(narrow=narrow)
    assert svg == drawn(narrow=narrow) and svg.startswith('<svg role="img" aria-label="A claim"')
    assert not re.search(r"#0\d0\d0\d", svg) and "var(--accent)" in svg and "http" not in svg
    assert "over &lt;plain&gt; training" in svg and "margin +0.5" in svg


@pytest.mark.parametrize("narrow", [False, True])
def test_long_labels_are_broken_between_words_and_lose_none(narrow):
    words = re.findall(r">([^<>]+)</text>", drawn(narrow=narrow))
    assert "a rival whose name is so long that it takes two lines" in " ".join(words)


def test_what_lies_far_off_the_margin_is_pointed_at_and_does_not_squeeze_the_decision():
    far = EstimateRow("far", [900.0, 901.0], (900.0, 899.0, 901.0), "+900")
    assert "→" in drawn([*ROWS, far]) and "→" not in drawn()
    assert "→" not in drawn([far]), "alone it is no outlier"


def test_seeds_without_an_interval_are_all_drawn():
    values = [0.001, 5.0, 40.0]
    one, three = (dots(drawn([EstimateRow("a", found, None, "not judged")])) for found in (values[:1], values))
    assert three == 3 * one > 0


def test_axis_of_log_ratios_says_round_per_cents_or_factors():
    row = EstimateRow("a", [0.1, 0.4], (0.25, 0.1, 0.4), "")
    words = re.findall(r">([^<>]+)</text>", drawn([row], form="percent"))
    assert {"0", "+20", "+40"} <= set(words)
    large = EstimateRow("a", [1.0, 4.0], (2.5, 1.0, 4.0), "")
    assert "10×" in re.findall(r">([^<>]+)</text>", drawn([large], form="factor"))


def test_rows_that_are_all_equal_can_be_drawn():
    assert "nan" not in estimate_plot([EstimateRow("a", [0.0, 0.0], (0.0, 0.0, 0.0))], "x", "Flat").lower()


@pytest.mark.parametrize("kind", MARKS)
def test_every_kind_has_a_mark(kind):
    assert "<svg" in drawn([EstimateRow("a", [1.0], (1.0, 0.5, 1.5), "", kind)])


def test_plots_that_are_aligned_have_their_axes_at_the_same_place():
    short = [EstimateRow("a", [1.0], (1.0, 0.0, 2.0), "1")]
    long = [EstimateRow("a much longer label", [1.0], (1.0, 0.0, 2.0), "1.00 ± 1.00")]

    def axes(rows, align):
        clip = re.search(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', estimate_plot(rows, "x", "t", align=align))
        return clip.groups()

    assert axes(short, short) != axes(long, long)
    assert axes(short, short + long) == axes(long, short + long) == axes(long, long)


@pytest.mark.parametrize("kind", MARKS)
def test_labels_fit_left_of_the_axes_in_every_weight(kind):
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    label = "over LoRA, merged after each stage"  # one line of nearly the longest
    svg = drawn([EstimateRow(label, [1.0], (1.0, 0.5, 1.5), "", kind)])
    left = float(re.search(r'<rect x="([\d.]+)"', svg)[1])
    weight = "bold" if "font-weight: 700" in svg else "normal"
    assert weight == ("bold" if kind in ("above", "below", "method") else "normal")
    font = FontProperties(family="DejaVu Sans", weight=weight)
    assert TextPath((0, 0), label, size=9.5, prop=font).get_extents().width + 8 <= left
