"""PS-KD's study: the problem is what the card says, arms and estimands do what they say, smoke runs everything."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wellposed import Compose, Step, TensorLoader, fit
from wellposed.datasets.registry import ENVIRONMENT, DatasetNotInstalled, find_dataset, is_installed
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyError, StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.losses import LabelSmoothing, ProgressiveSelfDistillation, hard_example_shift
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError
from wellposed.studies.problems.letters import _letters, _split, hierarchical_mixture, letters
from wellposed.studies.ps_kd import (
    METHODS,
    STUDY,
    ConfidencePenalty,
    DoubtRecord,
    Watch,
    draw_problem,
    fits_and_is_overconfident,
    network,
    run,
)

SMALL = {"problem": "mixture", "train_size": 96, "validation_size": 32, "test_size": 64}
SETTINGS = {**SMALL, "loss": "ce", "learning_rate": 0.1, "weight_decay": 5e-4, "epochs": 2}


def trial(phase="evaluate", **settings):
    return Trial("s", "arm", "smoke", phase, {**SETTINGS, **settings}, 1000 if phase == "evaluate" else 0, "f")


def test_smoke_runs_every_arm_and_claim(tmp_path):
    found = run_study(STUDY, find_card("ps-kd"), StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    assert [figure.svg.startswith("<svg") for figure in STUDY.figures(found)] == [True, True]
    assert all(settings["problem"] == "mixture" for settings in (a.settings for a in found.arms.values()))


# The problem


def test_parts_are_apart_scaled_by_the_training_examples_and_redrawn_by_the_seed():
    problem = hierarchical_mixture(3, (400, 100, 200))
    rows = torch.cat([problem.train, problem.validation, problem.test])
    assert rows.shape == (700, 48) and rows.dtype == torch.float32
    assert len(torch.unique(rows, dim=0)) == 700
    torch.testing.assert_close(problem.train.mean(0), torch.zeros(48), rtol=0, atol=1e-5)
    torch.testing.assert_close(problem.train.std(0, correction=0), torch.ones(48), rtol=0, atol=1e-5)
    assert problem.test.mean(0).abs().max() > 1e-3
    assert torch.equal(hierarchical_mixture(3, (400, 100, 200)).train, problem.train)
    assert not torch.equal(hierarchical_mixture(4, (400, 100, 200)).labels, problem.labels)


def test_more_examples_than_there_are_cannot_be_asked_for():
    inputs, labels = np.zeros((20, 2)), np.zeros(20, np.int64)
    with pytest.raises(ValueError, match="sizes must not exceed the 20 examples in all"):
        _split(inputs, labels, 2, (15, 5, 1), np.random.default_rng(0))


def test_classes_of_the_mixture_lie_in_super_classes():
    problem = hierarchical_mixture(0, (20_000, 1, 1))
    centres = torch.stack([problem.train[problem.labels == c].mean(0) for c in range(50)])
    distances = torch.cdist(centres, centres)
    same = torch.arange(50)[:, None] // 5 == torch.arange(50)[None] // 5
    apart = distances[~same].mean()
    assert distances[same & (distances > 0)].mean() < 0.7 * apart


@pytest.mark.skipif(not is_installed(find_dataset("letter")), reason="needs: wellposed data get letter")
def test_letters_are_a_random_part_of_the_raw_table():
    problem = letters(0)
    assert [len(part) for part in (problem.train, problem.validation, problem.test)] == [1500, 500, 4000]
    assert problem.classes == 26 and problem.train.shape[1] == 16
    # Sixteen integers from 0 to 15 each: a table whose features were binned by the labels holds fewer.
    assert max(len(torch.unique(problem.test[:, i])) for i in range(16)) == 16
    assert torch.bincount(problem.test_labels, minlength=26).min() > 100
    assert not torch.equal(letters(1).test_labels, problem.test_labels)


def test_without_the_package_the_study_says_how_to_get_it(tmp_path, monkeypatch):
    _letters.cache_clear()
    monkeypatch.setattr("wellposed.datasets.readers.package_folders", lambda name: [])
    monkeypatch.setattr("wellposed.datasets.registry.user_folder", lambda: tmp_path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(DatasetNotInstalled, match="wellposed data get letter"):
        run(trial(problem="letter"))
    with pytest.raises(StudyError, match="wellposed data get letter"):
        run_study(STUDY, find_card("ps-kd"), StudyOptions("laptop", tmp_path))
    assert not (tmp_path / "trials.sqlite").exists()


def test_the_network_and_the_problem_are_those_of_the_card():
    protocol = protocol_of(find_card("ps-kd"))
    assert "16-256-256-26" in protocol.problem
    widths = [(m.in_features, m.out_features) for m in network(16, 26, 0) if isinstance(m, nn.Linear)]
    assert widths == [(16, 256), (256, 256), (256, 26)]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in network(16, 26, 0)) == 2
    for arm in protocol.arms.values():
        if not arm.trials_of:
            assert arm.fixed["problem"] == "letter" and "train_size" not in arm.fixed
    sizes = [len(part) for part in vars(draw_problem({"problem": "mixture"}, 0)).values() if not isinstance(part, int)]
    assert sizes == [1500, 1500, 500, 500, 4000, 4000]


def test_every_tuned_arm_searches_the_shared_knobs_and_the_recipe_arms_do_not():
    arms = protocol_of(find_card("ps-kd")).arms
    shared = {"learning_rate", "weight_decay", "epochs"}
    for arm in arms.values():
        if arm.name.endswith("_recipe"):
            assert not shared & set(arm.space) and arm.rounds == (0 if arm.name == "ce_recipe" else 8)
            assert (arm.fixed["learning_rate"], arm.fixed["weight_decay"], arm.fixed["epochs"]) == (0.1, 5e-4, 60)
        elif not arm.trials_of:
            assert shared <= set(arm.space) and arm.rounds == 20
    assert {a.name: (a.trials_of, a.score) for a in arms.values() if a.trials_of} == {
        "ce_early_stop": ("ce", "score_early_stop"),
        "ce_temperature": ("ce", "score_temperature"),
    }


# The arms


def test_tuning_measures_no_test_example():
    assert set(run(trial("tune")).metrics) == {"score", "score_early_stop", "score_temperature"}
    problem = draw_problem(SMALL, 0)
    poisoned = Watch(problem, testing=False)
    problem.test.fill_(math.nan)
    model = network(48, 50, 0)
    poisoned(Step(model), {})
    assert all(math.isfinite(v) for v in poisoned.metrics(model).values())


def test_a_trial_is_a_function_of_its_seed_and_jitter_is_drawn_anew():
    first, again = run(trial()), run(trial())
    assert first.metrics == again.metrics
    assert first.curves == again.curves
    assert run(trial("tune")).metrics["score"] != first.metrics["score"]


def test_the_arms_are_what_their_names_say():
    problem = draw_problem(SMALL, 0)
    assert METHODS["ce"]({}, problem) is None
    method = METHODS["ps_kd"]({"alpha": 0.7}, problem)
    assert isinstance(method, ProgressiveSelfDistillation) and (method.schedule, method.alpha) == ("epoch", 0.7)
    assert (len(method.memory.values), method.num_classes) == (96, 50)
    assert METHODS["constant_alpha"]({"alpha": 0.7}, problem).schedule == "constant"
    assert isinstance(METHODS["label_smoothing"]({"smoothing": 0.1}, problem), LabelSmoothing)
    assert METHODS["dropout"]({"p": 0.3}, problem).p == 0.3
    assert METHODS["mixup"]({"alpha": 0.3}, problem).alpha == 0.3
    assert set(METHODS) == {arm.fixed["loss"] for arm in protocol_of(find_card("ps-kd")).arms.values() if arm.fixed}


def test_the_confidence_penalty_is_minus_the_entropy():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    step = Step(nn.Identity(), outputs=logits)
    expected = -0.3 * torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(ConfidencePenalty(0.3).penalty(step), expected)


def test_metrics_at_the_last_epoch_and_at_the_best_epoch():
    result = run(trial(epochs=12))
    curve, metrics = result.curves["validation_nll"], result.metrics
    assert len(curve) == 12
    assert metrics["score"] == -curve[-1] and metrics["score_early_stop"] == -min(curve)
    assert metrics["score_temperature"] >= metrics["score"]
    assert metrics["error"] == pytest.approx((round((1 - metrics["accuracy"] / 100) * 64) + 0.5) / 65)
    assert "share_difference" not in metrics


def test_early_stopping_takes_the_weights_of_the_epoch_that_validation_preferred():
    problem = draw_problem(SMALL, 0)
    watch = Watch(problem, testing=True)
    model = network(48, 50, 0)
    watch(Step(model), {})
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[-1].weight.mul_(50.0)
    watch(Step(model), {})
    found = watch.metrics(model)
    assert found["nll_early_stop"] < found["nll"]
    torch.testing.assert_close(model.state_dict(), kept)


def test_a_likelihood_that_is_not_finite_is_divergence():
    model = network(48, 50, 0)
    with torch.no_grad():
        model[-1].bias.fill_(math.nan)
    with pytest.raises(DivergenceError, match="the validation likelihood of epoch 1 is nan"):
        Watch(draw_problem(SMALL, 0), testing=True)(Step(model), {})


def test_doubts_are_those_of_the_training_visits():
    problem = draw_problem(SMALL, 0)
    method, record = ProgressiveSelfDistillation(96, 50), DoubtRecord(problem.labels)
    loader = TensorLoader(problem.train, problem.labels, batch_size=32, shuffle=True)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    fit(network(48, 50, 0), loader, epochs=3, regularizer=Compose(method, record), optimizer=optimizer)
    assert len(record.gamma) == 3
    last = 1 - method.memory.read(torch.arange(96)).gather(1, problem.labels[:, None])[:, 0]
    torch.testing.assert_close(record.gamma[-1], last, rtol=0, atol=1e-5)


def test_the_share_difference_runs_from_epoch_5_to_the_middle_and_ranks_on_earlier_epochs():
    generator = torch.Generator().manual_seed(0)
    record = DoubtRecord(torch.zeros(50, dtype=torch.int64))
    record.gamma = [torch.rand(50, generator=generator) for _ in range(12)]
    shifts = record.shifts(0.8)
    assert len(shifts) == 2  # epochs 5 and 6 of 12
    g = [gamma.double() for gamma in record.gamma]
    # Epoch t = 6, counted from 1: alpha_t = 0.8 * 6 / 12, hardness from epochs 2, 3 and 4.
    expected = hard_example_shift(g[5], g[4], 0.4, (g[1] + g[2] + g[3]) / 3)
    assert shifts[1] == pytest.approx(float(expected))
    assert run(trial(loss="ps_kd", alpha=0.8)).metrics["share_difference"] == 0.0  # two epochs hold none


# The claims


def outcome(**metrics):
    return Outcome("finished", metrics)


def seed(**changes):
    arms = {
        "ps_kd": outcome(nll=0.5, error=0.10, aurc=0.02),
        "ce": outcome(nll=0.6, error=0.11, aurc=0.03),
        "label_smoothing": outcome(nll=0.7, error=0.12),
        "ce_temperature": outcome(nll=9.0, nll_temperature=0.55),
        "ce_early_stop": outcome(nll=9.0, nll_early_stop=0.45),
        "constant_alpha": outcome(nll=0.8),
        "ce_recipe": outcome(nll=0.9, train_accuracy=99.5, accuracy=88.0, overconfidence=3.0),
        "label_smoothing_recipe": outcome(nll=1.0),
        "ps_kd_recipe": outcome(nll=0.8, share_difference=0.002),
    }
    return Seed(1000, {**arms, **changes}, dict(protocol_of(find_card("ps-kd")).worst))


def test_estimands_are_those_of_the_card():
    found = {name: estimand(seed()) for name, estimand in STUDY.estimands.items()}
    log = math.log
    assert found["nll"] == pytest.approx({"ce": log(0.6 / 0.5), "label_smoothing": log(0.7 / 0.5)})
    assert found["nll-recipe"] == pytest.approx({"ce_recipe": log(9 / 8), "label_smoothing_recipe": log(10 / 8)})
    assert found["error"] == pytest.approx({"ce": log(1.1), "label_smoothing": log(1.2)})
    assert found["ranking"] == pytest.approx({"ce": log(1.5)})
    assert found["beyond-post-hoc"] == pytest.approx({"ce_temperature": log(1.1), "ce_early_stop": log(0.9)})
    assert found["progressive"] == pytest.approx({"constant_alpha": log(1.6)})
    assert found["hard-examples"] == 0.002


def test_a_diverged_trial_counts_as_the_worst_value():
    diverged = seed(ps_kd=Outcome("diverged"), ps_kd_recipe=Outcome("diverged"))
    assert STUDY.estimands["nll"](diverged)["ce"] == pytest.approx(math.log(0.6 / math.log(26)))
    assert STUDY.estimands["ranking"](diverged)["ce"] == pytest.approx(math.log(0.03 / (25 / 26)))
    assert STUDY.estimands["hard-examples"](diverged) == 0.0
    assert F.cross_entropy(torch.zeros(1, 26), torch.tensor([3])).item() == pytest.approx(math.log(26))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True, True]),
        ({"train_accuracy": 98.0}, [False, True, True]),
        ({"accuracy": 90.5}, [True, False, True]),
        ({"overconfidence": 1.5}, [True, True, False]),
    ],
)
def test_the_regime_is_judged_on_the_baseline_alone(changes, expected):
    witness = {"nll": 0.9, "train_accuracy": 99.5, "accuracy": 88.0, "overconfidence": 3.0, **changes}
    seeds = [Seed(1000, {"ce_recipe": outcome(**witness)}, {})]
    assert [condition.holds for condition in fits_and_is_overconfident(seeds)] == expected
