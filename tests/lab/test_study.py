"""A study on an invented paper whose answer is known: tuning, evaluation, verdicts, resumption, bad input."""

import math

import pytest
from invented_paper import STUDY, TRUE_GAIN, broken_card, card, explosive_card

from wellposed.lab.store import Store
from wellposed.lab.study import MissingTrial, Seed, Study, claim_values
from wellposed.lab.study_run import StudyError, StudyOptions, run_study, study_fingerprint
from wellposed.lab.trial import Outcome


def go(folder, which=None, scale="laptop", study=STUDY, **options):
    return run_study(study, which or card(), StudyOptions(scale, folder, engine="serial", **options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return go(tmp_path_factory.mktemp("study"))


def test_verdicts_are_those_of_the_known_truth(finished):
    words = {name: (v.word, v.qualifier) for name, v in finished.verdicts.items()}
    assert words == {
        "gains": ("supported", ""),
        "no-harm": ("supported", ""),
        "huge": ("refuted", "smaller than claimed"),
        "identity": ("holds", ""),
        "large": ("not testable here", ""),
    }
    weakest = finished.verdicts["gains"].weakest
    assert weakest.interval.low < TRUE_GAIN < weakest.interval.high


def test_the_primary_claim_is_judged_at_95_percent_and_k_secondary_ones_at_1_minus_005_over_k(finished):
    levels = {name: finished.verdicts[name].level for name in ("gains", "no-harm", "huge")}
    assert levels == {"gains": 0.95, "no-harm": pytest.approx(0.975), "huge": pytest.approx(0.975)}


def test_tuning_sees_no_evaluation_seed_and_evaluation_no_tuning_seed(finished):
    rows = Store(finished.options.output / "trials.sqlite").outcomes()
    seeds = {phase: {t.seed for t, _ in rows if t.phase == phase} for phase in ("tune", "evaluate")}
    assert seeds == {"tune": {0, 1}, "evaluate": set(range(1000, 1008))}
    assert not any("accuracy" in o.metrics for t, o in rows if t.phase == "tune")


def test_arms_have_equal_budgets_and_the_first_configuration_is_the_default(finished):
    assert [len(finished.arms[name].tuning) for name in ("plain", "method")] == [5, 5]
    assert finished.arms["method"].tuning[0][0] == {"rate": 0.55}


def test_a_rescored_arm_chooses_among_the_base_arms_trials_by_its_own_score(finished):
    tried = {s["rate"]: score for s, score in finished.arms["late"].tuning}
    assert set(tried) == {s["rate"] for s, _ in finished.arms["plain"].tuning}
    assert finished.arms["late"].settings["rate"] == max(tried, key=tried.get)
    best = max(finished.arms["plain"].tuning, key=lambda pair: pair[1])[0]["rate"]
    assert finished.arms["plain"].settings["rate"] == best


def test_an_arm_built_on_another_starts_from_its_tuned_settings(finished):
    method, twin, tuned = (finished.arms[name].settings for name in ("method", "twin", "tuned_twin"))
    assert twin == {**method, "twin": True}
    assert {k: v for k, v in tuned.items() if k != "q"} == method and tuned["q"] in (1, 2)


def test_a_killed_run_continues_and_repeats_nothing(tmp_path):
    first = go(tmp_path)
    calls = []

    def counting(trial):
        calls.append(trial)
        return STUDY.run(trial)

    counting.__module__ = STUDY.run.__module__  # the fingerprint is that of the module
    study = Study(**{**STUDY.__dict__, "run": counting})
    again = go(tmp_path, study=study)
    assert not calls
    assert again.values == first.values


def test_a_diverged_trial_counts_as_the_worst_value_of_the_card_and_is_not_dropped(tmp_path):
    found = go(tmp_path, explosive_card())
    values = found.values["gains"]["plain"]
    assert len(values) == 8
    assert values[3] == pytest.approx(10.0 - found.arms["plain"].outcomes[3].metrics["accuracy"])
    assert found.verdicts["gains"].word == "inconclusive"


def test_a_claim_with_a_failed_trial_is_inconclusive_and_says_which(tmp_path):
    found = go(tmp_path, broken_card())
    verdict = found.verdicts["gains"]
    assert (verdict.word, verdict.contrasts) == ("inconclusive", ())
    assert "arm 'method', seed 1003" in verdict.qualifier
    assert found.verdicts["identity"].word == "holds"


def test_smoke_runs_every_arm_and_claim_and_judges_nothing(tmp_path):
    found = go(tmp_path, scale="smoke")
    assert not found.verdicts and not found.judged
    assert set(found.values) == {"gains", "no-harm", "huge"}
    assert len(found.seeds) == 2 and all(len(a.outcomes) == 2 for a in found.arms.values())
    with pytest.raises(StudyError, match="smoke: the trial of arm 'witness', seed 1000, failed"):
        go(tmp_path / "b", card(arms=_failing_early()), scale="smoke")


def _failing_early():
    from invented_paper import PROTOCOL

    return [{**a, "fixed": {"nothing": True}} if a["name"] == "witness" else a for a in PROTOCOL["arms"]]


def test_overrides_and_other_seeds_are_not_as_registered(tmp_path):
    assert go(tmp_path / "a").as_registered
    assert not go(tmp_path / "b", seeds=9).as_registered
    changed = go(tmp_path / "c", overrides={"rate": 0.3})
    assert not changed.as_registered
    assert {a.settings["rate"] for a in changed.arms.values()} == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "large"}, "--scale must be one of smoke, laptop, paper, got 'large'"),
        ({"seeds": 1}, "--seeds must be at least 2, got 1"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"overrides": {"depth": 3}}, "--set: no setting 'depth' in this study; it has: kind"),
        ({"scale": "paper"}, "no published configuration is written down"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(tmp_path, options, message):
    with pytest.raises(StudyError, match=message):
        go(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_data_that_are_not_here_are_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("wellposed.lab.study_run.is_installed", lambda entry: False)
    study = Study(**{**STUDY.__dict__, "needs": ("letter",)})
    with pytest.raises(StudyError, match="letter is not installed; get it with: wellposed data get letter"):
        go(tmp_path, study=study)


def test_a_study_must_define_what_its_card_registers():
    for change, message in (
        ({"estimands": {}}, r"estimands must cover .* missing: \['gains', 'huge', 'no-harm'\]"),
        ({"exact": {}}, r"exact must cover .* missing: \['identity'\]"),
        ({"regimes": {}}, r"the card registers a regime for \['gains', 'huge'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Study(**{**STUDY.__dict__, **change}).check(card())


def test_an_estimand_that_is_not_a_number_is_an_error_and_no_value():
    study = Study(**{**STUDY.__dict__, "estimands": {"gains": lambda seed: math.nan}})
    with pytest.raises(ValueError, match="claim 'gains', seed 1000: the estimand '' is nan"):
        claim_values(study, card().claims[0], [Seed(1000, {}, {})])


def test_metrics_of_a_trial_say_what_is_missing():
    seed = Seed(
        1000, {"a": Outcome("finished", {"x": 1.0, "y": math.inf}), "b": Outcome("failed"), "c": None}, {"y": 9.0}
    )
    assert (seed["a"]["x"], seed["a"]["y"]) == (1.0, 9.0)
    for arm, name, kind, message in (
        ("a", "z", KeyError, "no metric 'z'"),
        ("b", "x", MissingTrial, "arm 'b', seed 1000 failed"),
        ("c", "x", MissingTrial, "arm 'c', seed 1000 is missing"),
        ("d", "x", KeyError, "the study has no arm 'd'"),
    ):
        with pytest.raises(kind, match=message):
            seed[arm][name]


def test_the_fingerprint_of_a_study_leaves_the_laboratory_out(monkeypatch):
    from wellposed.lab.fingerprint import reachable

    names = reachable(["wellposed.studies.elr"], "wellposed", ("wellposed.lab", "wellposed.papers"))
    assert "wellposed.fit" in names and "wellposed.losses.early_learning" in names
    assert not any(name.startswith(("wellposed.lab", "wellposed.papers")) for name in names)
    assert study_fingerprint(STUDY) == study_fingerprint(STUDY)
