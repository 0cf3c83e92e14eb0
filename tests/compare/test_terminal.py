"""What a comparison prints: within the width, without colour codes in a pipe, nothing left out that matters."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from invented_comparison import invented
from rich.cells import cell_len
from rich.console import Console

from wellposed.compare.terminal import metric_label, print_header, print_result, ranked_table, sections


def printed(result, width=100, **kwargs):
    out = io.StringIO()
    console = Console(file=out, width=width, **kwargs)
    console.print(ranked_table(result.ranking(), metric_label(result), width))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
@pytest.mark.parametrize("metric", ["accuracy", "balanced accuracy"])
def test_table_keeps_within_the_width_and_wraps_nothing(width, metric):
    result = invented(failing="mixup")
    result.metric = metric
    lines = printed(result, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    rows = [line for line in lines if line.strip()[:1].isdigit() and "failed" not in line]
    assert len(rows) == len(result.arms)


def test_all_columns_fit_into_eighty():
    assert "memory" in printed(invented(), 80) and "early-learning plus (ELR+)" in printed(invented(), 80)


def test_narrow_terminals_lose_memory_first_then_time():
    assert "memory" not in printed(invented(), 74) and "time" in printed(invented(), 74)
    assert "time" not in printed(invented(), 58) and "…" in printed(invented(), 58)


def test_memory_has_no_column_where_it_was_not_measured():
    assert "memory" not in printed(invented(memory=False))


def test_lines_say_what_may_be_claimed_of_the_arms_below_them():
    text = printed(invented())
    better, noise = text.index("early-learning (ELR)"), text.index("─── within noise of early stopping")
    worse = text.index("─── worse than early stopping")
    assert better < noise < text.index("early stopping              ") < worse < text.index("plain training")
    assert "better than" not in text


def test_groups_that_interleave_are_named_again():
    titles = [title for title, _ in sections(invented(failing="mixup").ranking())]
    assert titles[0] == "" and titles.count("within noise of early stopping") == 2


def test_nothing_helps_begins_with_the_line():
    assert printed(invented(noise=0, effect=0.0)).splitlines()[1].startswith("  ─── within noise of early stopping ─")


def test_a_pipe_gets_no_colour_codes_and_a_terminal_does():
    assert "\x1b" not in printed(invented())
    assert "\x1b" in printed(invented(), force_terminal=True, color_system="truecolor")


def test_failed_seeds_are_named():
    assert "3 of 12 seeds failed and count as the worst score" in printed(invented(failing="mixup"))


def test_regression_scores_are_r_squared_in_points():
    assert "R² × 100" in printed(invented(noise=0, regression=True)).splitlines()[0]


def test_result_prints_answer_snippet_and_paths(tmp_path):
    out = io.StringIO()
    result = invented()
    result.notes = ["[of the task]", "time ran out [seeds]"]
    finished = SimpleNamespace(task=SimpleNamespace(notes=["[of the task]"]), options=SimpleNamespace(output=tmp_path))
    print_result(result, finished, Console(file=out, width=80))
    text = out.getvalue()
    assert " ".join(result.ranking().sentence.split()) in " ".join(text.split())
    for line in result.usage.splitlines():
        assert f"    {line}" in text, "the snippet must be there to copy, unbroken"
    assert str(tmp_path / "index.html") in text and str(tmp_path / "apply.py") in text
    assert "note: time ran out [seeds]" in text and "[of the task]" not in text


def test_suspected_labels_are_counted():
    out = io.StringIO()
    result = invented(noise=0)
    finished = SimpleNamespace(task=SimpleNamespace(notes=[]), options=SimpleNamespace(output=Path("report")))
    print_result(result, finished, Console(file=out, width=100))
    assert "236 training labels look wrong to early-learning (ELR): label_issues.csv" in out.getvalue()


def test_header_says_what_will_be_done():
    out = io.StringIO()
    task = SimpleNamespace(
        name="customers[1]",
        notes=["2 rows left out"],
        describe=lambda: "8,214 rows",
        describe_split=lambda: "split once",
    )
    options = SimpleNamespace(rounds=8, seeds=12, workers=1)
    print_header(task, "MLP 31-256-2", 13, options, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert lines[1:3] == ["customers[1] · 8,214 rows · model: MLP 31-256-2", "split once"]
    assert lines[3].startswith("13 arms · 8 tuning trials each") and lines[3].endswith("1 worker")
    assert lines[4] == "note: 2 rows left out"
