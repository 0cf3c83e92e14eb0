"""Tuning: equal budgets, reproducible proposals, resumption, and search spaces that are checked."""

import pytest

from wellposed.lab.runner import run_trials
from wellposed.lab.store import Store
from wellposed.lab.trial import Outcome, Trial, TrialResult
from wellposed.lab.tuning import parse_space, tune_arms

SPACE = parse_space({"x": {"low": 0.0, "high": 1.0, "default": 0.9}, "kind": {"choices": ["a", "b"]}})


def make(arm, settings, seed):
    return Trial("s", arm, "smoke", "tune", settings, seed, "f")


def run(trials, log=None):
    if log is not None:
        log.append(sorted(trial.arm for trial in trials))
    return [Outcome("finished", {"score": -((t.settings.get("x", 0.5) - 0.3) ** 2) - t.seed}) for t in trials]


def test_every_arm_gets_equally_many_trials_and_begins_with_its_defaults():
    log = []
    tuned = tune_arms({"p": SPACE, "q": SPACE}, make, lambda t: run(t, log), rounds=6, seeds=(0, 1))
    assert all(arms == ["p", "p", "q", "q"] for arms in log)
    for found in tuned.values():
        assert len(found.history) == 6
        assert found.history[0][0] == {"x": 0.9, "kind": "a"}
        assert found.score == max(score for _, score in found.history)
        assert found.score > found.history[0][1]


def test_the_same_call_proposes_the_same_settings():
    first, second = (tune_arms({"p": SPACE}, make, run, rounds=8)["p"].history for _ in range(2))
    assert first == second


def test_an_arm_without_knobs_is_tried_once():
    log = []
    tuned = tune_arms({"p": {}, "q": SPACE}, make, lambda t: run(t, log), rounds=3)
    assert tuned["p"].settings == {}
    assert log == [["p", "q"], ["q"], ["q"]]


def test_failed_and_diverged_configurations_are_never_chosen():
    def half(trials):
        found = run(trials)
        return [
            Outcome("diverged", error="inf") if t.settings["x"] > 0.5 else o for t, o in zip(trials, found, strict=True)
        ]

    tuned = tune_arms({"p": SPACE}, make, half, rounds=8)["p"]
    assert tuned.history[0][1] is None
    assert tuned.settings["x"] <= 0.5
    with pytest.raises(RuntimeError, match=r"no configuration of arm 'p' could be run(?s:.)*boom"):
        tune_arms({"p": SPACE}, make, lambda t: [Outcome("failed", error="boom")] * len(t), rounds=2)


def test_a_round_cut_by_the_deadline_teaches_no_arm():
    calls = []

    def cut(trials):
        calls.append(1)
        return run(trials)[:-1] + [None] if len(calls) == 3 else run(trials)

    tuned = tune_arms({"p": SPACE, "q": SPACE}, make, cut, rounds=6)
    assert {len(found.history) for found in tuned.values()} == {2}


def test_tuning_seeds_are_not_evaluation_seeds():
    with pytest.raises(ValueError, match="seeds must lie below 1000"):
        tune_arms({"p": SPACE}, make, run, rounds=1, seeds=(1000,))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"x": {"low": 2, "high": 1}}, "elr: x: needs choices, or low < high"),
        ({"x": {"low": 0, "high": 1, "log": True}}, "low must be > 0 on a logarithmic scale, got 0"),
        ({"x": {"lo": 1}}, r"unknown \['lo'\]; allowed keys"),
        ({"x": {"choices": [1, 2], "default": 3}}, "choices must hold at least one value, and the default"),
        ({"x": {"low": 0, "high": 1, "default": 3}}, r"default must lie in \[0, 1\], got 3"),
    ],
)
def test_wrong_spaces_are_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message):
        parse_space(table, "elr")


def test_a_killed_tuning_repeats_its_proposals_and_finds_their_outcomes(tmp_path):
    store, ran = Store(tmp_path / "trials.sqlite"), []

    def function(trial):
        if len(ran) == stop:
            raise KeyboardInterrupt
        ran.append(trial.key)
        return TrialResult(run([trial])[0].metrics)

    def tuned():
        call = lambda trials: run_trials(trials, function, store, engine="serial")  # noqa: E731
        return tune_arms({"p": SPACE, "q": SPACE}, make, call, rounds=6, seeds=(0, 1))

    stop = 13
    with pytest.raises(KeyboardInterrupt):
        tuned()
    stop = -1
    resumed = tuned()
    assert len(ran) == len(set(ran)) == 2 * 2 * 6
    fresh = tune_arms({"p": SPACE, "q": SPACE}, make, run, rounds=6, seeds=(0, 1))
    assert {arm: found.history for arm, found in resumed.items()} == {arm: f.history for arm, f in fresh.items()}


def test_the_sampler_moves_away_from_configurations_that_diverge():
    space = parse_space({"x": {"low": 0.0, "high": 1.0, "default": 0.9}})

    def unstable(trials):
        return [o if t.settings["x"] < 0.4 else Outcome("diverged") for t, o in zip(trials, run(trials), strict=True)]

    late = []
    for seed in range(6):
        history = tune_arms({"p": space}, make, unstable, rounds=24, sampler_seed=seed)["p"].history
        late += [score is not None for _, score in history[8:]]
    assert sum(late) / len(late) > 0.5  # by chance it were 0.4; a sampler that forgets failures comes to 0.03


def test_a_score_that_is_not_finite_counts_as_the_worst():
    def broken(trials):
        found = run(trials)
        found[0].metrics["score"] = float("nan") if trials[0].settings["x"] > 0.5 else 1.0
        return found

    found = tune_arms({"p": SPACE}, make, broken, rounds=6)["p"]
    assert found.history[0][1] is None
    assert found.score == 1.0


def test_a_metric_that_no_trial_has_and_time_that_was_too_short_are_said():
    with pytest.raises(ValueError, match=r"a trial has no metric 'accuracy'; it has \['score'\]"):
        tune_arms({"p": SPACE}, make, run, rounds=1, score="accuracy")
    with pytest.raises(RuntimeError, match="arm 'p' could be run; time ran out before the first was done"):
        tune_arms({"p": SPACE}, make, lambda trials: [None], rounds=1)
