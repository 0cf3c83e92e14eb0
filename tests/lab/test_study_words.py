"""One wording for all places: numbers that the interval deserves, "refuted" with its scale, notes before numbers."""

import math

import pytest
from invented_study import invented, invented_card

from wellposed.lab.study_words import deciding, labels_of, number_style, run_notes, verdict_sentence


def claim(word="supported", unit="points", margin=0.0, kind="effect", qualifier="", **intervals):
    contrasts = {}
    for name, (estimate, low, high) in (intervals or {"": (2.9, 2.1, 3.7)}).items():
        wider = [low - 0.1 * (high - low), high + 0.1 * (high - low)]
        contrasts[name] = {"values": [estimate] * 12, "estimate": estimate, "interval": [low, high],
                           "refuting_interval": wider, "sign_flip_p": 0.001}  # fmt: skip
    weakest = min(contrasts, key=lambda n: contrasts[n]["interval"][0])
    return {"kind": kind, "verdict": word, "qualifier": qualifier, "unit": unit, "margin": margin, "weakest": weakest,
            "contrasts": contrasts}  # fmt: skip


def test_sentence_names_the_strongest_rival_and_the_seeds():
    found = claim(gce=(2.9, 2.1, 3.7), ce=(5.0, 4.0, 6.0))
    wanted = "supported at laptop scale: +2.9 points [+2.1, +3.7] over its strongest rival"
    assert verdict_sentence(found, "laptop", 12) == f"{wanted} gce, 12 seeds"
    labels = {"gce": "generalized cross-entropy", "ce": "cross-entropy"}
    assert verdict_sentence(found, "laptop", range(12), labels) == f"{wanted}, generalized cross-entropy, 12 seeds"


def test_one_rival_is_not_called_the_strongest_and_a_case_is_no_rival():
    assert " over gce, 12 seeds" in verdict_sentence(claim(gce=(2.9, 2.1, 3.7)), "laptop", 12)
    sizes = claim(**{"10 examples": (2.9, 2.1, 3.7), "99 examples": (5.0, 4.0, 6.0)})
    assert " at its weakest, 10 examples, 12 seeds" in verdict_sentence(sizes, "laptop", 12, {"gce": "GCE"})


def test_refuted_stands_with_its_scale_its_word_and_the_interval_that_refuted():
    found = claim("refuted", margin=2.0, qualifier="smaller than claimed", gce=(1.0, 0.5, 1.5), ce=(0.9, 0.0, 1.8))
    assert deciding(found).name == "gce", "the lowest upper end refutes, not the lowest lower end"
    assert verdict_sentence(found, "laptop", 12) == (
        "refuted at laptop scale (smaller than claimed): +1.0 points [+0.4, +1.6] against its strongest rival gce "
        "(margin +2), 12 seeds"
    )


def test_equivalence_refuted_from_above_is_decided_by_the_highest_lower_end():
    found = claim(
        "refuted", kind="equivalence", margin=1.0, qualifier="above the margin", a=(3, 1.2, 4.8), b=(9, 2.5, 15)
    )
    assert deciding(found).name == "b" and "margin ±1" in verdict_sentence(found, "laptop", 12)
    assert "margin -1" in verdict_sentence({**found, "non_inferiority": True}, "laptop", 12)


def test_log_ratios_are_told_in_per_cent_and_large_ones_as_factors():
    found = claim(unit="log ratio", margin=0.29, **{"": (math.log(1.5), math.log(1.4), math.log(1.6))})
    said = verdict_sentence(found, "laptop", 12)
    assert said == "supported at laptop scale: +50.0 % [+40.0, +60.0] (log ratio +0.41, margin +33.6 %), 12 seeds"
    large = claim(unit="log ratio", **{"": (math.log(20), math.log(10), math.log(40))})
    assert ": 20.0× [10.0×, 40.0×] (log ratio +3.00)," in verdict_sentence(large, "laptop", 12)


@pytest.mark.parametrize(
    ("low", "margin", "shown"), [(0.5003, 0.5, "+0.5003"), (0.04, 0.0, "+0.04"), (0.9, 0.5, "+0.9")]
)
def test_rounding_never_moves_a_bound_across_or_upon_the_margin(low, margin, shown):
    found = claim(margin=margin, **{"": (low + 0.9, low, low + 1.8)})
    assert number_style(found).number(low) == shown


def test_exact_claims_tell_cases_and_errors():
    holds = {"kind": "exact", "verdict": "holds", "qualifier": "", "cases": 200, "largest_error": 3.1e-15}
    assert verdict_sentence(holds, "laptop", 12) == "holds in all 200 cases (largest error 3.1e-15)"
    case = {"name": "n = 3", "error": None, "tolerance": 1e-12}
    fails = {**holds, "verdict": "fails", "largest_error": None, "counterexample": case}
    assert verdict_sentence(fails, "laptop", 12) == "fails: n = 3 is not a finite number (tolerance 1e-12; 200 cases)"


def test_what_is_not_judged_says_so_and_scale_claims_are_never_judged():
    record = invented("smoke")
    said = {c["id"]: verdict_sentence(c, "smoke", record["seeds"]) for c in record["claims"]}
    assert said.pop("imagenet").startswith("not testable here")
    assert set(said.values()) == {"not judged at smoke scale"}


def test_a_failed_trial_is_the_reason_of_an_inconclusive_claim():
    record = invented(failed="robust")
    said = verdict_sentence(record["claims"][0], "laptop", record["seeds"], labels_of(record))
    assert said == "inconclusive at laptop scale: the trial of arm 'robust', seed 1001 failed"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({}, []),
        ({"scale": "smoke"}, ["A smoke run"]),
        ({"scale": "paper"}, ["no verdict is drawn"]),
        ({"seeds": 9}, ["this run took 9 seeds instead of the 12 in its card. It does not enter the ledger"]),
        ({"overrides": {"epochs": 3}}, ["settings that are not its card's"]),
        ({"failed": "robust"}, ["1 of 96 evaluation trials failed"]),
        ({"scale": "smoke", "overrides": {"epochs": 3}}, ["A smoke run", "settings that are not its card's"]),
    ],
)  # fmt: skip
def test_notes_say_what_a_reader_must_know_first(case, words):
    notes = run_notes(invented(**case), invented_card())
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
