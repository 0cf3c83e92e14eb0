"""The report: complete, self-contained, free of NaN, and the same after a round trip through results.json."""

import errno
import json
import os
import re
from dataclasses import asdict

import pytest
from invented_comparison import invented
from page_checker import Checker

from wellposed.compare.report import report_page, write_report
from wellposed.compare.result import load_result
from wellposed.lab.files import WriteError

CASES = {
    "noise": {},
    "nothing helps": {"noise": 0.0, "effect": 0.0, "n_arms": 6},
    "regression": {"noise": 0.0, "regression": True, "n_arms": 6},
    "a failed arm": {"failing": "mixup", "n_arms": 7},
    "three seeds": {"n_seeds": 3, "n_arms": 4},
    "two arms": {"n_arms": 2, "memory": False},
}


@pytest.fixture(scope="module")
def pages():
    results = {name: invented(**case) for name, case in CASES.items()}
    return {name: (result, report_page(result)) for name, result in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_page_needs_no_network(pages, name):
    page = pages[name][1]
    found = Checker(page)
    assert found.fetched == []
    assert set(found.links) <= {"apply.py", "results.csv", "results.json", "label_issues.csv"}
    assert not re.search(r"https?:|@import|url\((?!#)", page)


@pytest.mark.parametrize("name", CASES)
def test_page_is_well_formed_and_ids_are_unique(pages, name):
    found = Checker(pages[name][1])
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))


@pytest.mark.parametrize("name", CASES)
def test_page_shows_every_arm_and_no_nan(pages, name):
    result, page = pages[name]
    text = " ".join(Checker(page).words)
    for arm in result.arms:
        assert text.count(arm.label) >= 4, "figures, ranking, costs, tuning"
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", text, re.IGNORECASE)


def test_page_answers_first_and_explains(pages):
    result, page = pages["noise"]
    answer, _, more = result.ranking().sentence.partition(". ")
    assert page.index(f'<p class="answer">{answer}.</p>') < page.index(f'<p class="more">{more}</p>')
    assert page.index(answer) < page.index("<h2>")
    for words in ("all 11 hold together at 95 %", "the same 359 test rows", "about ±3.0 points", "memorized"):
        assert words in page
    assert result.usage.splitlines()[1] in page and "finds 83 % of the flipped training labels" in page


def test_page_without_noise_does_not_speak_of_flips(pages):
    assert "flipped" not in pages["regression"][1] and "memorized" not in pages["regression"][1]
    assert "236 training labels look wrong" in pages["nothing helps"][1]


def test_page_names_failures_and_shortage(pages):
    assert "3 of 12 seeds failed" in pages["a failed arm"][1]
    assert "3 seeds cannot show a difference between 4 arms; 7 or more can" in pages["three seeds"][1]


def test_every_figure_has_a_name_and_its_numbers_in_a_table(pages):
    page = pages["noise"][1]
    drawings = re.findall(r"<svg[^>]*viewBox=\"0 0 \d{2,}[^>]*>", page)
    assert len(drawings) > 12
    assert all('aria-label="' in tag and 'role="img"' in tag for tag in drawings if "aria-hidden" not in tag)
    assert page.count("<table") >= 5 and page.count('scope="row"') > 50


def test_page_has_both_themes_and_a_phone_s_figures(pages):
    page = pages["noise"][1]
    assert "prefers-color-scheme: dark" in page and 'data-theme="dark"' in page and 'class="theme"' in page
    assert 'class="wide"' in page and 'class="narrow"' in page and "width=device-width" in page


def test_names_from_the_user_s_data_are_escaped():
    result = invented(n_arms=3)
    result.name = "<script>alert(1)</script>"
    result.command = "wellposed compare '<b>.csv'"
    page = report_page(result)
    assert "<script>alert" not in page and "&lt;b&gt;.csv" in page


def test_page_is_the_same_twice_and_after_a_round_trip(tmp_path):
    result = invented(n_arms=5)
    (tmp_path / "results.json").write_text(json.dumps(asdict(result), allow_nan=False))
    again = load_result(tmp_path)
    assert again == result
    page = write_report(again, tmp_path)
    assert page == tmp_path / "index.html" and page.read_text("utf-8") == report_page(result)


def test_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    page.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"index\.html: No space left on device; its old content is intact"):
        write_report(invented(n_arms=3, n_seeds=3), tmp_path)
    assert page.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_tuning_that_failed_throughout_and_missing_curves_do_not_break_the_page():
    result = invented(n_arms=4)
    for arm in result.arms:
        arm.tuning = [{"settings": {}, "score": None}]
        arm.curves, arm.stopped, arm.details = {}, [], {}
    page = report_page(result)
    assert "Training curves" not in page and "failed" in page
