"""ELR's study: the problem is what the card says, the controls are what they claim to be, smoke runs everything."""

import numpy as np
import pytest
import torch

from wellposed.lab.study import Seed
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.losses import EarlyLearning
from wellposed.papers.catalogue import find_card
from wellposed.step import Step
from wellposed.studies.elr import (
    STUDY,
    MemoryCrossEntropy,
    _memorises,
    _run_linear,
    early_learning_happens,
    elr_plus,
    gradient_cases,
    no_memorisation,
    run,
)
from wellposed.studies.problems.noisy_digits import HUMAN_NOISE, corrupted, noisy_digits


def test_smoke_runs_every_arm_and_claim(tmp_path):
    found = run_study(STUDY, find_card("elr"), StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    assert found.study.figures(found)[0].svg.startswith("<svg")


@pytest.mark.parametrize(
    ("noise", "rate", "wrong"), [("uniform", 0.4, 0.36), ("other", 0.4, 0.40), ("human", 0.0, 0.402)]
)
def test_share_of_wrong_labels(noise, rate, wrong):
    labels = np.repeat(np.arange(10), 2000)
    given = corrupted(labels, rate, noise, np.random.default_rng(0))
    error = 4 * np.sqrt(wrong * (1 - wrong) / len(labels))
    assert abs((given != labels).mean() - wrong) < error


def test_human_confusions_follow_their_matrix():
    labels = np.repeat(np.arange(10), 20_000)
    given = corrupted(labels, 0.0, "human", np.random.default_rng(0))
    counted = np.zeros((10, 10))
    np.add.at(counted, (labels, given), 1 / 20_000)
    expected = np.asarray(HUMAN_NOISE) / np.asarray(HUMAN_NOISE).sum(1, keepdims=True)
    assert np.abs(counted - expected).max() < 4 * np.sqrt(0.25 / 20_000)


def test_test_and_training_examples_are_apart_and_test_labels_are_clean():
    problem = noisy_digits(3, 0.6)
    assert (len(problem.train), len(problem.validation), len(problem.test)) == (1000, 200, 597)
    again = noisy_digits(3, 0.0)
    assert torch.equal(again.test_labels, problem.test_labels) and torch.equal(again.labels, again.truth)
    rows = torch.cat([problem.train, problem.validation, problem.test])
    assert len(torch.unique(rows, dim=0)) >= 1795  # scikit-learn's digits hold a pair of equal images
    counts = torch.bincount(problem.test_labels, minlength=10)
    assert int(counts.max() - counts.min()) <= 3  # stratified


def test_seeds_redraw_split_and_noise():
    first, second = noisy_digits(0, 0.4), noisy_digits(1, 0.4)
    assert not torch.equal(first.train, second.train)
    assert not torch.equal(first.wrong, second.wrong)
    assert torch.equal(noisy_digits(0, 0.4).labels, first.labels)


def test_validation_labels_are_wrong_too_and_tuning_measures_no_test_label():
    problem = noisy_digits(0, 0.4)
    clean = noisy_digits(0, 0.0)
    assert 0.2 < float((problem.validation_labels != clean.validation_labels).float().mean()) < 0.5
    settings = {
        "problem": "digits",
        "noise": "uniform",
        "rate": 0.4,
        "loss": "ce",
        "learning_rate": 0.05,
        "weight_decay": 1e-3,
        "epochs": 1,
    }
    metrics = run(Trial("s", "ce", "smoke", "tune", settings, 0, "f")).metrics
    assert set(metrics) == {"score", "score_early_stop"}


def test_the_negative_control_adds_the_cross_entropy_to_elrs_memory():
    logits, index = torch.randn(6, 10), torch.arange(6)
    step = Step(torch.nn.Identity(), targets=torch.zeros(6, dtype=torch.int64), index=index, outputs=logits)
    method, reference = MemoryCrossEntropy(6, 10, 3.0, 0.7), EarlyLearning(6, 10, 3.0, 0.7)
    for other in (method, reference):
        other.on_backward(step)
    memory = 0.7 * reference.soft_targets() + 0.3 * logits.softmax(-1).clamp(1e-4, 1 - 1e-4)
    torch.testing.assert_close(
        method.penalty(step), -3.0 * (memory * logits.log_softmax(-1)).sum(-1), atol=1e-3, rtol=1e-3
    )


def test_the_gradient_is_that_of_lemma_2():
    cases = gradient_cases()
    assert len(cases) >= 200 and all(case.holds for case in cases)


def test_the_losses_of_one_linear_problem_share_their_start():
    results = [
        _run_linear({"loss": loss, "strength": 3.0, "momentum": 0.7, "steps": 30}, 7) for loss in ("ce", "kl", "elr")
    ]
    assert len({r.metrics["start"] for r in results}) == 1
    assert results[0].curves["truth_on_wrong"] != results[2].curves["truth_on_wrong"]


@pytest.mark.slow
def test_the_linear_theorem_on_one_seed():
    ends = {
        loss: _run_linear({"loss": loss, "strength": 3.0, "momentum": 0.7, "steps": 20_000}, 5).metrics
        for loss in ("ce", "kl", "elr")
    }
    assert ends["ce"]["truth_on_wrong"] <= 0.05 and ends["kl"]["truth_on_wrong"] <= 0.2
    assert ends["elr"]["truth_on_wrong"] >= 0.85


def outcome(**metrics):
    return Outcome("finished", metrics)


def test_estimands_and_regimes_say_what_the_card_says():
    witness = outcome(memorised=0.2, best_epoch_accuracy=92.0, accuracy=88.0)
    seed = Seed(
        1000,
        {
            "elr": outcome(accuracy=97.0, best_smoothed_accuracy=97.5),
            "ce": outcome(accuracy=90.0),
            "ce_early_stop": outcome(accuracy=89.0, accuracy_early_stop=94.0),
            "gce": outcome(accuracy=96.0),
            "sce": outcome(accuracy=95.0),
            "elr_80": outcome(errors=119.0),
            "elr_plus_80": outcome(errors=59.5),
            "ce_recipe": witness,
            "ce_linear": outcome(peak=0.8, start=0.5, fitted=1.0),
        },
        {},
    )
    assert STUDY.estimands["beats-loss-only"](seed) == {"ce": 7.0, "ce_early_stop": 3.0, "gce": 1.0, "sce": 2.0}
    assert no_memorisation(seed) == -0.5
    assert elr_plus(seed) == pytest.approx(np.log(119.5 / 60.0))
    assert [c.holds for c in _memorises("")([seed])] == [True, True]
    assert [c.holds for c in early_learning_happens([seed])] == [True, True]
