"""The protocol in a card is read strictly: what is registered must be what runs."""

import copy

import pytest
from invented_paper import PROTOCOL

from wellposed.lab.protocol import parse_protocol
from wellposed.lab.study import protocol_of
from wellposed.papers.catalogue import load_cards


def changed(**entries):
    return {**copy.deepcopy(PROTOCOL), **entries}


def arm(**entries):
    return changed(arms=[{"name": "plain"}, {"name": "x", **entries}])


def test_every_arm_gets_the_shared_knobs_and_the_same_number_of_trials():
    arms = parse_protocol(PROTOCOL, "c").arms
    assert list(arms["plain"].space) == list(arms["method"].space) == ["rate"]
    assert arms["plain"].rounds == arms["method"].rounds == 5


def test_an_arm_built_on_another_has_no_shared_knobs_unless_it_names_them():
    arms = parse_protocol(PROTOCOL, "c").arms
    assert not arms["twin"].space and arms["twin"].rounds == 0
    assert list(arms["tuned_twin"].space) == ["q"] and arms["tuned_twin"].rounds == 3
    named = parse_protocol(arm(settings_of="plain", shared=["rate"]), "c").arms["x"]
    assert list(named.space) == ["rate"]


def test_a_fixed_setting_is_not_searched():
    assert not parse_protocol(arm(fixed={"rate": 0.5}), "c").arms["x"].space


def test_evaluation_seeds_start_at_1000():
    assert parse_protocol(PROTOCOL, "c").evaluation_seeds == list(range(1000, 1008))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(seeds=7), r"c: protocol: seeds must be an integer >= 8, got 7"),
        (changed(tuning_rounds=0), "tuning_rounds must be an integer >= 1, got 0"),
        (changed(extra=1), "unknown key 'extra'; allowed: problem"),
        ({k: v for k, v in PROTOCOL.items() if k != "score"}, "the key 'score' is missing"),
        (arm(role="hero"), "arm 'x': role must be one of .*, got 'hero'"),
        (arm(trials_of="later"), "trials_of must name an arm above it, got 'later'"),
        (arm(settings_of="later"), "settings_of must name an arm above it, got 'later'"),
        (arm(trials_of="plain", fixed={"a": 1}), "trials_of takes another arm's trials as they are"),
        (arm(shared=["speed"]), r"shared must name knobs among \['rate'\], got 'speed'"),
        (arm(rounds=0), "rounds must be >= 1 with something to search and 0 without, got 0"),
        (arm(shared=False, rounds=4), "rounds must be >= 1 with something to search and 0 without, got 4"),
        (arm(search={"q": {"low": 2, "high": 1}}), "arm 'x': q: needs choices, or low < high"),
        (changed(arms=[{"name": "a"}, {"name": "a"}]), "the arm 'a' exists twice"),
        (changed(paper={"metric": "accuracy"}), "protocol.paper: the key 'seeds' is missing"),
    ],
)
def test_a_wrong_protocol_is_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message):
        parse_protocol(table, "c")


@pytest.mark.parametrize("slug", [slug for slug, card in load_cards().items() if card.protocol])
def test_every_card_with_a_protocol_reads(slug):
    protocol = protocol_of(load_cards()[slug])
    tuned = [a for a in protocol.arms.values() if a.space and not a.settings_of]
    # Equal budgets for all that are compared on one problem: arms with fewer trials are those that share nothing (one
    # fixed recipe, only the own knob). A study may tune nothing at all.
    for group in {a.group for a in tuned}:
        own = [a for a in tuned if a.group == group]
        full = [a for a in own if a.rounds == max(a.rounds for a in own)]
        assert all(len(a.space) < min(len(f.space) for f in full) + 1 for a in own if a not in full)
    assert not tuned or max(a.rounds for a in tuned) == protocol.tuning_rounds
