"""A study's page: every claim and arm, nothing from a network, nothing judged that was not, the same twice."""

import errno
import os
import re

import pytest
from invented_study import invented, invented_card
from page_checker import Checker

from wellposed.lab.files import WriteError
from wellposed.lab.record import read_record, write_record
from wellposed.lab.study import Figure
from wellposed.lab.study_page import study_page, write_study_page
from wellposed.papers.catalogue import Claim

CASES = {
    "judged": {},
    "reversed": {"effect": -1.0, "defect": False, "curves": False},
    "regime not reached": {"effect": 0.0, "memorised": 0.1, "curves": False},
    "failed and diverged": {"failed": "robust", "diverged": "plain", "curves": False},
    "smoke": {"scale": "smoke"},
    "paper": {"scale": "paper"},
    "other seeds": {"seeds": 9, "curves": False},
}


@pytest.fixture(scope="module")
def pages():
    found = {}
    for name, case in CASES.items():
        record = invented(**case)
        page = study_page(record, invented_card())
        found[name] = (record, page, Checker(page))
    return found


@pytest.mark.parametrize("name", CASES)
def test_page_needs_no_network(pages, name):
    _, page, found = pages[name]
    assert found.fetched == []
    assert all(link == "study.json" or link[1:] in found.ids for link in found.links)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


@pytest.mark.parametrize("name", CASES)
def test_page_is_well_formed_and_ids_are_unique(pages, name):
    found = pages[name][2]
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))


@pytest.mark.parametrize("name", CASES)
def test_page_shows_every_arm_claim_and_no_nan(pages, name):
    record, _, found = pages[name]
    for arm in record["arms"].values():
        assert arm["label"] in found.text
    for claim in record["claims"]:
        assert f"claim-{claim['id']}" in found.ids
        assert found.text.count(claim["statement"]) >= 3, "at a glance, in full, and in the story"
    assert not re.search(r"\b(nan|inf|None|Undefined|True|False)\b", found.text)


@pytest.mark.parametrize("name", CASES)
def test_refuted_never_stands_without_its_scale(pages, name):
    text = re.sub(r"How to read this.*?experiments\.", "", pages[name][2].text)
    assert len(re.findall("[Rr]efuted", text)) == len(re.findall("[Rr]efuted at laptop scale", text))


def test_first_sentence_is_the_primary_verdict_with_its_interval(pages):
    _, page, _ = pages["judged"]
    answer = re.search(r'<p class="answer">(.*?)</p>', page)[1]
    assert re.fullmatch(
        r"Supported at laptop scale: \+\d\.\d points \[\+\d\.\d, \+\d\.\d\] over its strongest rival, .*, 12 seeds\.",
        answer,
    )
    assert page.index(answer) < page.index("The claim: Steady targets end above every rival.") < page.index("<h2>")
    assert '<p class="answer">Refuted at laptop scale (reversed): −1.' in pages["reversed"][1]
    assert '<p class="answer">Inconclusive at laptop scale (regime not reached)' in pages["regime not reached"][1]


def test_every_kind_of_claim_tells_its_margin_reason_and_regime(pages):
    text = pages["judged"][2].text
    for words in (
        "+0.5 points: one third of the paper's gain",
        "−1 points: more than a point is memorisation",
        "±2 epochs: two epochs are not noticed",
        "+33.6 %: one third of ln(27.5 / 11.4), the paper's ablation",
        "plain training memorises ≥ 15 % of the wrong labels: found 0.31, holds",
        "non-inferiority: no comparison may fall below the margin",
        "acc(steady) - acc(rival), in points",
        "✓ holds in all 200 cases (largest error 2.0e-13)",
        "✗ fails : n = 3 is off by 2.0e-03 (tolerance 1e-12; 3 cases)",
        "– not testable here : it needs the paper's own data or models",
        "wellposed run invented --scale paper",
    ):
        assert words in text, words
    assert "found 0.1, does not hold" in pages["regime not reached"][2].text


def test_forest_plots_draw_every_contrast_and_mark_what_each_says(pages):
    page = pages["judged"][1]
    article = page[page.index('id="claim-any-size"') : page.index('id="claim-as-fast"')]
    drawn = re.findall(r"<svg.*?</svg>", article, re.DOTALL)
    assert len(drawn) == 2, "one for the desk, one for the phone"
    for svg in drawn:
        labels = [svg.index(f">{size} examples<") for size in (9, 10, 100)]
        assert labels == sorted(labels), "as people count"
        assert "margin +3" in svg and 'role="img"' in svg and "var(--second)" in svg
    primary = page[page.index('id="claim-beats-rivals"') : page.index('id="claim-keeps-what-it-learned"')]
    order = [primary.index(name) for name in (">over plain training<", ">over plain training, early stopped<")]
    assert order == sorted(order), "arms in the card's order"


def test_smoke_judges_nothing_and_says_so(pages):
    record, page, found = pages["smoke"]
    assert "A smoke run" in page[: page.index("<h2>")]
    for word in ("supported", "refuted", "inconclusive", "holds in"):
        assert word not in re.sub(r"How to read this.*?experiments\.", "", found.text)
    assert found.text.count("not judged") >= 2 * (len(record["claims"]) - 1)
    assert " ± " not in found.text and "± " not in page.replace("±2", "")


def test_banners_say_what_is_unusual(pages):
    notes = {name: re.findall(r'<div class="notes".*?</div>', page, re.DOTALL) for name, (_, page, _) in pages.items()}
    assert notes["judged"] == []
    assert "9 seeds instead of the 12" in notes["other seeds"][0]
    assert "1 of 96 evaluation trials failed" in notes["failed and diverged"][0]
    assert "&lt;defect&gt;" in notes["failed and diverged"][0]


def test_diverged_and_failed_seeds_are_told_and_count_as_the_worst(pages):
    record, _, found = pages["failed and diverged"]
    assert "plain training (40 % noise): 2 of 12 seeds diverged and count as the worst value." in found.text
    assert "(40 % noise): 1 of 12 seeds failed." in found.text
    values = [v for v in record["arms"]["plain"]["metrics"]["accuracy"] if v is not None]
    assert f"{(sum(values) + 20.0) / 12:.1f} ±" in found.text


def test_arms_that_lack_the_headline_metric_are_named(pages):
    assert "Measured by other metrics (below): steady targets, linear." in pages["judged"][2].text


def test_tuning_shows_space_chosen_defaults_and_every_trial(pages):
    text = pages["judged"][2].text
    for words in (
        "learning_rate 0.01 to 0.2 (log)", "strength 0.5 to 10 (log)", "nothing to tune",
        "chooses among the trials of plain training by a score of its own",
        "takes the settings of steady targets, two networks", "averaged over 3 seeds (0 to 2)",
    ):  # fmt: skip
        assert words in text, words
    trials = text[text.index("All tuning trials") : text.index("What the paper says")]
    assert trials.count("learning_rate=") == 5 * 20 and trials.count("failed") == 5


def test_story_tells_both_sides_and_reasons_from_the_data(pages):
    text = pages["judged"][2].text
    story = text[text.index("What the paper says, what we saw") : text.index("Run it")]
    assert "4 of 7 claims that can be tested here came out as the paper says, 3 did not." in story
    assert "Tuning took the validation score of a robust loss" in story and "from 48 (defaults) to 53.7" in story
    assert "Deviation from the paper. The memory starts at the first prediction" in story
    assert "The paper's own: ImageNet, ResNet-50" in story and "The phenomenon." not in story
    missed = pages["regime not reached"][2].text
    assert "The phenomenon. Asked was: plain training memorises ≥ 15 % of the wrong labels; found was 0.1." in missed


def test_story_that_agrees_says_so():
    claims = [claim for claim in invented_card().claims if claim.id not in ("fewer-errors", "any-size")]
    card = invented_card(claims=tuple(claims))
    record = invented(defect=False, curves=False)
    record["claims"] = [claim for claim in record["claims"] if claim["id"] in {c.id for c in claims}]
    assert "Where both speak they agree: 5 of 5 claims" in study_page(record, card)


def test_curves_start_with_method_strongest_rival_and_witness(pages):
    text = pages["judged"][2].text
    curves = text[text.index("Training curves") : text.index("The other 4 arms")]
    order = [curves.rindex(name) for name in ("steady targets", "a robust loss", "plain training, untuned")]
    assert order == sorted(order) and "memorized" in curves
    assert "Training curves" not in pages["smoke"][2].text, "a single epoch is no curve"


def test_curves_with_gaps_and_of_different_lengths_are_drawn_as_far_as_they_go():
    record = invented()
    test = record["arms"]["steady"]["curves"]["test"]
    test[0], test[1], test[2] = [50.0, None, 60.0], [], test[2][:20]
    found = Checker(study_page(record, invented_card()))
    assert "steady targets" in found.text and "nan" not in found.text


def test_paper_scale_shows_published_numbers_beside_ours_and_no_verdict(pages):
    _, page, found = pages["paper"]
    ours = re.search(r"Steady targets reaches ([\d.]+ ± [\d.]+) \(test accuracy, points\); published: 76.4", page)
    assert ours is not None and f"steady targets 76.4 {ours[1]} +" in found.text
    assert "The claims" not in found.text and "What was tuned" not in found.text
    assert "ImageNet, 1,000 classes" in page[: page.index("<h2>")] and "8 GPUs for two days" in found.text


def test_run_and_reproduce_are_complete(pages):
    text = pages["judged"][2].text
    for words in (
        "wellposed run invented --scale smoke", "wellposed run invented --scale paper", "about 20 minutes on two cores",
        "Data: ImageNet, 1,000 classes, in the folder that DATA names.", "2026-01-02", "1000 to 1011; tuning: 0 to 2",
        "torch 2.6.0", "0123456789abcdef, commit 48ae779906d2 with changes that were not committed",
    ):  # fmt: skip
        assert words in text, words
    protocol = {name: value for name, value in invented_card().protocol.items() if name != "paper"}
    without = Checker(study_page(invented("smoke"), invented_card(protocol=protocol))).text
    assert "Not offered: the card writes down no published configuration." in without


def test_page_has_both_themes_and_a_phone_s_figures(pages):
    page = pages["judged"][1]
    assert "prefers-color-scheme: dark" in page and 'data-theme="dark"' in page and 'class="theme"' in page
    assert page.count('<figure class="wide">') == page.count('<figure class="narrow">') == 7


def test_texts_of_card_record_and_figures_are_escaped():
    claims = (*invented_card().claims[:-1], Claim("imagenet", "scale", "<script>alert(1)</script>"))
    record = invented(curves=False, card=invented_card(claims=claims, name="<b>ST</b>"))
    record["command"] = "wellposed run '<i>'"
    record["arms"]["plain"]["label"] = "<u>plain</u>"
    figure = Figure("A <figure>", "says <em>this</em>", '<svg role="img"></svg>')
    page = study_page(record, invented_card(name="<b>ST</b>", claims=claims), [figure])
    for tag in ("<script>alert", "<b>", "<i>", "<u>", "<em>", "<figure> "):
        assert tag not in page, tag
    assert "A &lt;figure&gt;" in page and '<figure><svg role="img"></svg><figcaption>says &lt;em&gt;' in page


def test_page_is_the_same_after_a_round_trip_through_its_file(tmp_path):
    record = invented(curves=False)
    write_record(record, tmp_path)
    again = read_record(tmp_path)
    assert list(again["arms"]) != list(record["arms"]), "the file has lost the order"
    page = write_study_page(again, invented_card(), tmp_path)
    assert page == tmp_path / "index.html"
    assert page.read_text("utf-8") == study_page(record, invented_card())


def test_record_without_curves_primary_claim_or_headline_metric_makes_a_page():
    record = invented()
    for claim in record["claims"]:
        claim["primary"] = False
    for arm in record["arms"].values():
        arm["curves"], arm["metrics"], arm["group"] = {}, {}, ""
    page = study_page(record, invented_card())
    assert "This study registers no primary claim." in page and "Training curves" not in page


def test_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    page.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_study_page(invented("smoke"), invented_card(), tmp_path)
    assert page.read_text() == "old"
