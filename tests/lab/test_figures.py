"""Figures: deterministic inline SVG, in the colours of the page, with nothing that a network would be asked for."""

import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from wellposed.lab import figures
from wellposed.lab.drawing import house_style, new_figure
from wellposed.lab.figures import Dot, Point, curve_limits, curve_panel, curve_places, dot_plot, scatter
from wellposed.lab.labels import place_labels

ROWS = [
    Dot("better <arm>", 94.0, 93.5, 94.5, [93.8, 94.2], (3.0, 2.0, 4.0), "better"),
    Dot("reference", 91.0, 90.5, 91.5, [90.8, 91.2], None, "reference"),
    Dot("worse & wider", 88.0, 87.0, 89.0, [87.5, 88.5], (-3.0, -4.0, -2.0), "worse"),
]
CURVES = {"train": [[50.0, 60.0, 70.0], [52.0, 61.0, 69.0]], "test": [[40.0, 50.0, 60.0], [41.0, 52.0, 61.0]]}


def drawings():
    return [
        dot_plot(ROWS, 91.0, ("accuracy", "difference"), "Scores"),
        dot_plot(ROWS, 91.0, ("accuracy", "difference"), "Scores", narrow=True),
        scatter([Point("a", 1.0, (0.0, 0.0, 0.0), "reference"), Point("b", 2.0, (1.0, 0.5, 1.5), "better")], "x", "y", "Cost"),
        curve_panel(CURVES, (0, 100), "Curves", kept=[2.0, 3.0], epochs=3),
    ]  # fmt: skip


def test_figures_are_the_same_bytes_twice():
    assert drawings() == drawings()


@pytest.mark.parametrize("svg", drawings())
def test_figures_follow_the_theme_and_need_no_network(svg):
    assert svg.startswith('<svg role="img" aria-label=')
    assert "http" not in svg and "<image" not in svg
    assert not re.search(r"#0\d0\d0\d", svg), "a stand-in colour was left"
    assert not re.search(r"(?:fill|stroke): ?#(?!var)[0-9a-f]{6}", svg), "a fixed colour was left"
    assert "var(--ink)" in svg and not re.search(r'<svg[^>]* (width|height)="', svg)


def test_names_are_escaped_and_words_stay_words():
    svg = dot_plot(ROWS, 91.0, ("accuracy", "difference"), 'Scores of "a" & <b>')
    assert 'aria-label="Scores of &quot;a&quot; &amp; &lt;b>"' in svg
    assert "better &lt;arm&gt;" in svg and "worse &amp; wider" in svg


def test_ids_of_two_figures_do_not_meet():
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in drawings()]
    for i, own in enumerate(ids):
        assert own
        assert all(own.isdisjoint(other) for other in ids[i + 1 :])


def test_user_settings_of_matplotlib_change_nothing_and_are_left_alone():
    before = drawings()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert drawings() == before
        assert mpl.rcParams["font.size"] == 30


def test_an_arm_that_fell_far_is_a_number_at_the_edge_and_does_not_squeeze_the_others():
    fallen = Dot("fallen", 10.0, 9.0, 11.0, [10.0, 10.0], (-81.0, -82.0, -80.0), "worse")
    assert "← 10.0" in dot_plot([*ROWS, *ROWS, fallen], 91.0, ("accuracy", "difference"), "Scores")
    assert "←" not in dot_plot(ROWS, 91.0, ("accuracy", "difference"), "Scores")


def test_equal_scores_can_be_drawn():
    flat = [Dot(str(i), 50.0, 50.0, 50.0, [50.0, 50.0], (0.0, 0.0, 0.0)) for i in range(3)]
    assert "nan" not in dot_plot(flat, 50.0, ("accuracy", "difference"), "Scores").lower()
    assert "nan" not in scatter([Point("a", 1.0, (0.0, 0.0, 0.0))], "x", "y", "Cost").lower()


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_a_cluster_neither_overlap_nor_leave_the_axes(seed):
    random = np.random.default_rng(seed)
    points = [(f"method number {i}", random.normal(1, 0.05), random.normal(0, 1)) for i in range(8)]
    with house_style():
        figure, (axes,) = new_figure(4.5, 3.9, 1, 1)
        axes.set(xlim=(0.5, 1.5), ylim=(-3, 3))
        place_labels(figure, axes, points)
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [Bbox(text.get_window_extent(renderer).get_points()) for text in axes.texts]
        assert len(boxes) == len(points)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        inside = axes.get_window_extent().padded(1)
        assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)


def test_an_empty_label_is_not_drawn():
    with house_style():
        figure, (axes,) = new_figure(4.5, 3.9, 1, 1)
        place_labels(figure, axes, [("", 0.5, 0.5), ("b", 0.2, 0.2)])
        assert [text.get_text() for text in axes.texts] == ["b"]


def test_seeds_of_different_lengths_are_averaged_as_far_as_half_of_them_went():
    mean, low, high = figures._over_seeds([[1.0, 2.0, 3.0], [3.0, 4.0], [5.0, 6.0]])
    assert mean.tolist() == [3.0, 4.0] and low.tolist() == [1.0, 2.0] and high.tolist() == [5.0, 6.0]


def test_places_are_the_recorded_epochs_or_count_from_one():
    assert curve_places(CURVES).tolist() == [1.0, 2.0, 3.0]
    assert curve_places({**CURVES, "epoch": [[2.0, 4.0], [2.0, 4.0, 6.0]]}).tolist() == [2.0, 4.0, 6.0]


def test_limits_of_curves_leave_room_and_ignore_the_places():
    low, high = curve_limits([{**CURVES, "epoch": [[1000.0, 2000.0, 3000.0]]}])
    assert 30 < low < 42 and 69.5 < high < 80
