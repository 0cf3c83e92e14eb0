"""The study of nested dropout: arms are what the card says, stage 2 starts from stage 1, smoke runs everything."""

import copy
import math

import pytest
import torch

from wellposed.features import NestedDropout, select_prefix
from wellposed.features.insertion import inserted
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.pair import Pair
from wellposed.papers.catalogue import find_card
from wellposed.studies import nested_dropout as study
from wellposed.studies.problems.noisy_digits import noisy_digits
from wellposed.studies.training import accuracy, logits_of

PLAIN = {"stage": "one", "loss": "ce", "learning_rate": 0.05, "weight_decay": 5e-4, "epochs": 2}
NESTED = {**PLAIN, "kind": "nested", "sigma": 30.0}
STAGE_2 = {
    "stage": "two", "mode": "halves", "forget_rate": 0.4, "stage2_learning_rate": 0.01, "stage2_weight_decay": 5e-4,
    "stage2_epochs": 2,
}  # fmt: skip


def run(settings, phase="evaluate", seed=1000):
    return study.run(Trial("s", "a", "smoke", phase, settings, seed if phase == "evaluate" else 0, "f"))


@pytest.fixture(scope="module")
def card():
    return find_card("nested-dropout")


def test_smoke_runs_every_arm_and_claim(card, tmp_path):
    found = run_study(study.STUDY, card, StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(study.STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    assert study.figures(found)[0].svg.startswith("<svg")


def test_forty_percent_of_training_and_validation_labels_are_another_class_and_test_labels_are_clean():
    problem, clean = noisy_digits(7, study.RATE, "other"), noisy_digits(7, 0.0)
    assert int(problem.wrong.sum()) == 400
    assert int((problem.validation_labels != clean.validation_labels).sum()) == 80
    assert torch.equal(problem.test_labels, clean.test_labels)


def test_tuning_measures_no_test_label():
    for settings in (PLAIN, NESTED, {**NESTED, "stage": "pair"}, {**NESTED, **STAGE_2}):
        result = run(settings, "tune")
        assert set(result.metrics) <= {"score", "score_prefix", "score_early_stop"}
        assert set(result.curves) <= {"validation"}


def test_every_arm_of_the_card_can_be_told_by_its_settings(card):
    arms = protocol_of(card).arms
    for name, metrics in {"ce_early_stop": "score_early_stop", "nested": "score_prefix", "ce": "score"}.items():
        assert arms[name].score == metrics
    tuned = [arm for arm in arms.values() if arm.space]
    assert all(arm.rounds == 20 for arm in tuned)
    assert [arm.name for arm in arms.values() if not arm.space and not arm.settings_of] == ["ce_recipe"]
    assert {arms["ce_recipe"].fixed[k] for k in ("learning_rate", "weight_decay", "epochs")} == {0.05, 5e-4, 60}


def test_the_networks_have_a_classifier_without_bias_and_a_bottleneck_is_narrow():
    wide, narrow = study.network(PLAIN, 0), study.network({"width": 16}, 0)
    assert [tuple(p.shape) for p in wide.parameters()] == [(512, 64), (512,), (256, 512), (256,), (10, 256)]
    assert narrow[-1].weight.shape == (10, 16)


def test_compressors_act_on_the_features_of_the_classifier_alone():
    for settings, kind in (({"kind": "nested", "sigma": 9.0}, NestedDropout), ({"kind": "dropout", "p": 0.9}, None)):
        model = study.compressor(settings).attach(study.network(PLAIN, 0))
        layer = inserted(model[-1])
        assert kind is None or isinstance(layer, kind)
        assert all(inserted(part) is None for part in list(model)[:-1])
    assert study.compressor({"kind": "nested", "sigma": 9.0}).requires == frozenset()
    torch.testing.assert_close(inserted(study.compressor(NESTED).attach(study.network(PLAIN, 0))[-1]).probabilities,
                               NestedDropout(256, 30.0).probabilities)  # fmt: skip
    assert study.compressor(PLAIN) is None


def test_prefix_metrics_equal_slicing():
    result = run(NESTED)
    model, _ = study.trained(NESTED, 1000, 0, True)
    problem = noisy_digits(1000, study.RATE, "other")
    hidden = logits_of(model[:-1], problem.test)
    weight = model[-1].weight.detach()

    def sliced(k):
        return accuracy(hidden[:, :k] @ weight[:, :k].T, problem.test_labels)

    for k in (1, 16, 128):
        assert result.metrics[f"accuracy_first_{k}"] == pytest.approx(sliced(k))
    assert result.metrics["accuracy"] == pytest.approx(sliced(256))
    assert result.metrics["area"] == pytest.approx(sum(sliced(k) for k in study.PREFIXES) / 800)
    held = logits_of(model[:-1], problem.validation)
    curve = [accuracy(held[:, :k] @ weight[:, :k].T, problem.validation_labels) / 100 for k in range(1, 257)]
    k = select_prefix(torch.tensor(curve))
    assert result.metrics["prefix"] == k
    assert result.metrics["accuracy_prefix"] == pytest.approx(sliced(k))
    assert result.metrics["errors_prefix"] == round((1 - sliced(k) / 100) * 597)


def test_the_two_networks_of_a_seed_share_the_data_alone():
    first, second = (study.trained(NESTED, 3, n, False)[0] for n in (0, 1))
    again = study.trained(dict(reversed(NESTED.items())), 3, 0, False)[0]
    assert not torch.equal(first[0].weight, second[0].weight)
    assert again is first
    study._trained.cache_clear()
    assert torch.equal(study.trained(NESTED, 3, 0, False)[0][0].weight, first[0].weight)


def test_the_pair_averages_two_trained_networks():
    nets = [study.trained(NESTED, 1000, n, True)[0] for n in (0, 1)]
    problem = noisy_digits(1000, study.RATE, "other")
    mean = sum(logits_of(net, problem.test) for net in nets) / 2
    result = run({**NESTED, "stage": "pair"})
    assert result.metrics["accuracy"] == pytest.approx(accuracy(mean, problem.test_labels))


@pytest.mark.parametrize("settings", [PLAIN, NESTED, {**PLAIN, "kind": "dropout", "p": 0.5}])
def test_stage_2_starts_from_stage_1_and_leaves_it_as_it_was(settings):
    nets = [study.trained(settings, 1000, n, True)[0] for n in (0, 1)]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    frozen = {**settings, **STAGE_2, "stage2_learning_rate": 1e-9, "stage2_weight_decay": 0.0}
    pair = run({**settings, "stage": "pair"})
    assert run(frozen).metrics["accuracy"] == pytest.approx(pair.metrics["accuracy"])
    moved = run({**settings, **STAGE_2})
    assert moved.metrics["accuracy"] != pair.metrics["accuracy"]
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_co_teaching_judges_by_the_prefix_that_validation_chose():
    nets = [copy.deepcopy(study.trained(NESTED, 1000, n, True)[0]) for n in (0, 1)]
    problem = noisy_digits(1000, study.RATE, "other")
    expected = study._chosen(Pair(*nets), problem)[0]
    seen = []

    class Spy(study.CoTeaching):
        def on_batch(self, step):
            seen.append(tuple(inserted(net[-1]).eval_k for net in (step.model.a, step.model.b)))
            super().on_batch(step)

    original, study.CoTeaching = study.CoTeaching, Spy
    try:
        study.co_taught(Pair(*nets), {**NESTED, **STAGE_2}, problem, 1000, False)
    finally:
        study.CoTeaching = original
    assert seen[0] == (expected, expected)
    assert len(seen) == 16 and all(a == b and a is not None for a, b in seen)


def test_theorem_1_holds_in_all_cases():
    cases = study.decomposition_cases()
    assert len(cases) == 200 and all(case.holds for case in cases)
    assert cases[0].name == "draw 0: 2 classes, 1 states"


def test_estimands_and_regimes_say_what_the_card_says():
    def outcome(**metrics):
        return Outcome("finished", metrics)

    seed = Seed(
        1000,
        {
            "ce": outcome(errors=59.3, area=0.3), "ce_early_stop": outcome(errors=99.0, errors_early_stop=29.4),
            "compress": outcome(errors=29.4), "compress_pair": outcome(errors=23.42),
            "compress_coteaching": outcome(errors=17.44), "ce_coteaching": outcome(errors=23.42),
            "nested": outcome(errors=99.0, errors_prefix=29.4, area=0.7, accuracy_first_8=90.0, accuracy_first_16=90.0,
                              accuracy_first_32=45.0),
            "dropout": outcome(area=0.6),
            **{f"bottleneck_{k}": outcome(accuracy=90.0) for k in (8, 16, 32)},
            "ce_recipe": outcome(memorised=0.2, best_epoch_accuracy=94.0, accuracy=90.0, accuracy_first_16=45.0),
        },
        {},
    )  # fmt: skip
    found = study.STUDY.estimands
    assert found["compressed-coteaching"](seed) == pytest.approx(
        {
            "ce": math.log(59.8 / 17.94),
            "ce_early_stop": math.log(29.9 / 17.94),
            "ce_coteaching": math.log(23.92 / 17.94),
        }
    )
    assert found["compression-alone"](seed) == pytest.approx({"ce": math.log(2), "ce_early_stop": 0.0})
    assert found["nested-alone"](seed) == pytest.approx({"ce": math.log(2), "ce_early_stop": 0.0})
    assert found["ordered"](seed) == pytest.approx({"dropout": 0.1, "ce": 0.4})
    assert found["prefix-for-free"](seed) == pytest.approx(math.log(0.5) / 3)
    assert found["coteaching-boost"](seed) == pytest.approx(
        {"compress": math.log(29.9 / 17.94), "compress_pair": math.log(23.92 / 17.94)}
    )
    assert [c.holds for c in study.memorises([seed])] == [True, True]
    assert [c.holds for c in study.needs_its_width([seed])] == [True]
    assert study.error_rate(seed, "ce") == pytest.approx(0.1)


def test_a_diverged_trial_counts_as_ninety_percent_wrong(card):
    worst = protocol_of(card).worst
    seed = Seed(
        1000, {"ce": Outcome("diverged"), "nested": Outcome("diverged"), "ce_early_stop": Outcome("diverged")}, worst
    )
    for arm in seed:
        assert study.error_rate(seed, arm) == pytest.approx(0.9)
    assert seed["nested"]["area"] == 0.1
