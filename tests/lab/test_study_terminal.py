"""What a study prints: within the width, verdicts in whole words, no colour codes in a pipe."""

import io
from pathlib import Path

import pytest
from invented_study import invented, invented_card
from rich.cells import cell_len
from rich.console import Console

from wellposed.lab.study_run import StudyOptions
from wellposed.lab.study_terminal import arms_table, claims_table, print_study, print_study_header


def printed(record, width=80, card=None, **kwargs):
    out = io.StringIO()
    print_study(record, card or invented_card(), Console(file=out, width=width, **kwargs), "report/invented")
    return out.getvalue()


def table(function, record, width):
    out = io.StringIO()
    Console(file=out, width=width).print(function(record, invented_card(), width))
    return out.getvalue().splitlines()


def header(scale="laptop", width=80, card=None, **options):
    out = io.StringIO()
    options = StudyOptions(scale, Path("report"), **{"workers": 2, **options})
    print_study_header(card or invented_card(), options, Console(file=out, width=width))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
@pytest.mark.parametrize(
    "case", [{}, {"failed": "robust", "diverged": "plain"}, {"scale": "smoke"}, {"scale": "paper"}]
)
def test_every_line_keeps_within_the_width(width, case):
    lines = [
        line for line in printed(invented(**case), width).splitlines() if not line.startswith(("report", "numbers"))
    ]
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [60, 72, 80, 100])
def test_verdicts_are_whole_words_at_any_width(width):
    lines = table(claims_table, invented(), width)
    text = " ".join(" ".join(lines).split())
    for words in ("▲ supported (laptop)", "▼ refuted (laptop)", "✓ holds", "✗ fails", "– not testable here"):
        assert any(words in line for line in lines), words
    for words in (
        "smaller than claimed; decided at 100 examples", "weakest against a robust loss whose long name does not fit on a line",
        "n = 3: error 2.0e-03, tolerance 1e-12", "would be tested by: wellposed run invented --scale paper",
    ):  # fmt: skip
        assert words in text, words


def test_eighty_columns_show_id_verdict_interval_margin_and_the_number_of_seeds():
    lines = table(claims_table, invented(), 80)
    assert lines[0].split() == ["claim", "verdict", "estimate,", "12", "seeds", "margin"]
    row = next(line for line in lines if line.startswith("beats-rivals"))
    assert row.split()[:4] == ["beats-rivals", "▲", "supported", "(laptop)"] and row.endswith("+0.5")
    assert next(line for line in lines if line.startswith("keeps-what-it-learned")).endswith(" -1")
    assert next(line for line in lines if line.startswith("as-fast")).endswith(" ±2")
    assert "… " not in " ".join(lines)


def test_units_go_first_then_margins_then_ids_are_shortened():
    wide, middle, narrow = (" ".join(table(claims_table, invented(), width)) for width in (100, 80, 60))
    assert "points [" in wide and "points [" not in middle and "margin" in middle and "% [" in middle
    assert "margin" not in narrow and "…" in narrow


def test_the_verdict_comes_first_then_claims_arms_and_paths():
    text = printed(invented())
    flat = " ".join(text.split())
    places = [flat.index(words) for words in (
        "The claim: Steady targets end above every rival.", "Supported at laptop scale: +1.8 points [+1.3, +2.3]",
        "beats-rivals", "─── 40 % noise", "─── 80 % noise", "report report/invented/index.html",
    )]  # fmt: skip
    assert places == sorted(places)


def test_arms_stand_best_first_with_interval_role_and_time():
    lines = table(arms_table, invented(diverged="plain"), 80)
    names = ["steady targets ", "a robust loss", "plain training, early", "plain training, untuned", "plain training  "]
    places = [next(i for i, line in enumerate(lines) if line.startswith(name)) for name in names]
    assert places == sorted(places)
    assert lines[places[0]].split()[2:] == ["method", "87.3", "±", "0.4", "2.3", "s"]
    assert lines[places[-1] + 1] == "    2 of 12 seeds diverged and count as the worst value"
    assert any(line.startswith("─── measured otherwise") for line in lines)


def test_lower_is_better_where_the_worst_value_is_high():
    record = invented()
    record["headline"] = ["errors", "test errors"]
    lines = table(arms_table, record, 80)
    assert next(line for line in lines[2:]).startswith("steady targets ")


def test_smoke_judges_nothing():
    text = printed(invented("smoke"))
    assert "Not judged at smoke scale." in text and "note: A smoke run" in text
    assert not any(word in text for word in ("supported", "refuted", "±0", " ± "))


def test_failures_are_told_before_the_tables():
    text = " ".join(printed(invented(failed="robust")).split())
    assert text.index("1 of 96 evaluation trials failed") < text.index("≈ inconclusive")
    assert "the trial of arm 'robust', seed 1001 failed" in text and "1 of 12 seeds failed" in text


def test_paper_scale_prints_published_numbers_beside_ours():
    text = printed(invented("paper"))
    row = next(line for line in text.splitlines() if line.startswith("steady targets"))
    assert row.split()[:3] == ["steady", "targets", "76.4"] and "±" in row and "verdict at" not in text


def test_a_pipe_gets_no_colour_codes_and_a_terminal_does():
    assert "\x1b" not in printed(invented())
    assert "\x1b[1;32m▲ supported" in printed(invented(), force_terminal=True, color_system="standard")


def test_names_with_brackets_are_no_markup():
    record = invented()
    record["arms"]["plain"]["label"] = "plain [bold]training[/bold]"
    assert "plain [bold]training[/bold]" in printed(record)


def test_header_says_what_will_be_done_and_what_it_takes():
    assert header()[1:] == [
        "Steady targets (ST) · laptop scale",
        "digits, 1000 train, 597 test; 40 or 80 % wrong labels; perceptron 64-512-512-10",
        "8 arms · 4 tuned: 20 configurations × 3 seeds each, 240 trials",
        "12 evaluation seeds · 2 workers · takes about 20 minutes on two cores",
    ]


def test_header_of_the_other_scales():
    smoke = header("smoke", engine="serial")
    assert smoke[-2:] == ["8 arms · 4 tuned: 1 configuration × 1 seed each, 4 trials",
                          "2 evaluation seeds · one process · takes seconds"]  # fmt: skip
    paper = " ".join(header("paper"))
    assert "needs ImageNet, 1,000 classes" in paper and "2 arms as published, untuned" in paper
    assert "3 evaluation seeds · 2 workers · takes 8 GPUs for two days" in paper


@pytest.mark.parametrize(("options", "noted"), [({}, False), ({"seeds": 12}, False), ({"seeds": 9}, True), ({"overrides": {"epochs": 3}}, True)])  # fmt: skip
def test_header_warns_of_what_is_not_as_registered(options, noted):
    assert ("will not enter the ledger" in " ".join(" ".join(header(**options)).split())) == noted
