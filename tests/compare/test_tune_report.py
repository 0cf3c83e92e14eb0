"""What `wellposed tune` says of its numbers: no claim without evidence, in words, tables and on the page."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from page_checker import Checker
from rich.cells import cell_len
from rich.console import Console

from wellposed.compare.tune_again import load_tuning
from wellposed.compare.tune_answer import answer
from wellposed.compare.tune_record import write_tuning
from wellposed.compare.tune_report import tune_page
from wellposed.compare.tune_result import TuneArm, TuneResult
from wellposed.compare.tune_terminal import contrast_table, print_tuning, value_rows
from wellposed.compare.tune_words import ratio
from wellposed.lab.figures import line_plot
from wellposed.lab.statistics import paired_interval


def arm(name, label, gain, fall, n, random, trainings=1, seconds=3.0, failures=()):
    scores = (96 + gain + random.normal(0, 0.1, n)).tolist()
    losses = (0.12 - fall + random.normal(0, 0.001, n)).tolist()
    place = "training" if trainings > 1 else "epoch"
    curve = [float(i) for i in range(1, 9)]
    curves = {
        place: [curve] * n,
        "validation loss": [[0.3 / i for i in curve]] * n,
        "dropout": [[0.05 * i for i in curve]] * n,
        "weight decay a": [[10.0**-i for i in curve]] * n,
        "weight decay b": [[10.0**-5] * 8] * n,
    }
    values = {"dropout": [0.1 + 0.01 * i for i in range(n)], "weight decay a": [1e-4] * n, "weight decay b": [1e-5] * n}
    for seed in failures:
        scores[seed - 1000], losses[seed - 1000] = 10.0, 2.3
    return TuneArm(
        name, label, scores, losses, [0.05] * n, [None if 1000 + i in failures else seconds for i in range(n)], trainings,
        [8.0] * n, values, curves, list(failures), "DivergenceError: nan" if failures else None,
    )  # fmt: skip


def invented(gain=0.0, fall=0.0, n=6, kept=(0.0, 0.0), search=False, failures=(), kind="classification"):
    random = np.random.default_rng(0)
    arms = [arm("untuned", "initial values", 0.0, 0.0, n, random)]
    method = ("tpe", "TPE", 8) if search else ("stn", "STN", 1)
    arms.append(arm(method[0], method[1], gain, fall, n, random, method[2], 6.6, failures))
    if not search:
        arms.append(arm("applied", "its values, fixed", kept[0], kept[1], n, random))
    strengths = [
        {"label": "dropout", "labels": ["dropout"], "log": False, "left_out": False},
        {"label": "weight decay", "labels": ["weight decay a", "weight decay b"], "log": True, "left_out": False},
    ]
    return TuneResult(
        "digits", "1,797 rows, images 8x8, 10 classes", "split once: 1,079 training / 359 validation / 359 test",
        "MLP 64-256-256-10", "R²" if kind == "regression" else "accuracy", kind, 359, method[0], f"{method[1]}: how it learns", arms,
        list(range(1000, 1000 + n)), 59, strengths, 1000, "method = Dropout(0.1)",
        "" if search else 'Path("schedule.json")', "" if search else "tuner = partial(SelfTuner)",
        "wellposed tune digits", {"cores": 2, "memory_gib": 8.0, "platform": "Linux x86_64", "python": "3.11.9",
        "torch": "2.6.0", "numpy": "2.1.0", "wellposed": "0.1.0"}, "0123456789abcdef", None, 61.0, ["seen", "a note"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gain": 1.0, "fall": 0.02, "kept": (0.9, 0.02)}, ["STN helps: +", "points of accuracy over the initial values (95 %",
         "in one training and 2.2 times the wall time", "Log loss falls from 0.1", "fixed from the start of a plain training, help too"]),
        ({"gain": 1.0, "fall": 0.02}, ["STN helps: +", "gain nothing beyond noise: accuracy"]),
        ({"gain": 1.0, "fall": 0.02, "kept": (-1.0, -0.1)}, ["STN helps: +", "do not help: accuracy -"]),
        ({"fall": 0.02}, ["STN helps a little: log loss falls from", "Accuracy does not change beyond noise"]),
        ({"gain": -1.0}, ["STN makes it worse: -", "Keep the initial values."]),
        ({"fall": -0.02}, ["STN makes it worse: log loss rises from", "Keep the initial values."]),
        ({}, ["Nothing is gained here beyond noise: accuracy", "Keep the initial values."]),
        ({"gain": 1.0, "n": 5}, ["5 seeds cannot show a difference; 6 or more can", "Until then, keep the initial values."]),
        ({"gain": 1.0, "search": True}, ["TPE helps: +", "in 8 trainings and 2.2 times the wall time"]),
        ({"gain": 1.0, "kind": "regression"}, ["points over the initial values"]),
    ],
)  # fmt: skip
def test_the_sentence_claims_what_both_tests_agree_on_and_no_more(options, words):
    text = answer(invented(**options)).sentence
    for part in words:
        assert part in text


def test_the_contrasts_are_paired_by_seed():
    result = invented(gain=0.3, fall=0.01)
    found = answer(result)
    expected = paired_interval(result.tuned.scores, result.untuned.scores)
    assert (found.score.difference, found.score.verdict) == (expected, 1)
    assert found.loss.difference.estimate == pytest.approx(
        np.mean(result.tuned.losses) - np.mean(result.untuned.losses)
    )
    assert found.helps
    assert not found.values_help
    assert answer(invented(gain=1.0, kept=(1.0, 0.0))).values_help
    assert not answer(invented(gain=-1.0, fall=0.05)).helps


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("options", [{"gain": 1.0}, {"search": True}, {"failures": (1001,)}])
def test_the_table_fits_into_a_terminal(width, options):
    result = invented(**options)
    out = io.StringIO()
    Console(file=out, width=width).print(contrast_table(result, answer(result)))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "…" not in out.getvalue()
    assert len(lines) == 1 + 3 * (1 + len(result.arms))


def printed(result):
    out = io.StringIO()
    print_tuning(result, answer(result), ["seen"], Path("folder"), Console(file=out, width=100))
    return out.getvalue()


def test_the_lines_to_use_are_those_that_were_shown_to_help():
    assert "method = Dropout(0.1)" in printed(invented(gain=1.0, kept=(1.0, 0.0)))
    alone = printed(invented(gain=1.0))
    assert "the values alone do not carry the gain, so learn in your own training" in alone
    assert "tuner = partial(SelfTuner)" in alone
    assert "method = Dropout(0.1)" not in alone
    nothing = printed(invented())
    assert "note: a note" in nothing
    assert "note: seen" not in nothing  # it stood above
    assert "The lines that apply the learned values anyway are in the report." in nothing
    assert "method = Dropout(0.1)" not in nothing
    assert "method = Dropout(0.1)" in printed(invented(gain=1.0, search=True))


@pytest.mark.parametrize(
    ("single", "words", "use"),
    [
        (0.0, "A penalty for each feature is better than one learned for all: accuracy +", "method = Dropout(0.1)"),
        (1.0, "Against one learned penalty for all features it gains nothing beyond noise", "method = Dropout(0.1)"),
        (2.0, "But one learned penalty for all features does better", "tuner = partial(SelfTuner)"),
    ],
)
def test_one_penalty_for_each_feature_must_beat_one_for_all(single, words, use):
    result = invented(gain=1.0, kept=(single, 0.0))
    result.arms[2].name, result.arms[2].label = "single", "one penalty for all"
    found = answer(result)
    assert words in found.sentence
    assert found.helps == (single < 2)
    assert use in printed(result)
    assert words in Checker(tune_page(result)).text
    assert ratio(2.24) == "2.2"


def test_values_show_where_they_began_and_their_range():
    result = invented()
    result.untuned.values = {"dropout": [0.05] * 6}
    rows = {row[0]: row[1:] for row in value_rows(result)}
    assert rows["dropout"] == ["0.05", "0.1", "0.1 to 0.15"]
    assert rows["weight decay a"][0] == "–"
    result.strengths[0]["left_out"] = True
    assert value_rows(result)[0][3] == "fixed"


@pytest.mark.parametrize(
    "options", [{"gain": 1.0, "kept": (1.0, 0.0)}, {"search": True}, {"failures": (1001,)}, {"n": 2}]
)
def test_the_page_needs_no_network_and_says_what_the_terminal_says(options):
    result = invented(**options)
    page = tune_page(result)
    checker = Checker(page)
    assert checker.fetched == [] and checker.open == []
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert len(checker.ids) == len(set(checker.ids))
    plain = checker.text.replace("−", "-")
    assert answer(result).sentence.split(". ")[0] in plain
    assert "a note" in plain
    drawn = ("over dropout", "over weight decay a") if options.get("search") else ("dropout by", "weight decay by")
    for figure in ("validation log loss", *drawn):
        assert figure.lower() in page.lower()
    assert ("schedule.json" in page) == (not options.get("search"))


def test_what_is_written_is_read_back(tmp_path):
    result = invented(gain=1.0)
    write_tuning(result, '{"steps": []}', tmp_path)
    assert load_tuning(tmp_path) == result
    assert (tmp_path / "schedule.json").read_text() == '{"steps": []}'
    write_tuning(invented(search=True), None, tmp_path)
    assert not (tmp_path / "schedule.json").exists()


@pytest.mark.parametrize(("content", "message"), [("{}", "no result of wellposed tune"), ("x", "no readable result")])
def test_another_file_is_refused(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tuning(tmp_path)


def test_a_strength_over_decades_is_drawn_on_a_logarithmic_axis():
    lines = {"a": ([1, 2, 3], [[1e-5, 1e-3, 1e-1]])}
    straight, log = (line_plot(lines, "x", "y", "t", log_y=log) for log in (False, True))
    assert "−4" in log or "-4" in log  # a power of ten among the ticks
    assert straight != log
