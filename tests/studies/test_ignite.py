"""IGNITE's study: tasks are what the card says, arms and estimands do what they say, smoke runs everything."""

import math

import numpy as np
import pytest
import torch
from jaxtyping import config
from scipy.optimize import rosen
from torch import nn

from wellposed.gradients import SurrogateSharpness
from wellposed.lab.space import Choice
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.step import DivergenceError, Step
from wellposed.studies import ignite
from wellposed.studies.ignite import METHODS, STUDY, fitted_surrogate, run, searched, sharpness_transfers
from wellposed.studies.problems.offline_surrogates import InputGradientPenalty, StandardizedTask, leaky_network
from wellposed.studies.problems.offline_tasks import (
    STYBLINSKI_TANG_OPTIMUM,
    TASKS,
    ackley,
    all_sequences,
    decode_sequences,
    offline_task,
    rosenbrock,
    sequence_logits,
    styblinski_tang,
)

SETTINGS = {
    "method": "base", "surrogate": "network", "search": "ascent", "learning_rate": 1e-3, "weight_decay": 1e-2,
    "epochs": 1, "width": 16, "steps": 3, "generations": 6, "fitted_on": 30, "points": 256,
}  # fmt: skip


def trial(phase="evaluate", **settings):
    return Trial("s", "arm", "smoke", phase, {**SETTINGS, **settings}, 1000 if phase == "evaluate" else 0, "f")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ignite")
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)  # for speed; the tests of the arms check shapes
    found = run_study(STUDY, find_card("ignite"), StudyOptions("smoke", folder, engine="serial"))
    config.update("jaxtyping_disable", before)
    return found


def test_smoke_runs_every_arm_claim_and_figure(smoke):
    assert set(smoke.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in smoke.arms.values() for o in arm.outcomes)
    figures = STUDY.figures(smoke)
    assert [figure.svg.startswith("<svg") for figure in figures] == [True, True]
    assert "Tuning chose" in figures[0].caption
    STUDY.check(find_card("ignite"))


def test_ignites_recipe_stays_beside_the_bases(smoke):
    """The arms with IGNITE on another optimizer take its limit, and the base's learning rate, decay and epochs."""
    base, own = smoke.arms["base"].settings, smoke.arms["ignite"].settings
    for name in ("ensemble_ignite", "coms_ignite", "cma_ignite"):
        found = smoke.arms[name].settings
        assert found["recipe"] == "base" and found["method"] == "ignite"
        assert all(found[k] == base[k] for k in ("learning_rate", "weight_decay"))
        assert all(found[k] == own[k] for k in ("eps_ratio", "lam_target"))
    assert smoke.arms["ignite_at_base"].settings["eps_ratio"] == "half"


def test_all_tuned_arms_search_the_same_shared_knobs():
    arms = protocol_of(find_card("ignite")).arms
    shared = dict(arms["base"].space)
    assert set(shared) == {"learning_rate", "weight_decay", "epochs"}
    assert isinstance(shared["epochs"], Choice) and shared["epochs"].choices == (2, 5, 10, 20, 40)
    own = {name.removeprefix("ignite_"): part for name, part in arms["ignite"].space.items()}
    for name in ("base", "dropout", "sam", "input_gradient", "ignite2"):
        assert {k: arms[name].space[k] for k in shared} == shared and arms[name].rounds == 16
    assert {k: own[k] for k in shared} == shared and arms["ignite"].rounds == 16
    assert set(own) - set(shared) == {"eps_ratio", "lam_target"}
    tuned = {name for name, arm in arms.items() if arm.space}
    assert tuned == {"base", "dropout", "sam", "input_gradient", "ignite", "ignite2"}


def test_the_recipe_of_its_own_is_what_ignite_trains_with(monkeypatch):
    seen = []
    monkeypatch.setattr(ignite, "run_task", lambda task, s, seed, e: seen.append(s) or {"s100": 1.0, "s50": 0.0})
    run(trial("tune", recipe="own", ignite_learning_rate=0.5, ignite_weight_decay=0.25, ignite_epochs=7))
    assert [(s["learning_rate"], s["weight_decay"], s["epochs"]) for s in seen] == [(0.5, 0.25, 7)] * 5
    seen.clear()
    run(trial("tune", recipe="base", ignite_learning_rate=0.5, ignite_epochs=7))
    assert [(s["learning_rate"], s["epochs"]) for s in seen] == [(1e-3, 1)] * 5


# ── tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_drawn_by_its_seed_and_offers_only_the_worse_half(name):
    task = offline_task(name, 3)
    x, y = task.dataset()
    assert x.shape == (1500, {"rosenbrock": 8, "nk": 24}.get(name, 10)) and y.shape == (1500,)
    assert x.dtype == y.dtype == torch.float32
    torch.testing.assert_close(task.value(x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(task.score(x), task.normalize(y), rtol=1e-3, atol=1e-3)
    assert float(task.score(x).max()) < 0.75 and float(task.score(x).min()) >= -1e-6
    assert len(torch.unique(x, dim=0)) == 1500
    offline_task.cache_clear()
    assert torch.equal(offline_task(name, 3).x, x)
    other = offline_task(name, 4)
    assert not torch.equal(other.x, x) and not torch.allclose(other.value(x), y)
    far = x + 100
    assert torch.equal(task.value(far), task.value(task.repair(far)))
    with pytest.raises(ValueError, match=r"x must be \(n, "):
        task.value(x[:, :3])
    best = task.best_score()
    assert best is None if name == "diabetes" else best >= 1


def test_the_functions_are_scipys_and_the_textbooks():
    z = np.random.default_rng(0).uniform(-2, 2, (7, 5))
    np.testing.assert_allclose(rosenbrock(z), [rosen(row) for row in z])
    single = z[:1]
    root, cosine = math.sqrt(np.mean(single**2)), np.mean(np.cos(2 * np.pi * single))
    np.testing.assert_allclose(ackley(single), [-20 * math.exp(-0.2 * root) - math.exp(cosine) + 20 + math.e])
    lowest = np.roots([4, 0, -32, 5])
    real = min(lowest.real, key=lambda t: float(styblinski_tang(np.full((1, 1), t))[0]))
    assert -float(styblinski_tang(np.full((1, 1), real))[0]) == pytest.approx(STYBLINSKI_TANG_OPTIMUM, abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_optima_lie_inside_the_box_and_score_what_the_task_says(seed):
    task = offline_task("ackley", seed)
    centre = np.random.default_rng([0, seed]).uniform(-1, 1, 10)
    best = torch.from_numpy(centre / 4)[None]
    assert torch.equal(task.repair(best), best) and float(task.value(best)) == pytest.approx(task.optimum, abs=1e-9)

    task = offline_task("styblinski_tang", seed)
    best = torch.zeros(1, 10, dtype=torch.float64)
    for i in range(10):  # the sum is separable
        choices = [best.clone(), best.clone()]
        choices[0][0, i], choices[1][0, i] = -2.903534 / 5, 2.903534 / 5
        best = max(choices, key=lambda x: float(task.value(x)))
    assert float(task.value(best)) == pytest.approx(task.optimum, rel=1e-6)

    task, random = offline_task("rosenbrock", seed), np.random.default_rng([2, seed])
    while True:
        factors, triangle = np.linalg.qr(random.standard_normal((8, 8)))
        rotation = factors * np.sign(np.diag(triangle))
        if np.abs(rotation.T @ np.ones(8)).max() < 2:
            break
    best = torch.from_numpy(rotation.T @ np.ones(8) / 2)[None]
    assert torch.equal(task.repair(best), best) and float(task.value(best)) == pytest.approx(task.optimum, abs=1e-9)


def test_the_nk_landscape_is_the_mean_of_its_tables_and_its_optimum_is_enumerated():
    task = offline_task("nk", 5)
    sequences = all_sequences()
    assert len(np.unique(sequences, axis=0)) == 65_536
    assert np.array_equal(decode_sequences(sequence_logits(sequences)), sequences)
    values = task.function(sequence_logits(sequences))
    assert values.max() == task.optimum == task.high and values.min() == task.low
    assert task.best_score() == 1.0
    # Changing one letter touches four of the eight positions: the change is bounded by 4 / 8.
    changed = sequences.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 4
    difference = np.abs(task.function(sequence_logits(changed)) - values)
    assert 0 < difference.max() < 0.5
    # Two far-apart letters do not interact: positions 0 and 4 share no table of four neighbours.
    both = sequences.copy()
    far, near = both.copy(), both.copy()
    far[:, 4], near[:, 0] = (far[:, 4] + 1) % 4, (near[:, 0] + 1) % 4
    both[:, 4], both[:, 0] = far[:, 4], near[:, 0]
    f = [task.function(sequence_logits(s)) for s in (far, near, both)]
    np.testing.assert_allclose(f[2] - values, (f[0] - values) + (f[1] - values), atol=1e-12)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="name must be one of"):
        offline_task("ant", 0)


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_network_is_that_of_the_card():
    network = leaky_network(10, 0)
    assert "d-256-256-1" in protocol_of(find_card("ignite")).problem
    assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [
        (10, 256), (256, 256), (256, 1),
    ]  # fmt: skip
    assert all(m.negative_slope == 0.3 for m in network if isinstance(m, nn.LeakyReLU))


@pytest.mark.parametrize(
    "own",
    [
        {"method": "dropout", "p": 0.2},
        {"method": "sam", "sam_rho": 0.05},
        {"method": "input_gradient", "strength": 0.1},
        {"method": "ignite", "eps_ratio": 2.0, "lam_target": 5.0},
        {"method": "ignite", "eps_ratio": "half", "lam_target": 5.0},
        {"method": "ignite2", "lam_rho": 0.05},
        {"surrogate": "ensemble"},
        {"surrogate": "coms"},
        {"surrogate": "gp"},
        {"search": "cma"},
    ],
)
def test_every_arm_runs_twice_alike_and_differs_from_the_base(own):
    task = StandardizedTask.of(offline_task("ackley", 0), 256)
    settings = {**SETTINGS, **own}
    found = [searched(fitted_surrogate(task, settings, 1), task, settings, 1) for _ in range(2)]
    base = searched(fitted_surrogate(task, SETTINGS, 1), task, SETTINGS, 1)
    assert torch.equal(*found) and not torch.equal(found[0], base)


def test_ignites_limits_are_those_of_the_settings():
    method = METHODS["ignite"]({"eps_ratio": 2.0, "lam_target": 7.0})
    assert isinstance(method, SurrogateSharpness) and method.hvp == "exact" and method.rho == 0.05
    assert float(method.state.limit) == pytest.approx(0.1) and method.state.target == 7.0
    assert METHODS["ignite"]({"eps_ratio": "half", "lam_target": 5.0}).eps == "half"
    fixed = METHODS["ignite2"]({"lam_rho": 0.2})
    assert fixed.mode == "penalty" and float(fixed.multiplier) * fixed.rho == pytest.approx(0.2)


def test_the_input_gradient_penalty_is_the_mean_squared_slope():
    network, x = leaky_network(4, 0, 8), torch.randn(6, 4)
    found = InputGradientPenalty(0.7).penalty(Step(network, inputs=x))
    slopes = torch.stack([torch.autograd.functional.jacobian(lambda v: network(v)[0], one) for one in x])
    torch.testing.assert_close(found, 0.7 * slopes.square().sum(1).detach() if slopes.ndim == 2 else found)
    assert found.shape == (6,) and found.requires_grad


def test_tuning_sees_one_number_and_evaluation_the_rest():
    assert set(run(trial("tune")).metrics) == {"score"}
    metrics = run(trial()).metrics
    assert metrics["score"] == metrics["s100"] == pytest.approx(np.mean([metrics[f"s100_{t}"] for t in TASKS]))
    for task in TASKS:
        assert metrics[f"s100_{task}"] >= metrics[f"s50_{task}"] and metrics[f"norm_train_{task}"] >= 1
        assert (f"headroom_{task}" in metrics) == (task != "diabetes")


def test_a_diverged_run_scores_nothing_on_its_task_alone(monkeypatch):
    good = ignite.run_task

    def run_task(task, *rest):
        if task.task.name == "nk":
            raise DivergenceError("lost")
        return good(task, *rest)

    monkeypatch.setattr(ignite, "run_task", run_task)
    metrics = run(trial()).metrics
    assert metrics["s100_nk"] == metrics["s50_nk"] == 0 and metrics["diverged_nk"] == 1
    assert metrics["headroom_nk"] == 1 and metrics["s100_ackley"] > 0
    real = run(trial(learning_rate=1e30)).metrics
    assert real["s100"] == 0 and all(real[f"diverged_{task}"] for task in TASKS)


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def seed(**arms):
    return Seed(1000, {name: Outcome("finished", metrics) for name, metrics in arms.items()}, {})


def test_scores_are_compared_as_registered():
    found = seed(**{name: {"s100": v, "s50": v / 2} for name, v in {
        "base": 1.0, "sam": 1.1, "dropout": 1.2, "input_gradient": 0.9, "ignite": 1.3, "ignite2": 0.8, "ensemble": 1.0,
        "coms": 0.7, "cma": 0.6, "ensemble_ignite": 1.1, "coms_ignite": 0.6, "cma_ignite": 0.9,
    }.items()})  # fmt: skip
    value = {claim: estimand(found) for claim, estimand in STUDY.estimands.items() if claim != "sharpness-transfers"}
    assert value["better-designs"] == pytest.approx(0.3) and value["fixed-penalty"] == pytest.approx(-0.2)
    assert value["whole-distribution"] == pytest.approx(0.15)
    assert value["better-than-generic"] == pytest.approx({"sam": 0.2, "dropout": 0.1, "input_gradient": 0.4})
    assert value["model-agnostic"] == pytest.approx({"ensemble": 0.1, "coms": -0.1, "cma": 0.3})


def test_sharpness_transfers_is_a_mean_log_ratio_and_a_diverged_run_counts_as_the_base():
    norms = {f"norm_designs_{t}": 4.0 for t in TASKS} | {f"diverged_{t}": 0.0 for t in TASKS}
    half = {**norms, **{f"norm_designs_{t}": 2.0 for t in TASKS}}
    assert sharpness_transfers(seed(base=norms, ignite_at_base=half)) == pytest.approx(math.log(2))
    half["diverged_nk"] = 1.0
    del half["norm_designs_nk"]
    assert sharpness_transfers(seed(base=norms, ignite_at_base=half)) == pytest.approx(0.8 * math.log(2))


def test_regimes_count_the_tasks():
    metrics = {f"headroom_{t}": 0.1 for t in TASKS if t != "diabetes"} | {f"norm_train_{t}": 3.0 for t in TASKS}
    metrics |= {f"diverged_{t}": 0.0 for t in TASKS}
    regime = STUDY.regimes["better-designs"]
    assert [(c.value, c.holds) for c in regime([seed(base=metrics)])] == [(5.0, True), (5.0, True)]
    metrics |= {"headroom_nk": 0.04, "headroom_ackley": 0.0, "norm_train_nk": 1.9}
    assert [(c.value, c.holds) for c in regime([seed(base=metrics)])] == [(3.0, False), (4.0, True)]
    assert len(STUDY.regimes["sharpness-transfers"]([seed(base=metrics)])) == 1


def test_the_exact_claim_holds_in_all_its_cases():
    cases = STUDY.exact["gradient-exact"]()
    assert len(cases) == 5 * 7 and all(case.holds for case in cases)
    assert {case.tolerance for case in cases} == {1e-10, 0.2}


# ── the published configuration ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A small stand-in for the complete tables: all sequences of 4 letters, valued by how many letters are a 3."""
    from wellposed.datasets.registry import ENVIRONMENT
    from wellposed.studies.published import ignite as published
    from wellposed.studies.published.images import CHECKPOINTS

    x = np.stack(np.unravel_index(np.arange(4**4), (4,) * 4), 1)
    (tmp_path / "design-bench").mkdir()
    for name in ("tf-bind-8", "tf-bind-10"):
        np.save(tmp_path / "design-bench" / f"{name}-x.npy", x)
        np.save(tmp_path / "design-bench" / f"{name}-y.npy", (x == 3).sum(1)[:, None] + 0.01 * x.sum(1)[:, None])
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setenv(CHECKPOINTS, str(tmp_path / "checkpoints"))
    monkeypatch.setattr(published, "TASKS", {"tf-bind-8": (4, 180, 180), "tf-bind-10": (4, 128, 100)})
    monkeypatch.setattr(published, "best_designs", lambda x, y: x[y.topk(20).indices])
    return published


def test_every_published_arm_runs(tables):
    paper = protocol_of(find_card("ignite")).paper
    tables.prepare(paper)
    assert len(paper.arms) == 6 and not paper.published
    for arm in paper.arms.values():
        small = {**arm.fixed, "width": 16, "epochs": 2, "batch_size": 32, "steps": 5}
        metrics = tables.run(Trial("s", arm.name, "paper", "evaluate", small, 1000, "f")).metrics
        assert 0 <= metrics["s50"] <= metrics["s80"] <= metrics["s100"] <= 1 and metrics["norm_train"] > 0
        tuned = {**small, "epochs": 40, "learning_rate": 1e-2, "steps": 100}
        if arm.fixed["method"] == "base":
            assert tables.run(Trial("s", arm.name, "paper", "evaluate", tuned, 1000, "f")).metrics["s100"] > 0.9


def test_missing_tables_are_named(monkeypatch, tmp_path):
    from wellposed.datasets.registry import ENVIRONMENT, DatasetNotInstalled
    from wellposed.studies.published.ignite import read_table

    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(DatasetNotInstalled, match=r"tf-bind-8 needs tf-bind-8-x\.npy .* nothing is downloaded"):
        read_table("tf-bind-8")
    with pytest.raises(ValueError, match="task must be one of"):
        read_table("ant")
    (tmp_path / "design-bench").mkdir()
    np.save(tmp_path / "design-bench" / "tf-bind-8-x.npy", np.zeros((5, 8)))
    np.save(tmp_path / "design-bench" / "tf-bind-8-y.npy", np.zeros(5))
    with pytest.raises(ValueError, match="must hold all 65536 sequences"):
        read_table("tf-bind-8")
