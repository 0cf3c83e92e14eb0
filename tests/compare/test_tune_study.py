"""`wellposed tune STUDY`: the offers are the studies' own trainings, arms are compared by seed, wrong words are refused."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from page_checker import Checker
from rich.cells import cell_len
from rich.console import Console
from torch.optim.lr_scheduler import MultiStepLR

from wellposed import fit
from wellposed.commands import run
from wellposed.compare import seed_job
from wellposed.compare.errors import UserError
from wellposed.compare.tune_again import load_tuning
from wellposed.compare.tune_live import Report
from wellposed.compare.tune_record import is_tuning, write_tuning
from wellposed.compare.tune_study import choice, job
from wellposed.compare.tune_study.answer import answer_study
from wellposed.compare.tune_study.choice import default_settings, prepare_study
from wellposed.compare.tune_study.job import run_study_tuning
from wellposed.compare.tune_study.naming import study_slug
from wellposed.compare.tune_study.options import StudyTuneOptions
from wellposed.compare.tune_study.page import study_page
from wellposed.compare.tune_study.result import StudyTuneResult, TriedArm, collect_study
from wellposed.compare.tune_study.snippet import learn_study, run_settings
from wellposed.compare.tune_study.terminal import arms_table, print_study_tuning, settings_rows
from wellposed.compare.tune_study.training import Learning, run_study_trial
from wellposed.evaluation import predict
from wellposed.hyperparameter import Hyperparameter
from wellposed.lab.statistics import paired_interval
from wellposed.lab.study import protocol_of
from wellposed.lab.trial import Trial, TrialResult
from wellposed.lab.tune_problem import TuneProblem
from wellposed.lab.tuning import tune_arms
from wellposed.papers.catalogue import find_card
from wellposed.studies.finding import find_study
from wellposed.studies.tunable import find_tunable, with_offer
from wellposed.studies.tunable.strengths import step_decay
from wellposed.tuning import Schedule

ELR = {"problem": "digits", "noise": "uniform", "rate": 0.4, "loss": "elr", "strength": 3.0, "momentum": 0.7,
       "learning_rate": 0.05, "weight_decay": 1e-3}  # fmt: skip
OFFERS = {
    "elr": ("elr", ELR),
    "ps-kd": ("ps_kd", {"problem": "mixture", "loss": "ps_kd", "alpha": 0.8, "learning_rate": 0.1, "weight_decay": 5e-4,
                        "train_size": 192, "validation_size": 64, "test_size": 200}),
    "nested-dropout": ("dropout", {"stage": "one", "loss": "ce", "kind": "dropout", "p": 0.5, "learning_rate": 0.05,
                                   "weight_decay": 5e-4}),
    "weight-compander": ("wc", {"method": "wc", "a": 0.7, "b": 0.7, "learning_rate": 0.03, "weight_decay": 5e-4,
                                "dropout": 0.2}),
}  # fmt: skip
STRENGTHS = {
    "elr": {"strength", "weight_decay"},
    "ps-kd": {"alpha", "weight_decay"},
    "nested-dropout": {"p", "weight_decay"},
    "weight-compander": {"a", "b", "weight_decay"},
}


@pytest.fixture
def here(here, monkeypatch):
    """An empty folder, whose ledger is the only one."""
    monkeypatch.setattr(choice, "LEDGERS", (here / "results",))
    return here


@pytest.fixture
def known(monkeypatch):
    """Functions of this file have no fingerprint, and those of the package take seconds to find."""
    monkeypatch.setattr(job, "study_fingerprint", lambda study: "f")
    monkeypatch.setattr(job, "fingerprint", lambda *modules: "g")


def trial(slug, epochs=2, **settings):
    arm, found = OFFERS[slug]
    return Trial(slug, arm, "laptop", "evaluate", {**found, "epochs": epochs, **settings}, 1000, "f")


def ledger(folder, **settings):
    (folder / "results").mkdir()
    entry = {"arms": {"elr": {"settings": {**ELR, "epochs": 60, **settings}, "tuning": {"rounds": 20}}}}
    (folder / "results" / "elr.json").write_text(json.dumps(entry))


# ---- the offers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", list(OFFERS))
def test_an_offer_is_the_training_of_the_study_with_hyperparameters_in_the_place_of_floats(slug):
    """Trained plainly, it ends with the study's own metric: data, network, order, optimizer and method are the same."""
    one = trial(slug)
    problem = find_tunable(slug)(one)
    assert set(problem.strengths) == STRENGTHS[slug]
    assert {name: float(h()) for name, h in problem.strengths.items()} == pytest.approx(
        {name: one.settings[name] for name in problem.strengths}
    )
    result = fit(
        problem.model, problem.train, epochs=problem.epochs, regularizer=problem.regularizer,
        optimizer=problem.optimizer, scheduler=lambda o, n: MultiStepLR(o, [n // 2, n * 3 // 4], gamma=0.1), seed=1000,
    )  # fmt: skip
    study = find_study(slug)
    assert problem.metric(*predict(result.model, problem.test)) == pytest.approx(
        study.run(one).metrics[study.headline[0]], rel=1e-5
    )


def test_the_learning_rate_falls_as_in_the_studies():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = MultiStepLR(optimizer, [20, 30], gamma=0.1), []
    for _ in range(40):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [step_decay(step / 40) for step in range(40)] == pytest.approx(found)


@pytest.mark.parametrize(
    "slug", ["elr", "weight-compander", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ps-kd", "nested-dropout"))]
)
def test_a_self_tuning_network_moves_every_strength_of_an_offer(slug):
    found = Learning(find_tunable(slug)(trial(slug)), "stn", 0, Report(None, ""), rehearsal=True).run()
    assert set(found.artifacts["values"]) == STRENGTHS[slug]
    for name in STRENGTHS[slug]:
        assert found.artifacts["values"][name] != pytest.approx(OFFERS[slug][1][name], rel=1e-4)
    schedule = Schedule.from_json(found.artifacts["schedule"])
    assert set(schedule.values[-1]) == STRENGTHS[slug]
    assert found.curves["epoch"] == [1.0, 2.0]


def test_bilevel_descent_learns_what_has_a_derivative():
    found = Learning(find_tunable("elr")(trial("elr")), "bo-rep", 0, Report(None, ""), rehearsal=True).run()
    assert found.artifacts["values"]["strength"] != pytest.approx(3.0, rel=1e-4)
    found = Learning(find_tunable("nested-dropout")(trial("nested-dropout", 1)), "bo-rep", 0, Report(None, ""), True)
    found.fit()
    assert list(found.plan.left_out) == ["p"]


def test_a_problem_without_strengths_or_with_a_foreign_one_is_refused():
    problem = find_tunable("elr")(trial("elr"))
    with pytest.raises(ValueError, match="TuneProblem: strengths is empty"):
        replace(problem, strengths={})
    with pytest.raises(ValueError, match="TuneProblem: the strength 'alpha' is no hyperparameter of the regularizer"):
        replace(problem, strengths={"alpha": Hyperparameter(1.0)})
    assert isinstance(problem, TuneProblem)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*words):
    return run(["tune", "elr", "--engine", "serial", "--workers", "1", "--seeds", "2", "--set", "epochs=1", *words])


def test_a_gradient_tuner_is_compared_with_defaults_ledger_and_its_own_values(here, known, capsys):
    ledger(here, strength=1.0)
    assert command() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "learning: strength, weight_decay" in out
    assert "stn against registered defaults and the ledger's settings, 2 seeds each" in out
    assert "note: learning_rate, momentum keep their registered values" in out
    assert "2 seeds cannot show a difference; 6 or more can (test accuracy" in out
    folder = here / "wellposed-report" / "tune-elr"
    assert {path.name for path in folder.iterdir()} == {"index.html", "results.json", "schedule.json", "trials.sqlite"}
    result = load_tuning(folder)
    assert is_tuning(folder)
    assert [arm.name for arm in result.arms] == ["untuned", "stn", "ledger", "applied"]
    assert (result.arm, result.metric, result.unit) == ("elr", "accuracy", "points")
    assert result.find("ledger").settings["strength"] == 1.0
    assert result.find("ledger").settings["epochs"] == 1
    # The registered defaults are the study's own trial; the values are fixed in another.
    own = {**ELR, "epochs": 1}
    study = find_study("elr")
    for settings, arm in ((own, "untuned"), (own | {n: v[0] for n, v in result.tuned.values.items()}, "applied")):
        expected = study.run(Trial("elr", "elr", "laptop", "evaluate", settings, 1000, "f")).metrics["accuracy"]
        assert result.find(arm).scores[0] == pytest.approx(expected)
    page = Checker((folder / "index.html").read_text())
    assert page.fetched == [] and page.open == []
    for words in ("What was learned", "the ledger's settings", "find_tunable('elr')", "Validation loss"):
        assert words in page.text
    (folder / "index.html").unlink()
    assert run(["report", "tune-elr"]) == 0
    assert (folder / "index.html").is_file()


def test_a_search_tries_the_registered_space_on_tuning_seeds_and_resumes(here, known, capsys, monkeypatch):
    calls = []

    def counted(trial):
        calls.append((trial.phase, trial.seed, dict(trial.settings)))
        if len(calls) == 8:
            raise KeyboardInterrupt
        score = trial.settings["strength"] - 10 * trial.settings["weight_decay"]
        return TrialResult({"score": score, "accuracy": 50 + score + 0.1 * (trial.seed % 10)})

    monkeypatch.setattr("wellposed.studies.finding.find_study", lambda slug: fast(counted))
    assert command("--method", "tpe", "--rounds", "3") == 130
    assert command("--method", "tpe", "--rounds", "3") == 0
    tuning = [call for call in calls if call[0] == "tune"]
    assert [seed for _, seed, _ in tuning] == [0, 1, 2] * 2 + [0, 1, 1, 2]  # the eighth was interrupted
    assert all(settings["epochs"] == 1 for *_, settings in calls)
    assert tuning[0][2] == {**ELR, "epochs": 1}
    result = load_tuning(here / "wellposed-report" / "tune-elr")
    assert [arm.name for arm in result.arms] == ["untuned", "tpe"]
    assert len(result.history) == 3
    assert result.history[0] == ({"learning_rate": 0.05, "weight_decay": 0.001, "strength": 3.0, "momentum": 0.7}, 2.99)
    best = max(result.history, key=lambda pair: pair[1])[0]
    assert {name: result.tuned.settings[name] for name in best} == best
    seeds = [call for call in calls if call[0] == "evaluate"]
    assert len(seeds) == (2 if best == result.history[0][0] else 4)
    out = capsys.readouterr().out
    assert "no results/elr.json here: the ledger's settings are not compared" in " ".join(out.split())
    page = (here / "wellposed-report" / "tune-elr" / "index.html").read_text()
    assert "Every configuration" in page and "Tuning score over strength" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["elrr"], "no file, no data set and no study 'elrr'. Did you mean the study 'elr'?"),
        (["digitz"], "no file, no data set and no study 'digitz'. Did you mean 'digits'"),
        (["elr", "--method", "sdn"], "--method must be one of stn, delta-stn, bo-rep, tpe, random, got 'sdn'. Did you"),
        (["elr", "--method", "maid"], "--method maid learns the penalties of a linear model; studies train networks"),
        (
            ["elr", "--arm", "ce_"],
            "--arm: 'elr' has no arm 'ce_'. Did you mean 'ce'? With something to tune: elr, elr_60",
        ),
        (["elr", "--arm", "elr_linear"], "--arm: 'elr_linear' has nothing to tune; with something to tune: elr"),
        (["elr", "--arm", "elr_plus_80"], "elr does not offer the arm 'elr_plus_80': it offers one network on digits."),
        (
            ["ignite"],
            "'ignite' does not offer its own as a model with data; elr, nested-dropout, ps-kd, weight-compander",
        ),
        (["weight-compander", "--method", "bo-rep"], "BOREP cannot train under WeightCompander, which acts in"),
        (["elr", "--trials", "4"], "--trials is for data, and 'elr' is a study: take --rounds"),
        (["elr", "--epochs", "4"], "--epochs is for data, and 'elr' is a study: take --set epochs=4"),
        (["elr", "--noise", "0.4"], "--noise is for data, and 'elr' is a study"),
        (["iris", "--rounds", "4"], "--rounds is for a study, and 'iris' is data: take --trials"),
        (["elr", "--rounds", "4"], "--rounds applies to tpe and random: 'stn' learns within one training"),
        (["elr", "--method", "tpe", "--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["elr", "--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["elr", "--set", "epoch=1"], "--set: no setting 'epoch' in the arm 'elr'. Did you mean 'epochs'?"),
        (["elr", "--budget", "soon"], "--budget must read like 90s, 10m or 1h"),
    ],
)
def test_wrong_words_are_one_line_before_any_work(here, refused, words, message):
    refused(["tune", *words, "--engine", "serial"], message)


def test_a_study_without_anything_to_tune_names_those_that_have():
    card = find_card("maid")
    with pytest.raises(UserError, match=r"no arm of 'maid' has anything to tune. Studies that have: .*elr"):
        choice._arm(card, protocol_of(card), None)


def test_a_data_set_and_a_file_win_over_a_study(here):
    assert study_slug("digits") is None
    assert study_slug("elr") == "elr"
    (here / "elr").mkdir()
    assert study_slug("elr") is None


# ---- settings, budget, failures ----------------------------------------------------------------------------------------


def test_defaults_of_an_arm_that_builds_on_another_come_from_the_ledger_where_there_is_one():
    protocol = protocol_of(find_card("ignite"))
    plain = default_settings(protocol.arms["ignite"], protocol, None)
    assert (plain["surrogate"], plain["method"], plain["eps_ratio"], plain["epochs"]) == ("network", "ignite", 2.0, 20)
    kept = {
        "arms": {"base": {"settings": {"surrogate": "network", "search": "ascent", "epochs": 40, "method": "base"}}}
    }
    assert default_settings(protocol.arms["ignite"], protocol, kept)["epochs"] == 40


def test_the_ledgers_settings_are_left_out_where_they_are_the_defaults(here):
    ledger(here)
    options = StudyTuneOptions("tpe", output=here)
    prepared = prepare_study(find_study("elr"), find_card("elr"), options)
    assert prepared.ledger is None
    assert "the best of 20 configurations, are the registered defaults" in prepared.notes[0]


def fast(function):
    return replace(with_offer(find_study("elr")), run=function)


def scored(trial):
    return TrialResult({"score": trial.settings["strength"], "accuracy": 90.0 + trial.seed % 7})


def test_a_budget_leaves_out_configurations_and_then_seeds(here, known, monkeypatch):
    monkeypatch.setattr(seed_job, "seconds_left", lambda deadline: 0.0)
    options = StudyTuneOptions("random", rounds=5, budget=1000, engine="serial", workers=1, output=here)
    finished = run_study_tuning(prepare_study(fast(scored), find_card("elr"), options))
    assert finished.seeds == [1000, 1001]
    assert len(finished.tuned.history) == 2
    assert "the budget allowed 2 configurations (asked: 5)" in finished.notes
    assert "the budget of 1000 s allowed 2 seeds (asked: 6)" in finished.notes


def diverging(trial):
    if trial.phase == "evaluate" and trial.seed == 1001:
        raise FloatingPointError("lost") if trial.settings["strength"] > 3 else ArithmeticError("gone")
    return scored(trial)


def test_a_seed_that_fails_counts_as_the_card_says(here, known):
    options = StudyTuneOptions("random", rounds=2, seeds=2, engine="serial", workers=1, output=here)
    result, schedule = collect_study(run_study_tuning(prepare_study(fast(diverging), find_card("elr"), options)))
    assert schedule is None
    assert result.untuned.scores == [pytest.approx(96.0), 10.0]
    assert result.untuned.failures == [1001]
    assert any("1 of 2 seeds diverged or failed and count as 10 (" in note for note in result.notes)


def strength_alone(trial):
    return TrialResult({"score": 0.0, "accuracy": trial.settings["strength"]})


def told(trial, run, offer, live, titles):
    """In the place of a training that learns: each seed its own value."""
    if not trial.scale.startswith("tune-"):
        return run(trial)
    values = {"strength": trial.seed - 993.0}
    artifacts = {"values": values, "schedule": json.dumps({"seed": trial.seed}), "left_out": {}}
    return TrialResult({"headline": 50.0, "validation_loss": 2000.0 - trial.seed}, {"epoch": [1.0]}, artifacts)


def test_what_a_seed_learned_is_applied_to_the_same_seed(here, known, monkeypatch):
    monkeypatch.setattr(job, "run_study_trial", told)
    monkeypatch.setattr(choice, "rehearse_study", lambda prepared: None)
    options = StudyTuneOptions("stn", seeds=3, engine="serial", workers=1, output=here)
    prepared = prepare_study(fast(strength_alone), find_card("elr"), options)
    prepared.learned = ["strength"]
    result, schedule = collect_study(run_study_tuning(prepared))
    assert result.tuned.values == {"strength": [7.0, 8.0, 9.0]}
    assert result.find("applied").scores == [7.0, 8.0, 9.0]
    assert result.untuned.scores == [3.0] * 3
    # The schedule and the lines are those of the seed with the lowest validation loss.
    assert (result.best_seed, json.loads(schedule)) == (1002, {"seed": 1002})
    assert "'strength': 9.0" in result.usage


def test_trials_that_learn_have_a_fingerprint_of_their_own(here):
    options = StudyTuneOptions("tpe", engine="serial", workers=1, output=here)
    one = job._StudyJob(prepare_study(with_offer(find_study("elr")), find_card("elr"), options), None)
    assert one.fingerprint != one.learning_fingerprint
    one.store.close()


def unmeasured(trial):
    return TrialResult({"score": 1.0, "nll": 0.5})


def test_an_arm_without_the_metric_is_an_error_that_names_what_it_has(here, known):
    options = StudyTuneOptions("random", rounds=2, seeds=2, engine="serial", workers=1, output=here)
    with pytest.raises(UserError, match="this arm measures no 'accuracy', but nll, score: take another --arm"):
        collect_study(run_study_tuning(prepare_study(fast(unmeasured), find_card("elr"), options)))


def test_random_proposals_do_not_look_at_the_scores():
    def proposals(sampler, sign):
        seen = []

        def run_batch(trials):
            seen.extend(t.settings["strength"] for t in trials)
            from wellposed.lab.trial import Outcome

            return [Outcome("finished", {"score": sign * t.settings["strength"]}) for t in trials]

        space = protocol_of(find_card("elr")).arms["elr"].space
        tune_arms({"elr": {"strength": space["strength"]}},
                  lambda arm, s, seed: Trial("s", arm, "laptop", "tune", s, seed, "f"), run_batch, rounds=12,
                  sampler=sampler)  # fmt: skip
        return seen

    assert proposals("random", 1) == proposals("random", -1)
    assert proposals("tpe", 1) != proposals("tpe", -1)


# ---- the words -------------------------------------------------------------------------------------------------------


def invented(gain=0.0, kept=None, fixed=None, n=6, search=False, lower=False):
    random = np.random.default_rng(0)

    def arm(name, label, shift, settings=None):
        scores = (90 + shift + random.normal(0, 0.1, n)).tolist()
        curves = {"epoch": [[1.0, 2.0]] * n, "validation loss": [[0.5, 0.4]] * n, "strength": [[3.0, 2.0]] * n}
        return TriedArm(name, label, scores, [2.0] * n, settings, {"strength": [2.0] * n}, curves)

    method = ("tpe", "TPE", {"strength": 2.0}) if search else ("stn", "STN", None)
    arms = [arm("untuned", "registered defaults", 0.0, {"strength": 3.0}), arm(method[0], method[1], gain, method[2])]
    arms += [] if kept is None else [arm("ledger", "the ledger's settings", kept, {"strength": 4.0})]
    arms += [] if fixed is None else [arm("applied", "its values, fixed", fixed)]
    machine = {"cores": 2, "memory_gib": 8.0, "platform": "Linux", "python": "3.11", "torch": "2", "numpy": "2",
               "wellposed": "0"}  # fmt: skip
    return StudyTuneResult(
        "elr", "Early learning", "elr", "ELR", "digits", "the split", "accuracy on validation", "accuracy",
        "test accuracy", "points", lower, method[0], method[1], "how it learns", arms, list(range(1000, 1000 + n)),
        ["strength"], ["strength"], [({"strength": 3.0}, 1.0), ({"strength": 2.0}, 2.0)] if search else [],
        3 if search else 0, 9.0, 20, 1000, run_settings("elr", "elr", {"strength": 2.0}, 1000, "accuracy"),
        "" if search else learn_study("elr", "elr", {"strength": 3.0}, 1000, "stn"), "wellposed tune elr", machine,
        "0123", None, 61.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gain": 1.0, "kept": 1.0, "fixed": 0.9}, ["STN improves ELR: test accuracy +", "points against the registered",
         "in one training and 1.0 times the wall time", "the best of 20 configurations: ", "no difference beyond noise",
         "fixed from the start, help, too"]),
        ({"gain": 1.0, "kept": 2.0, "fixed": 0.0}, [", worse.", "fixed from the start, gain nothing beyond noise"]),
        ({"gain": -1.0, "fixed": 1.0}, ["STN makes ELR worse: ", "Keep the registered defaults.", "do help"]),
        ({}, ["STN gains nothing beyond noise: "]),
        ({"gain": -1.0, "lower": True}, ["STN improves ELR: test accuracy -"]),
        ({"gain": 1.0, "n": 5}, ["5 seeds cannot show a difference; 6 or more can"]),
        ({"gain": 1.0, "search": True}, ["TPE improves ELR", "found by 6 trainings on tuning seeds"]),
    ],
)  # fmt: skip
def test_the_sentence_claims_what_both_tests_agree_on_and_no_more(options, words):
    text = answer_study(invented(**options)).sentence
    for part in words:
        assert part in text


def test_the_table_is_paired_by_seed_and_fits_into_a_terminal():
    result = invented(gain=1.0, kept=1.0, fixed=0.5)
    found = answer_study(result)
    expected = paired_interval(result.tuned.scores, result.untuned.scores)
    assert found.lines[1].gap.startswith(f"{expected.estimate:+.{found.decimals}f} [")
    out = io.StringIO()
    Console(file=out, width=80).print(arms_table(result, found))
    assert max(map(cell_len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    assert settings_rows(result)[1] == [["strength", "3", "2", "2 to 2", "4"]]


@pytest.mark.parametrize("options", [{"kept": 0.5, "fixed": 0.2}, {"search": True}])
def test_what_is_written_is_read_back(tmp_path, options):
    result = invented(**options)
    write_tuning(result, None, tmp_path)
    assert load_tuning(tmp_path) == result


def test_a_search_that_found_nothing_better_says_so():
    result = invented(search=True)
    result.tuned.settings = result.untuned.settings
    assert "Of 2 configurations none scored higher" in answer_study(result).sentence


def printed(result):
    out = io.StringIO()
    print_study_tuning(result, answer_study(result), [], "folder", Console(file=out, width=100))
    return out.getvalue()


def test_the_lines_to_use_are_those_that_were_shown_to_help():
    assert "find_study('elr').run(trial)" in printed(invented(gain=1.0, fixed=1.0))
    assert "tuner = partial(SelfTuner" in printed(invented(gain=1.0, fixed=0.0))
    assert "Trial(" not in printed(invented())
    assert "find_study('elr').run(trial)" in printed(invented(gain=1.0, search=True))


@pytest.mark.parametrize("options", [{"gain": 1.0, "kept": 0.5, "fixed": 0.2}, {"gain": 1.0, "search": True}])
def test_the_page_says_what_the_terminal_says(options):
    result = invented(**options)
    page = Checker(study_page(result))
    assert page.fetched == [] and page.open == []
    for part in answer_study(result).sentence.split(". "):
        assert part.rstrip(".") in page.text


def test_the_lines_of_python_run():
    settings = {**ELR, "epochs": 1}
    names: dict = {}
    exec(run_settings("elr", "elr", settings, 1000, "accuracy"), names)
    assert names["settings"] == settings
    names = {}
    exec(learn_study("elr", "elr", settings, 1000, "stn"), names)
    assert len(names["result"].history) == 1
    assert float(names["problem"].strengths["strength"]()) != 3.0


def test_the_live_report_of_a_trial_that_tells_nothing_shows_its_settings(tmp_path):
    seen = []

    def look(trial):
        seen.extend(json.loads(path.read_text()) for path in tmp_path.iterdir())
        return TrialResult({"score": 0.0})

    one = trial("elr")
    run_study_trial(one, look, None, str(tmp_path), {one.key: "TPE 1000"})
    assert (seen[0]["title"], seen[0]["step"], seen[0]["values"]["strength"]) == ("TPE 1000", None, 3.0)
    assert list(tmp_path.iterdir()) == []
