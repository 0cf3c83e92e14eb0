"""The ledger keeps verdicts as they came out, and its check finds every way in which an entry can be untrue."""

import copy
import json

import pytest
from invented_paper import STUDY, card, explosive_card

from wellposed.lab.ledger import LedgerError, export, faults, read_ledger, summary, validate, write_entry
from wellposed.lab.record import ledger_entry, make_record, read_record, write_record
from wellposed.lab.replay import is_current, replay, stamped
from wellposed.lab.study import Study
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import TrialResult


def run(folder, which=None, **options):
    return run_study(STUDY, which or card(), StudyOptions("laptop", folder, engine="serial", **options))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return make_record(run(tmp_path_factory.mktemp("study")))


@pytest.fixture
def entry(record):
    return copy.deepcopy(ledger_entry(record))


def test_a_record_survives_its_file(record, tmp_path):
    write_record(record, tmp_path)
    assert read_record(tmp_path) == json.loads(json.dumps(record))


def test_an_exported_entry_fits_the_schema_and_has_no_fault(record, tmp_path):
    path = export(record, tmp_path)
    assert path.name == "invented.json"
    assert faults(read_ledger(tmp_path)["invented"], card(), STUDY) == []
    text = path.read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"


def test_a_diverged_seed_stays_in_the_ledger_and_is_judged_the_same_from_it(tmp_path):
    record = make_record(run(tmp_path, explosive_card()))
    entry = ledger_entry(record)
    assert entry["arms"]["method"]["status"][3] == "diverged"
    assert entry["arms"]["method"]["metrics"]["accuracy"][3] is None
    assert faults(entry, explosive_card(), STUDY) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["claims"][0].update(verdict="refuted"), "claim 'gains': verdict says 'refuted', but its own numbers give 'supported'"),
        (lambda e: e["claims"][0].update(margin=-1.0), "claim 'gains': margin is not what the card registers"),
        (lambda e: e["claims"][0].update(primary=False), "claim 'gains': primary is not what the card registers"),
        (lambda e: e["claims"].pop(), "claims differ from the card's"),
        (lambda e: e["arms"]["plain"]["metrics"]["accuracy"].__setitem__(0, 90.0), "but its own numbers give"),
        (lambda e: e["arms"]["plain"]["tuning"].update(rounds=50), "arm 'plain' was tuned by 50 trials, the card registers 5"),
        (lambda e: e["arms"].pop("twin"), "arms differ from the card's"),
        (lambda e: e["seeds"].append(1008), "seeds differ from the 8 that the card registers"),
        (lambda e: e.update(scale="smoke"), "at scale"),
        (lambda e: e.update(extra=1), "at the top"),
        (lambda e: e["claims"][0].update(verdict="proven"), "at claims/0/verdict"),
    ],
)  # fmt: skip
def test_every_untruth_is_found(entry, change, message):
    change(entry)
    found = faults(entry, card(), STUDY)
    assert found and any(message in fault for fault in found)


def test_only_laptop_runs_as_registered_enter_the_ledger(record, tmp_path):
    with pytest.raises(LedgerError, match="only runs at laptop scale enter the ledger, this one is 'smoke'"):
        export({**record, "scale": "smoke"}, tmp_path)
    with pytest.raises(LedgerError, match="other seeds or settings than the card registers"):
        export({**record, "as_registered": False}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(LedgerError, match=r"x\.json"):
        read_ledger(tmp_path)
    with pytest.raises(ValueError, match="study.json is missing; run the study first"):
        read_record(tmp_path)


def test_the_summary_holds_the_primary_verdict_alone(entry):
    line = summary({"invented": entry})["invented"]
    assert (line["id"], line["verdict"]) == ("gains", "supported")
    assert line["sentence"].startswith("supported at laptop scale: +") and "8 seeds" in line["sentence"]


def test_figures_and_curves_stay_out_of_the_ledger(record, tmp_path):
    with_figures = {**record, "figures": [{"title": "t", "caption": "c", "svg": "<svg></svg>"}]}
    text = export(with_figures, tmp_path).read_text()
    assert "svg" not in text and "curves" not in text and "history" not in text


def test_a_replay_that_agrees_makes_a_stale_entry_current(entry):
    entry["fingerprint"] = "0" * 16
    found = replay(entry, STUDY, card(), engine="serial")
    assert found.differences == [] and found.trials == 12  # six arms, two seeds
    assert found.stamp["seeds"] == [1000, 1007]
    entry["claims"][3].update(verdict="fails", counterexample={"name": "n = 1", "error": 1.0, "tolerance": 0.1})
    renewed = stamped(entry, found)
    validate(renewed, "invented")
    assert renewed["claims"][3]["verdict"] == "holds" and "counterexample" not in renewed["claims"][3]
    assert is_current(renewed, found.stamp["fingerprint"]) and not is_current(entry, found.stamp["fingerprint"])


def test_exporting_the_same_trials_again_keeps_the_replay_and_exporting_others_does_not(record, entry, tmp_path):
    found = replay(entry, STUDY, card(), engine="serial")
    export(record, tmp_path)
    write_entry(stamped(read_ledger(tmp_path)["invented"], found), tmp_path)
    export(record, tmp_path)
    assert read_ledger(tmp_path)["invented"]["replay"] == found.stamp
    changed = copy.deepcopy(record)
    changed["arms"]["plain"]["metrics"]["accuracy"][0] += 1.0
    export(changed, tmp_path)
    assert "replay" not in read_ledger(tmp_path)["invented"]


def test_a_replay_that_differs_in_one_digit_stamps_nothing(entry):
    def drifted(trial):
        result = STUDY.run(trial)
        shift = 1e-7 if trial.settings["kind"] == "method" else 0.0
        return TrialResult({k: v + shift for k, v in result.metrics.items()})

    drifted.__module__ = STUDY.run.__module__
    found = replay(entry, Study(**{**STUDY.__dict__, "run": drifted}), card(), engine="serial")
    assert found.stamp is None
    assert any(d.startswith("method, seed 1000: ") for d in found.differences)
    assert not any(d.startswith("plain") for d in found.differences)
