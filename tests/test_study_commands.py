"""`wellposed run`, `report` and `ledger`, on the invented paper: what they print, write, refuse and find."""

import json

import pytest
from invented_paper import STUDY, card

import wellposed.papers.catalogue as catalogue
import wellposed.studies.finding as finding
from wellposed.commands import run as command
from wellposed.study_commands import parse_setting


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known, real_card, real_study = card(), catalogue.find_card, finding.find_study
    monkeypatch.setattr(catalogue, "find_card", lambda slug: known if slug == "invented" else real_card(slug))
    monkeypatch.setattr(catalogue, "load_cards", lambda: {"invented": known})
    monkeypatch.setattr(
        finding, "find_study", lambda slug, scale="laptop": STUDY if slug == "invented" else real_study(slug, scale)
    )
    monkeypatch.setattr(finding, "studied_papers", lambda: ["invented"])
    monkeypatch.setattr("wellposed.papers.pages.stale", lambda root: [])
    return tmp_path


def laptop(*more):
    return command(["run", "invented", "--engine", "serial", "--workers", "1", *more])


def test_run_prints_the_verdict_and_writes_page_and_numbers(here, capsys):
    assert laptop() == 0
    out = capsys.readouterr().out
    assert "supported at laptop scale" in " ".join(out.split()).lower()
    folder = here / "wellposed-report" / "studies" / "invented"
    assert {p.name for p in folder.iterdir()} >= {"index.html", "study.json", "trials.sqlite"}
    record = json.loads((folder / "study.json").read_text())
    assert [c["verdict"] for c in record["claims"]] == [
        "supported",
        "supported",
        "refuted",
        "holds",
        "not testable here",
    ]
    assert "A figure" in (folder / "index.html").read_text()


def test_smoke_has_a_folder_of_its_own_and_no_verdict(here, capsys):
    assert laptop("--scale", "smoke") == 0
    assert "not judged" in capsys.readouterr().out.lower()
    assert not (here / "wellposed-report" / "studies" / "invented").exists()
    assert command(["ledger"]) == 0
    assert not (here / "results").exists()


def test_the_ledger_exports_checks_and_finds_what_was_changed_by_hand(here, capsys):
    laptop()
    assert command(["ledger"]) == 0
    path = here / "results" / "invented.json"
    assert command(["ledger", "--check", "--strict"]) == 0
    assert "1 studies in the ledger, 0 stale, 0 faults" in capsys.readouterr().out
    entry = json.loads(path.read_text())
    entry["claims"][0]["verdict"] = "refuted"
    path.write_text(json.dumps(entry))
    assert command(["ledger", "--check"]) == 1
    assert "its own numbers give 'supported'" in capsys.readouterr().err


def test_a_stale_entry_is_listed_and_a_replay_makes_it_current(here, capsys):
    laptop()
    command(["ledger"])
    path = here / "results" / "invented.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "fingerprint": "0" * 16}))
    capsys.readouterr()
    assert command(["ledger", "--check"]) == 0
    assert "stale: the code changed since it ran" in capsys.readouterr().out
    assert command(["ledger", "--check", "--strict"]) == 1
    assert command(["ledger", "--replay", "invented"]) == 0
    assert "12 trials came out the same to ten digits" in capsys.readouterr().out
    assert command(["ledger", "--check", "--strict"]) == 0
    assert json.loads(path.read_text())["fingerprint"] == "0" * 16  # the code that made it stays on record


def test_a_run_with_other_seeds_stays_out_of_the_ledger(here, capsys):
    laptop("--seeds", "9")
    assert command(["ledger"]) == 0
    assert "not exported: invented: run with other seeds or settings" in " ".join(capsys.readouterr().out.split())
    assert not (here / "results").exists()


def test_report_renders_again_and_the_latest_by_default(here, capsys):
    laptop()
    page = here / "wellposed-report" / "studies" / "invented" / "index.html"
    before = page.read_text()
    page.unlink()
    assert command(["report"]) == 0
    assert page.read_text() == before
    assert command(["report", "invented"]) == 0
    (page.parent / "study.json").write_text("{")
    assert command(["report", "invented"]) == 2
    assert "study.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "invented", "--scale", "big"], "--scale must be one of smoke, laptop, paper, got 'big'"),
        (["run", "invented", "--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["run", "invented", "--workers", "-1"], "--workers must be at least 1, got -1"),
        (["run", "invented", "--set", "epochs"], "--set must read NAME=VALUE, e.g. epochs=3, got 'epochs'"),
        (["run", "invented", "--set", "depth=2"], "--set: no setting 'depth' in this study"),
        (["run", "invented", "--scale", "paper"], "no published configuration is written down"),
        (["report", "elsewhere"], "no finished study or comparison 'elsewhere'"),
        (["ledger", "--replay", "invented"], "invented is not in the ledger; it holds: nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(here, capsys, words, message):
    assert command(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(here.rglob("trials.sqlite"))


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("er", "no paper 'er'. Did you mean 'elr'?"),
        ("sltrain", "'sltrain' has no study yet (status: planned). Studies: ba-lora, bo-rep, colm, elr"),
    ],
)
def test_a_wrong_slug_is_named(capsys, slug, message):
    assert command(["run", slug]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_wrong_slug_fails_before_the_first_study_runs(here):
    assert command(["run", "invented", "er", "--engine", "serial"]) == 2
    assert not (here / "wellposed-report").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=0.5", 0.5), ("a=1e-3", 1e-3), ("a=true", True), ("a=b=c", "b=c"), ("a= x ", "x")],
)
def test_settings_are_read_by_type(text, value):
    assert parse_setting(text) == ("a", value)
