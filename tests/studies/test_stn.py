"""STN's study: the problem is what the card says, arms and estimands do what they say, smoke runs everything."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config

from wellposed.datasets.registry import ENVIRONMENT, DatasetNotInstalled
from wellposed.hyperparameter import substituted
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError, LoopServices, Step
from wellposed.studies import stn
from wellposed.studies.problems.exact_responses import (
    affine_response,
    best_response_cases,
    gated_weights,
    no_training_gradient_cases,
    ridge_weights,
)
from wellposed.studies.problems.regularized_digits import (
    DECAYS,
    DROPOUTS,
    INITIAL,
    NAMES,
    RANGES,
    UNIFORM,
    Perceptron,
    regularized_digits,
)
from wellposed.studies.problems.self_tuned import as_numbers, self_tuned, self_tuned_problem, stn_units, strengths
from wellposed.studies.problems.strength_search import (
    _Search,
    bracket_size,
    random_sampler,
    sequential_search,
    successive_halving,
    tpe_sampler,
)
from wellposed.studies.published import stn as published
from wellposed.studies.published.images import CHECKPOINTS
from wellposed.studies.stn import ARMS, STUDY, overfits, overfits_and_tuning_helps, run

SETTINGS = {
    "stn_steps": 50, "stn_lr": 0.05, "hyper_lr": 0.05, "scale": 1.0, "tau": 1e-3, "train_steps": 5,
    "initial_dropout": 0.05, "lr": 0.05, "l2": 1e-5, "steps": 50,
}  # fmt: skip


def trial(method, phase="evaluate", **settings):
    chosen = {**SETTINGS, **settings, "method": method}
    return Trial("s", "arm", "smoke", phase, chosen, 1000 if phase == "evaluate" else 0, "f")


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Without types and shapes, which the tests of tuning/ check: a study's many steps would double in time."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def problem():
    return regularized_digits(0)


def test_smoke_runs_every_arm_and_claim(tmp_path):
    found = run_study(STUDY, find_card("stn"), StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    assert [figure.svg.startswith("<svg") for figure in STUDY.figures(found)] == [True, True]


# The card


def test_arms_spaces_and_budgets_are_those_registered():
    protocol = protocol_of(find_card("stn"))
    assert (protocol.seeds, protocol.tuning_rounds, protocol.tuning_seeds) == (12, 12, 2)
    assert protocol.worst["ce"] == pytest.approx(math.log(10))
    spaces = {name: set(arm.space) for name, arm in protocol.arms.items() if arm.space}
    tuned = {"stn_lr", "hyper_lr", "scale", "tau", "train_steps"}
    assert spaces == {
        "stn": tuned, "delta_stn": tuned, "plain": {"lr", "l2", "steps"}, "random": {"lr", "steps"},
        "tpe": {"lr", "steps"}, "halving": {"lr"},
    }  # fmt: skip
    assert {arm.rounds for arm in protocol.arms.values() if arm.space} == {12}
    ranges = {n: (p.low, p.high, p.log) for n, p in protocol.arms["stn"].space.items() if n != "train_steps"}
    assert ranges == {
        "stn_lr": (0.01, 0.2, True), "hyper_lr": (3e-3, 0.1, True), "scale": (0.3, 2.0, True), "tau": (1e-5, 1e-2, True),
    }  # fmt: skip
    assert protocol.arms["plain"].space["steps"].choices == (500, 1000, 1500, 3000)
    assert {n: a.settings_of for n, a in protocol.arms.items() if a.settings_of} == {
        "stn_half": "stn", "plain": "stn", "untuned": "plain", "random": "stn", "tpe": "stn", "halving": "stn",
        "random4": "random", "replay": "plain", "final": "plain",
    }  # fmt: skip
    methods = {arm.fixed["method"] for arm in protocol.arms.values() if "method" in arm.fixed}
    assert methods == set(ARMS)


def test_a_search_has_the_compute_of_the_tuned_stn():
    assert stn_units({"stn_steps": 1500, "train_steps": 5}) == 3540
    assert stn_units({"stn_steps": 1500, "train_steps": 2}) == 4350
    assert (bracket_size(1500, 3540), bracket_size(1500, 4350)) == (9, 12)


# The problem


def test_parts_are_apart_and_redrawn_by_the_seed(problem):
    rows = torch.cat([problem.train, problem.validation, problem.test])
    assert [len(p) for p in (problem.train, problem.validation, problem.test)] == [300, 300, 1197]
    assert len(torch.unique(rows, dim=0)) == 1797 and rows.dtype == torch.float32
    assert torch.equal(regularized_digits(0).test, problem.test)
    assert not torch.equal(regularized_digits(1).test_labels, problem.test_labels)


def test_the_gradients_by_hand_are_autograds_of_the_librarys_own_loss(problem):
    values = {
        **INITIAL,
        **dict.fromkeys(DROPOUTS, 0.3),
        "noise": 0.2,
        "smoothing": 0.1,
        "l2_layer1": 1e-2,
        "l2_layer3": 3e-2,
    }
    run_ = Perceptron(problem, 0, 0.05)
    masks = run_.masks(values)
    x, labels = problem.train[:100], problem.labels[:100]
    found = run_.gradients(x.clone(), F.one_hot(labels, 10).float(), masks, values)
    own = strengths(0.3)
    bilevel = self_tuned_problem(0, own)
    for name, h in own.items():
        h.set_(2 * torch.tensor([values[n] for n in DECAYS]) if name == "l2" else values[name])
    method, parameters = bilevel.regularizer, list(bilevel.model.parameters())
    h = x
    for layer in range(3):
        h = h * masks[layer] / (1 - 0.3)
        h = F.linear(h, parameters[2 * layer], parameters[2 * layer + 1])
        h = h.relu() if layer < 2 else h
    step = Step(bilevel.model, inputs=x, targets=labels, outputs=h)
    loss = method.loss(step).mean() + sum(method.penalty(step))
    for a, b in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for tensor, parameter in zip(run_.tensors, parameters, strict=True):
        assert torch.equal(tensor, parameter)


def test_masks_and_noise_have_the_rates_asked_for(problem):
    values = {**INITIAL, **dict(zip(DROPOUTS, (0.0, 0.25, 0.7), strict=True))}
    run_ = Perceptron(problem, 0, 0.05)
    kept = [torch.stack(parts).float().mean() for parts in zip(*(run_.masks(values) for _ in range(30)), strict=True)]
    assert kept[0] == 1
    torch.testing.assert_close(torch.stack(kept[1:]), torch.tensor([0.75, 0.3]), rtol=0, atol=0.005)
    assert not torch.equal(*(run_.masks(values)[2] for _ in range(2)))


def test_a_run_is_a_function_of_seed_and_draw_and_a_step_is_sgd_with_momentum(problem):
    runs = [Perceptron(problem, 0, 0.05, draw) for draw in (0, 0, 1)]
    for run_ in runs:
        run_.train(7, INITIAL)
    assert torch.equal(runs[0].tensors[0], runs[1].tensors[0]) and not torch.equal(
        runs[0].tensors[0], runs[2].tensors[0]
    )
    still = {**INITIAL, **dict.fromkeys(DROPOUTS, 0.0), "noise": 0.0}
    run_ = Perceptron(problem, 0, 0.05)
    leaves = [torch.nn.Parameter(t.clone()) for t in run_.tensors]
    optimizer = torch.optim.SGD(leaves, lr=0.05, momentum=0.9)
    other = Perceptron(problem, 0, 0.05)
    for _ in range(4):
        rows = other._next_rows()
        other.steps += 1
        other.tensors = [p.detach() for p in leaves]
        gradients = other.gradients(problem.train[rows], other.targets[rows], other.masks(still), still)
        for p, g in zip(leaves, gradients, strict=True):
            p.grad = g
        optimizer.step()
    for _ in range(4):
        run_.step(still)
    for a, b in zip(run_.tensors, leaves, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-7)


def test_an_epoch_sees_every_example_once(problem):
    run_ = Perceptron(problem, 0, 0.05)
    seen = []
    for _ in range(3):
        seen.append(run_._next_rows())
        run_.steps += 1
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(300))
    assert not torch.equal(run_._next_rows(), seen[0])


def test_the_checkpoint_is_that_of_the_best_validation_and_a_run_that_diverges_counts_as_uniform(problem):
    run_ = Perceptron(problem, 0, 0.05)
    run_.train(100, INITIAL)
    loss, tensors = run_.best
    assert float(F.cross_entropy(run_.logits(problem.validation, tensors), problem.validation_labels)) == loss
    run_.tensors[0].fill_(math.nan)
    run_.evaluate()
    assert run_.diverged and run_.validation == UNIFORM and run_.best[0] == loss


# The searches


@pytest.mark.parametrize("sampler", [random_sampler, tpe_sampler])
def test_searches_try_the_initial_strengths_first_and_spend_their_budget(problem, sampler):
    found = sequential_search(problem, 3, 0.05, 50, 224, sampler)
    assert (found.trials, found.units, len(found.spent)) == (4, 200, 4)
    again = sequential_search(problem, 3, 0.05, 50, 224, sampler)
    assert found.strengths == again.strengths and found.validation == again.validation
    alone = Perceptron(problem, 3, 0.05)
    alone.train(50, INITIAL)
    assert found.validation[0] == alone.validation
    assert all(a >= b for a, b in zip(found.validation, found.validation[1:], strict=False))
    search = _Search(problem, 3, 0.05, sampler(3))
    proposed = [search.propose()[1] for _ in range(12)]
    assert proposed[0] == pytest.approx(dict(INITIAL))
    for name in NAMES:
        low, high = RANGES[name]
        values = [p[name] for p in proposed[1:]]
        assert all(low <= v <= high for v in values) and len(set(values)) == 11


def test_halving_keeps_a_third_and_lets_its_runs_go_on(problem):
    found = successive_halving(problem, 0, 0.05, 90, 9 * 10 + 3 * 20 + 60)
    assert (found.trials, found.units) == (9, 210)
    assert found.run.steps == 90 or found.run.steps in (10, 30)


def test_a_diverged_run_loses_but_does_not_end_a_search(problem, monkeypatch):
    calls = iter([True, False, False])

    class Breaks(Perceptron):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if next(calls):
                self.tensors[0].fill_(math.nan)

    monkeypatch.setattr("wellposed.studies.problems.strength_search.Perceptron", Breaks)
    found = sequential_search(problem, 0, 0.05, 50, 150, random_sampler)
    assert found.validation[0] == UNIFORM and found.validation[-1] < UNIFORM and not found.run.diverged


def test_if_every_run_diverges_the_arm_has_diverged():
    with pytest.raises(DivergenceError, match="every run of the search diverged"):
        run(trial("random", lr=1e30))
    with pytest.raises(DivergenceError, match="plain run is not finite"):
        run(trial("plain", lr=1e30))
    with pytest.raises(DivergenceError):
        run(trial("stn", stn_lr=1e30))


# Self-tuning


def test_strengths_have_the_registered_starts_ranges_and_charts():
    own = strengths(0.5)
    values = as_numbers({name: h.value for name, h in own.items()})
    assert values == pytest.approx({**INITIAL, **dict.fromkeys(DROPOUTS, 0.5)}, rel=1e-4)
    assert all(h.per_example for h in own.values()) and own["l2"].chart == "exp"
    assert all((own[n].low, own[n].high) == RANGES[n] for n in NAMES if n not in DECAYS)


def test_the_librarys_decay_is_the_registered_penalty(problem):
    own = strengths(0.05)
    bilevel = self_tuned_problem(0, own)
    raw = torch.log(torch.tensor([[0.1, 0.2, 0.6], [0.2, 0.2, 0.2]]))
    with substituted({own["l2"]: raw}):
        found = bilevel.regularizer.penalty(Step(bilevel.model))[0]
    squares = torch.stack([p.square().sum() for p in bilevel.model.parameters() if p.ndim == 2])
    torch.testing.assert_close(found, 0.5 * (raw.exp() * squares).sum(1))


@pytest.mark.parametrize("delta", [False, True])
def test_a_self_tuned_run_counts_its_compute_and_records_its_schedule(problem, delta):
    found = self_tuned(problem, 0, SETTINGS, delta=delta, testing=True)
    assert found.units == (4.5 if delta else 2.0) * 50 + 2.0 * 9
    assert (not delta and found.units == stn_units(SETTINGS)) or delta
    assert found.schedule.steps == [0, *range(10, 55, 5)] and found.schedule.total == 50
    assert found.schedule.values[0] == pytest.approx(dict(INITIAL), rel=1e-4)
    assert found.schedule.values[-1] == pytest.approx({n: found.curves[n][-1] for n in NAMES})
    assert all(found.schedule.values[-1][n] != pytest.approx(INITIAL[n], rel=1e-3) for n in NAMES)
    assert 0 < found.test < UNIFORM and found.curves["validation"] == [found.validation]
    again = self_tuned(problem, 0, SETTINGS, delta=delta, testing=True)
    assert (again.test, again.schedule) == (found.test, found.schedule)


def test_replay_and_final_run_under_what_this_seeds_stn_found(problem, monkeypatch):
    schedule = self_tuned(problem, 1000, SETTINGS, delta=False).schedule
    seen = []
    step = Perceptron.step
    monkeypatch.setattr(Perceptron, "step", lambda self, values: (seen.append(dict(values)), step(self, values))[1])
    monkeypatch.setattr(stn, "regularized_digits", lambda seed: problem)
    run(trial("replay", steps=100))
    assert seen[0] == schedule.values[0] and seen[-1] == schedule.at(0.99) and len(seen) == 100
    assert seen[50] == schedule.at(0.5) != seen[0]
    seen.clear()
    run(trial("final", steps=20))
    assert all(values == schedule.values[-1] for values in seen)


# Trials


def test_tuning_measures_no_test_example(monkeypatch):
    poisoned = regularized_digits(0)
    poisoned.test.fill_(math.nan)
    monkeypatch.setattr(stn, "regularized_digits", lambda seed: poisoned)
    for method in ("plain", "random", "halving", "stn"):
        metrics = run(trial(method, "tune")).metrics
        assert "ce" not in metrics and math.isfinite(metrics["score"]) and metrics["score"] == -metrics["validation"]


def test_evaluation_measures_at_the_checkpoint_and_at_the_last_step():
    metrics = run(trial("plain", steps=150)).metrics
    assert {"ce", "last_ce", "accuracy", "validation", "units", "score"} <= set(metrics)
    assert metrics["units"] == 150 and 0 < metrics["ce"] < UNIFORM
    four = run(trial("random", budget_factor=4)).metrics
    assert (four["trials"], four["units"]) == (9, 450)


def test_estimands_are_those_of_the_card():
    ce = {"stn": 0.5, "random": 0.6, "tpe": 0.55, "halving": 0.52, "plain": 0.58, "random4": 0.49, "final": 0.57,
          "replay": 0.56, "stn_half": 0.51, "untuned": 0.59}  # fmt: skip
    outcomes = {arm: Outcome("finished", {"ce": value, "last_ce": 0.7}) for arm, value in ce.items()}
    seed = Seed(1000, {**outcomes, "delta_stn": None}, {"ce": math.log(10)})
    log = math.log
    found = {name: estimand(seed) for name, estimand in STUDY.estimands.items()}
    assert found["stn-beats-search"] == pytest.approx({"random": log(1.2), "tpe": log(1.1), "halving": log(1.04)})
    assert found["stn-beats-tuned-plain"] == pytest.approx(log(1.16))
    assert found["stn-matches-4x-search"] == pytest.approx(log(0.98))
    assert found["schedule-beats-final"] == pytest.approx(log(57 / 56))
    assert found["init-does-not-matter"] == pytest.approx(log(1.02))
    assert [c.value for c in overfits_and_tuning_helps([seed])] == pytest.approx([log(0.7 / 0.58), log(0.59 / 0.49)])
    assert [c.holds for c in overfits([seed])] == [True]
    diverged = Seed(1000, {**outcomes, "stn": Outcome("diverged")}, {"ce": math.log(10)})
    assert STUDY.estimands["stn-beats-tuned-plain"](diverged) == pytest.approx(log(0.58 / log(10)))


# The published configuration


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": images, b"labels": [i % 10 for i in range(20)]}, protocol=4))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["plain", "stn", "delta_stn"])
def test_the_published_arms_run_end_to_end(arm, cifar):
    settings = protocol_of(find_card("stn")).paper.arms[arm].fixed
    tiny = {**settings, "width": 1 / 64, "batch_size": 20, "epochs": 2, "warmup_epochs": 0}
    result = published.run(Trial("s", arm, "paper", "evaluate", tiny, 1000, "f"))
    assert 0 < result.metrics["nll"] < 5 and len(result.curves["test"]) == 2
    assert "nll" not in published.run(Trial("s", arm, "paper", "tune", tiny, 0, "f")).metrics


def test_the_published_network_has_its_fifteen_hyperparameters_and_size():
    network = published.alexnet(1 / 16, 10, 0)
    assert len([m for m in network if hasattr(m, "rate")]) == 8
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    wide = {n: tuple(16 * d if d not in (3, 10) else d for d in p.shape) for n, p in network.named_parameters()}
    assert [shape[0] for n, shape in wide.items() if n.endswith("weight")] == [64, 192, 384, 256, 256, 4096, 4096, 10]


def test_absent_images_are_named_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(DatasetNotInstalled, match="cifar-10-batches-py"):
        run_study(published.STUDY, find_card("stn"), StudyOptions("paper", tmp_path / "out", engine="serial"))


def test_colours_turn_around_grey_and_jitter_of_zero_changes_nothing():
    x = torch.rand(4, 3, 5, 5)
    full = published._turned(x, torch.full((4,), 2 * math.pi))
    torch.testing.assert_close(full, x, rtol=0, atol=1e-5)
    third = published._turned(x, torch.full((4,), 2 * math.pi / 3))
    torch.testing.assert_close(third, x.roll(1, 1), rtol=0, atol=1e-5)
    half = published._turned(x, torch.full((4,), 1.0))
    torch.testing.assert_close(half.mean(1), x.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(half.square().sum(1), x.square().sum(1), rtol=1e-5, atol=1e-5)
    jitter = published.ColourJitter(
        **{n: published.tuned(1e-6, 0.5) for n in ("hue", "contrast", "saturation", "brightness")}
    )
    step = Step(torch.nn.Identity(), inputs=x, generator=torch.Generator().manual_seed(0))
    jitter.on_batch(step)
    torch.testing.assert_close(step.inputs, x, rtol=0, atol=1e-4)


def test_the_learning_rate_drops_on_a_plateau_until_it_is_spent():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    drop, stopped = published.DropOnPlateau(), []
    losses = [1.0, *[2.0] * 70]
    for epoch, loss in enumerate(losses, start=1):
        services = LoopServices(validate=lambda loss=loss: {"loss": loss}, stop=stopped.append)
        drop.on_epoch(Step(torch.nn.Identity(), optimizer, epoch=epoch, epochs=100, services=services))
        if stopped:
            break
    assert epoch == 65 and optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


# Exact claims


def test_exact_claims_hold_in_all_listed_cases():
    cases = best_response_cases()
    assert len(cases) == 5 * 3 + 5 * 2 and all(case.holds for case in cases)
    cases = no_training_gradient_cases()
    assert len(cases) == 10 and all(case.holds for case in cases)


def test_exact_claims_can_fail():
    x, t = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    assert (gated_weights(x, t, 0.0) - ridge_weights(x, t, 0.1)).norm() > 1e-3
    hessian, mixed = torch.eye(3, dtype=torch.float64) * 2, torch.ones(3, 2, dtype=torch.float64)
    torch.testing.assert_close(affine_response(hessian, mixed, 0.1), -mixed / 2)
