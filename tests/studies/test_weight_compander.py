"""The weight compander's study: the problem is what the card says, arms and estimands do what they say, smoke runs all."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from wellposed import Compose, TensorLoader
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.parameters import parameter_groups
from wellposed.step import DivergenceError
from wellposed.studies.problems.digits_in_pixel_noise import _digits, convolutional_network, digits_in_pixel_noise
from wellposed.studies.training import train
from wellposed.studies.weight_compander import (
    METHODS,
    STUDY,
    WeightClipping,
    WeightNormalisation,
    _distance,
    _largest_finite,
    _overfits,
    bounded_cases,
    democracy,
    method_of,
    redundancy,
    run,
)
from wellposed.weights import WeightCompander, WeightDecay, companded, effective_number_of_weights, weight_tensors

RECIPE = {"learning_rate": 0.03, "weight_decay": 5e-4, "epochs": 1, "dropout": 0.2}
PROTOCOL = protocol_of(find_card("weight-compander"))
EXAMPLE = {"a": 1.0, "b": 0.6, "slope": 1.5, "c": 2.0, "bound": 0.2}


def trial(phase="evaluate", seed=None, **settings):
    seed = seed if seed is not None else (1000 if phase == "evaluate" else 0)
    return Trial("s", "arm", "smoke", phase, {**RECIPE, "masks": 1, **EXAMPLE, **settings}, seed, "f")


def trained(settings, seed=3, epochs=2, **changes):
    problem = digits_in_pixel_noise(seed)
    settings = {**RECIPE, **EXAMPLE, **settings, "epochs": epochs, **changes}
    loader = TensorLoader(problem.train, problem.labels, batch_size=64, shuffle=True, seed=seed)
    return train(convolutional_network(seed, settings["dropout"]), loader, settings, seed, method_of(settings)).model


def test_smoke_runs_every_arm_and_claim(tmp_path):
    study = dataclasses.replace(STUDY, exact={"bounded": partial(bounded_cases, steps=2)})
    found = run_study(study, find_card("weight-compander"), StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    assert found.study.figures(found)[0].svg.startswith("<svg")
    settings = {name: arm.settings for name, arm in found.arms.items()}
    same = ("a", "b", "learning_rate", "weight_decay", "epochs", "dropout")
    assert all(settings["linear_twin"][name] == settings["wc"][name] for name in same)
    assert settings["linear_twin"]["method"] == "linear_twin"


def test_the_arms_and_budgets_are_those_that_the_card_registers():
    shared = ["learning_rate", "weight_decay", "epochs", "dropout"]
    own = {"base": [], "wc": ["a", "b"], "linear": ["slope"], "wc_learnable": [], "wc_tight": ["c"], "clip": ["bound"]}
    for name, knobs in {**own, "weight_norm": []}.items():
        assert list(PROTOCOL.arms[name].space) == shared + knobs and PROTOCOL.arms[name].rounds == 30
    assert list(PROTOCOL.arms["wc_recipe"].space) == ["a", "b"] and PROTOCOL.arms["wc_recipe"].rounds == 30
    assert PROTOCOL.arms["base_recipe"].rounds == PROTOCOL.arms["linear_twin"].rounds == 0
    same = {k: v for k, v in PROTOCOL.arms["wc_recipe"].fixed.items() if k != "method"}
    assert same == {k: v for k, v in PROTOCOL.arms["base_recipe"].fixed.items() if k != "method"}
    assert (PROTOCOL.seeds, PROTOCOL.tuning_seeds, len(PROTOCOL.arms)) == (24, 3, 10)
    count = sum(p.numel() for p in convolutional_network(0, 0.0).parameters() if p.ndim > 1)
    assert PROTOCOL.worst["effective"] == pytest.approx(1 / count)
    assert PROTOCOL.worst["nll"] == pytest.approx(math.log(10), abs=1e-6)


# The problem


def test_parts_are_apart_and_the_noise_belongs_to_the_image():
    problem = digits_in_pixel_noise(3)
    parts = (problem.train, problem.validation, problem.test)
    assert [tuple(part.shape) for part in parts] == [(400, 1, 8, 8), (300, 1, 8, 8), (1097, 1, 8, 8)]
    rows = torch.cat(parts).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 1797 and rows.dtype == torch.float32
    again = digits_in_pixel_noise(3)
    assert torch.equal(again.train, problem.train) and torch.equal(again.test_labels, problem.test_labels)
    clean = digits_in_pixel_noise(3, noise=0.0)
    noise = (rows - torch.cat([clean.train, clean.validation, clean.test]).flatten(1)).reshape(-1)
    assert torch.equal(clean.labels, problem.labels)
    assert float(noise.std()) == pytest.approx(0.35, rel=0.01) and abs(float(noise.mean())) < 0.005
    assert {tuple(row) for row in clean.test.flatten(1).tolist()} <= {
        tuple(r) for r in _digits()[0].reshape(-1, 64).tolist()
    }
    counts = torch.bincount(problem.labels, minlength=10)
    assert int(counts.max() - counts.min()) <= 3  # stratified
    with pytest.raises(ValueError, match="noise must be >= 0, got -1"):
        digits_in_pixel_noise(0, noise=-1.0)


def test_seeds_redraw_split_noise_and_initialisation():
    first, second = digits_in_pixel_noise(0), digits_in_pixel_noise(1)
    assert not torch.equal(first.labels, second.labels) and not torch.equal(first.train, second.train)
    a, b = convolutional_network(0, 0.2), convolutional_network(1, 0.2)
    assert not torch.equal(a[0].weight, b[0].weight) and torch.equal(
        a[0].weight, convolutional_network(0, 0.2)[0].weight
    )
    assert a[7].p == 0.2 and isinstance(a[7], nn.Dropout) and isinstance(a[8], nn.Linear)


def test_tuning_measures_no_test_label():
    assert set(run(trial("tune", method="base")).metrics) == {"score"}
    result = run(trial(method="base"))
    assert {"score", "error", "effective", "pruned_accuracy", "train_accuracy"} <= set(result.metrics)
    assert set(PROTOCOL.worst) <= set(result.metrics)
    assert result.metrics["error"] == pytest.approx((result.metrics["errors"] + 0.5) / 1098)
    assert result.metrics["accuracy"] == pytest.approx(100 * (1 - result.metrics["errors"] / 1097))
    assert len(result.curves["largest"]) == 1
    assert run(trial(method="base")).metrics == result.metrics


# The arms


@pytest.mark.parametrize("name", [*METHODS, "weight_norm"])
def test_every_arm_trains_and_ends_as_a_plain_network(name):
    model = trained({"method": name})
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert set(model.state_dict()) == set(convolutional_network(0, 0.2).state_dict())
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_linear_twin_is_the_plain_network_with_a_larger_learning_rate_on_its_weights():
    """Biases and BatchNorm keep their rate: without them in motion both networks agree."""

    def run_frozen(method, rate):
        seed, settings = 2, {**RECIPE, "epochs": 2, "learning_rate": rate, "dropout": 0.0}
        problem = digits_in_pixel_noise(seed)
        model = convolutional_network(seed, 0.0).double()
        for p in model.parameters():
            p.requires_grad_(p.ndim > 1)
        loader = TensorLoader(problem.train.double(), problem.labels, batch_size=64, shuffle=True, seed=seed)
        return train(model, loader, settings, seed, method).model

    twin = run_frozen(Compose(WeightDecay(0.02), *METHODS["linear_twin"](EXAMPLE)), 0.03)
    plain = run_frozen(WeightDecay(0.02), 0.03 * (1.0 / 0.6) ** 2)
    for (name, found), expected in zip(twin.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=name)


def test_the_recipes_of_compander_and_twin_differ_in_the_bend_alone():
    wc, twin = (METHODS[name](EXAMPLE)[0] for name in ("wc", "linear_twin"))
    models = [m.attach(convolutional_network(0, 0.2)) for m in (wc, twin)]
    for one, other in zip(*(companded(m) for m in models), strict=True):
        assert one.compander.scales() == other.compander.scales() == (1.0, 0.6)
        zero = torch.zeros(1)
        assert float(one.compander.slope(zero)) == pytest.approx(float(other.compander.slope(zero)))
        assert (one.compander.fn, other.compander.fn) == ("arctan", "linear")
    linear = METHODS["linear"](EXAMPLE)[0].attach(convolutional_network(0, 0.2))
    assert companded(linear)[0].compander.scales() == (1.5, 1.0)


def test_learned_scales_start_where_the_paper_starts_them_and_v_decays():
    method = method_of({**RECIPE, "method": "wc_learnable"})
    model = method.attach(convolutional_network(0, 0.2))
    assert all([float(s.detach()) for s in one.compander.scales()] == [0.5, 1.0] for one in companded(model))
    assert not any(one.compander.decays_weight for one in companded(model))
    groups = parameter_groups(model, method.parameter_groups(model))
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {name for name, value in decays.items() if value} == {one.v_name for one in companded(model)}


@pytest.mark.parametrize("name", [*METHODS, "weight_norm"])
def test_weight_decay_shrinks_the_weights_and_nothing_else(name):
    """Biases, norms and scales are spared in every arm."""
    method = method_of({**RECIPE, **EXAMPLE, "method": name, "weight_decay": 0.01})
    model = method.attach(convolutional_network(0, 0.2))
    groups = parameter_groups(model, method.parameter_groups(model))
    decays = {n: group["weight_decay"] for group in groups for n in group["names"]}
    suffix = {"weight_norm": ".original0"}.get(name, ".original" if companded(model) else "")
    place = "parametrizations.weight" if suffix else "weight"
    assert {n for n, value in decays.items() if value == 0.01} == {f"{i}.{place}{suffix}" for i in (0, 3, 8, 10)}
    assert set(decays.values()) == {0.0, 0.01} and set(decays) == {n for n, _ in model.named_parameters()}
    strong, weak = (trained({"method": name}, weight_decay=d) for d in (0.3, 0.0))
    size = [sum(float(w.square().sum()) for w in weight_tensors(m).values()) for m in (strong, weak)]
    assert size[0] < 0.9 * size[1]


def test_the_decay_of_a_normalised_weight_is_that_of_its_length():
    method = WeightNormalisation(0.5)
    model = method.attach(nn.Sequential(nn.Linear(3, 2)))
    names = {n: w["weight_decay"] for w in method.parameter_groups(model) for n in w["names"]}
    lengths = dict(model.named_parameters())["0.parametrizations.weight.original0"]
    assert names["0.parametrizations.weight.original0"] == 0.5
    assert names["0.parametrizations.weight.original1"] == names["0.bias"] == 0.0
    torch.testing.assert_close(lengths.square().sum(), model[0].weight.square().sum())


def test_clipped_and_tight_weights_keep_their_bounds():
    clipped = trained({"method": "clip", "bound": 0.05})
    assert max(float(w.abs().max()) for w in weight_tensors(clipped).values()) == pytest.approx(0.05)
    assert isinstance(method_of({**RECIPE, "method": "clip", "bound": 0.05}).regularizers[1], WeightClipping)
    deviations = {n: float(w.std(correction=0)) for n, w in weight_tensors(convolutional_network(3, 0.2)).items()}
    tight = trained({"method": "wc_tight", "c": 1.3})
    for name, w in weight_tensors(tight).items():
        assert float(w.abs().max()) <= 1.3 * deviations[name] * math.pi / 2 * (1 + 1e-6)
    assert isinstance(METHODS["wc_tight"]({"c": 1.3})[0], WeightCompander)


def test_a_run_that_leaves_the_finite_numbers_says_so():
    with pytest.raises(DivergenceError):
        run(trial(method="base", learning_rate=1e30))


# The claims


def seed_of(**arms):
    outcomes = {
        name: Outcome("finished", metrics) if metrics else Outcome("diverged") for name, metrics in arms.items()
    }
    return Seed(1000, outcomes, PROTOCOL.worst)


def test_estimands_are_positive_where_the_paper_is_right():
    seed = seed_of(
        base={"error": 0.2, "pruned_accuracy": 60.0}, wc={"error": 0.1, "pruned_accuracy": 63.0, "effective": 0.6},
        linear={"error": 0.4}, wc_learnable={"error": 0.1}, base_recipe={"error": 0.2}, wc_recipe={"error": 0.4},
        linear_twin={"effective": 0.3},
    )  # fmt: skip
    found = {name: estimand(seed) for name, estimand in STUDY.estimands.items()}
    assert found == pytest.approx(
        {
            "improves": math.log(2), "not-a-step-size": math.log(4), "same-recipe": -math.log(2),
            "learnable": math.log(2), "democracy": math.log(2), "redundancy": 3.0,
        }
    )  # fmt: skip
    lost = seed_of(base={"error": 0.2, "pruned_accuracy": 60.0}, wc=None, linear_twin={"effective": 0.3})
    assert STUDY.estimands["improves"](lost) == pytest.approx(math.log(0.2 / 0.9))
    assert redundancy(lost) == -50.0 and democracy(lost) < -5


def test_the_regime_looks_at_the_baseline_alone():
    def seeds(fitted, error):
        return [seed_of(base={"train_accuracy": fitted, "error": error}, wc=None)] * 3

    assert [c.holds for c in _overfits("base")(seeds(99.5, 0.2))] == [True, True]
    assert [c.holds for c in _overfits("base")(seeds(98.5, 0.2))] == [False, True]
    assert [c.holds for c in _overfits("base")(seeds(99.5, 0.45))] == [True, False]
    assert [c.holds for c in _overfits("base")(seeds(99.5, 0.05))] == [True, False]


def test_the_bound_is_measured_on_finite_weights_and_cases_can_fail():
    assert _largest_finite(torch.tensor([1.0, -3.0])) == 3.0
    assert _largest_finite(torch.tensor([1.0, -3.0, math.inf, math.nan])) == 3.0
    assert _distance(torch.tensor([1.0, math.nan]), torch.tensor([1.5, math.inf])) == 0.5
    assert _distance(torch.tensor([math.nan]), torch.tensor([0.0])) != 0.0
    cases = bounded_cases(steps=3)
    assert len(cases) == 24 * 2 + 6 and all(case.holds for case in cases)
    assert {case.tolerance for case in cases} == {1e-6, 1e-5}


@pytest.mark.slow
def test_the_bound_holds_in_all_registered_cases():
    assert all(case.holds for case in bounded_cases())


def test_effective_numbers_are_those_of_the_trained_weights():
    result = run(trial(method="wc", seed=1001))
    model = trained({"method": "wc"}, seed=1001, epochs=1)
    assert result.metrics["effective"] == pytest.approx(effective_number_of_weights(weight_tensors(model).values()))
    assert result.metrics["max_weight"] == pytest.approx(result.curves["largest"][-1])
