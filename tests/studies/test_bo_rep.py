"""BO-REP's study: budgets are kept, hand-derived oracles are those of autograd, and arms do what their names say."""

import math
from dataclasses import replace

import pytest
import torch
from jaxtyping import config

from wellposed import BilevelProblem
from wellposed.batching import Batch
from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.numerics import flatten
from wellposed.objective import cross_entropy
from wellposed.papers.catalogue import find_card
from wellposed.studies import bo_rep as study
from wellposed.studies.bo_rep import GRID, POINTS, STUDY, iterations, make_tuner, progress, run
from wellposed.studies.problems import hyper_cleaning, recurrent_digits
from wellposed.studies.problems.hyper_cleaning import HyperCleaning, area_under_roc, cleaning_data, training_rows
from wellposed.studies.problems.recurrent_digits import RecurrentDigits, split_digits
from wellposed.studies.problems.unbounded_smoothness import CoshProblem, noise_stream
from wellposed.tuning import BOREP, SampleWeights

RATES = {"outer_lr": 0.05, "inner_lr": 0.3, "z_lr": 0.3, "decay": "cosine", "beta": 0.9}
OWN = {"borep": {"period": 2, "inner_steps": 3}, "clipped_masoba": {"clip": 1.0}}
METHODS = ("borep", "norm_masoba", "masoba", "soba", "stocbio", "clipped_masoba")
COSH = {"problem": "cosh", "radius": 4.0, "budget": 300}
RNN = {"problem": "rnn", "gain": 3.0, "budget": 120}
CLEANING = {"problem": "cleaning", "budget": 200}


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Without types and shapes, which the tests of tuning/ check: a study's many steps would double in time."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def invariants():
    """The cases of the exact claim, run once."""
    return STUDY.exact["step-and-scale"]()


def settings(method, base, **others):
    return {**base, "method": method, **RATES, **OWN.get(method, {}), **others}


def trial(chosen, phase="evaluate", seed=None):
    seed = (1000 if phase == "evaluate" else 0) if seed is None else seed
    return Trial("s", "arm", "smoke", phase, chosen, seed, "f")


def test_smoke_runs_every_arm_and_claim(tmp_path, invariants):
    once = replace(STUDY, exact={"step-and-scale": lambda: invariants})
    found = run_study(once, find_card("bo-rep"), StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    assert [figure.svg.startswith("<svg") for figure in STUDY.figures(found)] == [True, True, True]


# Budgets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [160, 301, 6000])
def test_an_arm_uses_its_budget_of_oracle_calls_and_no_step_more_would_fit(method, budget):
    for own in [{"period": i, "inner_steps": n} for i in (2, 5) for n in (1, 3, 5)] if method == "borep" else [{}]:
        chosen = settings(method, {**COSH, "budget": budget, "radius": 1.0}, **own)
        total = iterations(chosen)
        if budget == 6000:
            assert total == {"stocbio": 272}.get(method, 1500) or method == "borep"
            continue
        problem, calls = CoshProblem([0], 1.0), []
        tuner = make_tuner({**chosen, "outer_lr": 1e-3, "decay": "none"}, problem, 1)
        train, validation = noise_stream([0], 0), noise_stream([0], 1)
        for _ in range(total + 1):
            tuner.step(train, validation)
            calls.append(problem.calls)
        assert calls[-2] <= budget < calls[-1], (method, own, calls[-2:])


# The problems


def flat(found):
    parts = [found] if isinstance(found, torch.Tensor | dict) else list(found)
    return flatten([t for part in parts for t in (part.values() if isinstance(part, dict) else [part])]).detach()


def oracles(problem, vector, train, validation):
    return [
        ("inner_value_and_grad", (train,)),
        ("hvp", (vector, train)),
        ("mixed_vjp", (vector, train)),
        ("second_derivatives", (vector, train)),
        ("outer_grads", (validation,)),
    ]


@pytest.mark.parametrize("name", ["cosh", "rnn", "cleaning"])
def test_hand_derived_oracles_are_those_of_autograd_and_are_counted(name):
    torch.manual_seed(0)
    if name == "cosh":
        problem = CoshProblem([0, 1], 2.0)
        train, validation = next(noise_stream([0, 1], 0)), next(noise_stream([0, 1], 1))
    elif name == "rnn":
        parts = split_digits(0)
        problem = RecurrentDigits(1.5, 0)
        train, validation = (next(recurrent_digits.batches(part, 0)) for part in parts[:2])
    else:
        problem = HyperCleaning(cleaning_data(0))
        train, validation = next(training_rows(1000, 0)), 0
    with torch.no_grad():
        for tensor in problem.params.values():
            tensor.normal_()
        if name == "cleaning":
            problem.weight.raw.normal_()
    vector = {n: torch.randn_like(p) for n, p in problem.params.items()}
    for oracle, arguments in oracles(problem, vector, train, validation):
        before = vars(problem.counts).copy()
        own = flat(getattr(problem, oracle)(*arguments))
        after = vars(problem.counts).copy()
        reference = flat(getattr(BilevelProblem, oracle)(problem, *arguments))
        again = vars(problem.counts)
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
        assert {k: after[k] - before[k] for k in before} == {k: again[k] - after[k] for k in before}


def test_phi_is_the_outer_loss_at_the_lower_solution():
    problem = CoshProblem([5], 1.0)
    with torch.no_grad():
        problem.params["y"].copy_(problem._image(problem.hypers["x"].raw))
    zero = torch.zeros(1, 10, dtype=torch.float64)
    assert float(problem.inner_value_and_grad(zero)[1]["y"].abs().max()) < 1e-12
    assert float(problem.outer_grads(zero)[0]) == pytest.approx(float(problem.value()), rel=1e-12)


def test_a_problem_is_drawn_by_its_seed_whatever_runs_beside_it():
    assert torch.equal(CoshProblem([7, 8], 1.0).mixing[1], CoshProblem([8], 1.0).mixing[0])
    grid = CoshProblem([8], 1.0, repeat=3)
    assert grid.centre.shape == (3, 10) and torch.equal(grid.centre[0], grid.centre[2])
    assert not torch.equal(next(noise_stream([1], 0)), next(noise_stream([1], 1)))
    blocks = [next(stream) for stream in (noise_stream([3], 0),) for _ in range(1030)]
    assert abs(float(torch.cat(blocks).std()) - 0.1) < 2e-3


def test_parts_of_the_digits_are_apart_and_redrawn():
    parts = split_digits(0)
    assert [part.inputs.shape for part in parts] == [(16, n, 4) for n in (600, 400, 797)]
    rows = torch.cat([part.inputs.transpose(0, 1).reshape(-1, 64) for part in parts])
    assert len(rows) == 1797 and not torch.equal(
        rows, torch.cat([p.inputs.transpose(0, 1).reshape(-1, 64) for p in split_digits(1)])
    )
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().data / 16).float()
    assert torch.equal(rows.sum(1).sort().values, pixels.sum(1).sort().values)  # each image once, row by row
    data = cleaning_data(0)
    assert [len(x) for x in (data.train, data.validation, data.selection, data.test)] == [1000, 50, 247, 500]
    wrong = data.labels.argmax(1) != data.truth.argmax(1)
    assert torch.equal(wrong, data.wrong) and int(wrong.sum()) == 400


def test_the_solved_head_has_no_gradient():
    torch.manual_seed(0)
    problem = RecurrentDigits(1.0, 0)
    train = split_digits(0)[0]
    with torch.no_grad():
        problem.head.copy_(recurrent_digits.solved_head(problem.features(train.inputs), train.targets))
    gradient = problem.inner_grad((train.inputs, train.targets))["head"]
    assert float(gradient.abs().max()) < 1e-4


def test_cleaning_is_what_sample_weights_do_in_a_network():
    """The study's loop and the library's own path, `SampleWeights` under `from_regularizer`, step for step."""
    data = cleaning_data(0)
    problem = HyperCleaning(data)
    model = torch.nn.Linear(65, 10, bias=False)
    torch.nn.init.zeros_(model.weight)

    class Decay(SampleWeights):
        def penalty(self, step):
            return hyper_cleaning.PENALTY * step.model.weight.square().sum()

    other = BilevelProblem.from_regularizer(model, Decay(1000, init=hyper_cleaning.START), cross_entropy)
    rows = training_rows(1000, 3)
    taken = [next(rows) for _ in range(200)]
    batches = [Batch(data.train[i], data.labels[i].argmax(1), i) for i in taken]
    clean = Batch(data.validation, data.validation_labels.argmax(1))
    tuners = [BOREP(p, 1.0, 0.5, 0.3, refine_steps=10) for p in (problem, other)]
    feeds = [(iter(taken), iter(int, 1)), (iter(batches), iter([clean] * 50))]
    for tuner, feed in zip(tuners, feeds, strict=True):
        for _ in range(25):
            tuner.step(*feed)
    torch.testing.assert_close(problem.head, model.weight, rtol=1e-4, atol=1e-5)
    raw = next(iter(other.hypers.values())).raw
    torch.testing.assert_close(problem.weight.raw, raw, rtol=1e-3, atol=1e-4)
    assert float((raw - 1.0).abs().max()) > 1e-2


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    torch.manual_seed(0)
    scores, positive = torch.randint(0, 9, (60,)).float(), torch.rand(60) < 0.4
    assert area_under_roc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


# The arms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", [COSH, RNN, CLEANING], ids=["cosh", "rnn", "cleaning"])
def test_an_arm_is_what_its_name_says(method, base):
    problem = CoshProblem([0], 1.0)
    tuner = make_tuner(settings(method, base), problem)
    expected = {
        "borep": ("normalized", 0.9, 2, 3, 50, "gauss_seidel"),
        "norm_masoba": ("normalized", 0.9, 1, 1, 0, "jacobi"),
        "masoba": ("plain", 0.9, 1, 1, 0, "jacobi"),
        "soba": ("plain", 0.0, 1, 1, 0, "jacobi"),
        "clipped_masoba": ("clipped", 0.9, 1, 1, 0, "jacobi"),
    }
    if method == "stocbio":
        assert (tuner.inner_steps, tuner.neumann_steps) == (10, 10)
    else:
        found = tuner.mode, tuner.beta, tuner.period, tuner.inner_steps, tuner.refine_steps, tuner.order
        assert found == expected[method]
    assert tuner.schedule == "cosine" and tuner.total_steps == iterations(settings(method, base))
    assert (tuner.outer_lr, tuner.inner_lr) == (0.05, 0.3)
    assert make_tuner(settings(method, base, decay="none"), problem).schedule is None


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="method must be an arm of the card, got 'adam'"):
        make_tuner(settings("adam", COSH), CoshProblem([0], 1.0))


def test_a_tuning_trial_of_the_closed_form_is_the_mean_of_four_draws():
    chosen = settings("borep", {**COSH, "budget": 120})
    together = run(trial(chosen, "tune")).metrics
    values = []
    for seed in range(4):
        problem = CoshProblem([seed], 4.0)
        start = problem.value()
        tuner, train, validation = make_tuner(chosen, problem, 1), noise_stream([seed], 0), noise_stream([seed], 1)
        for _ in range(iterations(chosen)):
            tuner.step(train, validation)
        values.append(float(progress(problem.value(), start)))
    assert together["score"] == pytest.approx(-sum(values) / 4, rel=1e-9)
    assert set(together) == {"score", "q", "no_progress"}


def test_a_run_that_leaves_the_numbers_counts_as_no_progress():
    result = run(trial(settings("masoba", COSH, outer_lr=3.0, decay="none")))
    assert result.metrics["no_progress"] == 1.0
    assert result.metrics["q"] == pytest.approx(result.metrics["start"])
    assert len(result.curves["q"]) == POINTS and all(map(math.isfinite, result.curves["q"]))


def test_one_diverged_draw_does_not_end_the_others():
    chosen = settings("masoba", COSH, outer_lr=3e-4, decay="none")
    share = run(trial(chosen, "tune")).metrics["no_progress"]
    assert 0 < share < 1


@pytest.mark.parametrize("base, worst", [(RNN, {"ce": math.log(10)}), (CLEANING, {"accuracy": 10.0, "auroc": 0.5})])
def test_divergence_counts_as_the_worst_value(monkeypatch, base, worst):
    monkeypatch.setattr(study, "steps_of", lambda *_: iter(()))
    metrics = run(trial(settings("masoba", base))).metrics
    assert metrics["diverged"] == 1.0
    assert {name: metrics[name] for name in worst} == pytest.approx(worst)


def test_the_grid_runs_every_learning_rate_on_a_tuning_seed():
    chosen = settings("masoba", COSH, grid=True)
    result = run(trial(chosen, seed=1006))
    assert len(GRID) == 14 and GRID[0] == 1e-6 and GRID[-1] == 3.0
    assert result.curves == run(trial(chosen, seed=1002)).curves  # both are tuning seed 2
    for place, value in ((0, GRID[0]), (7, GRID[7])):
        problem = CoshProblem([2], 4.0)
        tuner, train, validation = (
            make_tuner({**chosen, "outer_lr": value}, problem, 1), noise_stream([2], 0), noise_stream([2], 1),
        )  # fmt: skip
        start = problem.value()
        for _ in study.steps_of(tuner, iterations(chosen), train, validation):
            pass
        assert result.curves["grid"][place] == pytest.approx(float(progress(problem.value(), start)), rel=1e-9)


@pytest.mark.parametrize("base", [RNN, CLEANING], ids=["rnn", "cleaning"])
def test_tuning_sees_no_test_example(monkeypatch, base):
    real_split, real_data = recurrent_digits.split_digits, hyper_cleaning.cleaning_data

    def poisoned_split(seed):
        train, validation, test = real_split(seed)
        return [train, validation, replace(test, inputs=torch.full_like(test.inputs, math.nan))]

    def poisoned_data(seed):
        data = real_data(seed)
        return replace(
            data, test=torch.full_like(data.test, math.nan), test_labels=torch.full_like(data.test_labels, math.nan)
        )

    clean = run(trial(settings("borep", base), "tune")).metrics
    monkeypatch.setattr(recurrent_digits, "split_digits", poisoned_split)
    monkeypatch.setattr(hyper_cleaning, "cleaning_data", poisoned_data)
    assert run(trial(settings("borep", base), "tune")).metrics == clean


@pytest.mark.parametrize("base", [COSH, RNN, CLEANING], ids=["cosh", "rnn", "cleaning"])
def test_a_trial_is_a_function_of_its_seed(base):
    first, again, other = (run(trial(settings("borep", base), seed=s)) for s in (1000, 1000, 1001))
    assert first.metrics == again.metrics and first.curves == again.curves
    assert first.metrics["score"] != other.metrics["score"]
    assert all(len(curve) == POINTS for curve in first.curves.values())


def test_without_cleaning_noisy_labels_cost_accuracy():
    metrics = run(trial({"problem": "cleaning", "method": "no_cleaning"}, "tune")).metrics
    assert metrics["accuracy_clean_labels"] > metrics["accuracy"] + 3
    assert metrics["error"] == pytest.approx(100 - metrics["accuracy"])


# Card, claims, regimes


def test_every_arm_searches_the_registered_space():
    arms = protocol_of(find_card("bo-rep")).arms
    ranges = {"cosh": (1e-6, 3.0), "rnn": (1e-3, 10.0), "cleaning": (1e-2, 100.0)}
    for arm in arms.values():
        if arm.role == "witness":
            assert not arm.space
            continue
        kind, method = arm.fixed["problem"], arm.fixed["method"]
        assert (arm.space["outer_lr"].low, arm.space["outer_lr"].high) == ranges[kind]
        assert all((arm.space[n].low, arm.space[n].high) == (0.03, 1.0) for n in ("inner_lr", "z_lr"))
        assert set(arm.space["decay"].choices) == {"none", "cosine"}
        assert ("beta" in arm.space) == (method not in ("soba", "stocbio"))
        assert ({"period", "inner_steps"} <= set(arm.space)) == (method == "borep")
        assert ("clip" in arm.space) == (method == "clipped_masoba")
        assert arm.rounds == (24 if kind == "cosh" else 12)
        assert arm.fixed["budget"] == (2000 if kind == "rnn" else 6000)
    by_problem = {kind: sum(a.fixed.get("problem") == kind for a in arms.values()) for kind in ranges}
    assert by_problem == {"cosh": 12, "rnn": 6, "cleaning": 7}
    assert arms["masoba_grid"].settings_of == "masoba_r4"


def seeds_of(**metrics):
    outcomes = {arm: Outcome("finished", metrics=found) for arm, found in metrics.items()}
    return [Seed(1000, outcomes, {})]


def test_estimands_are_positive_where_bo_rep_is_better():
    arms = {}
    for radius in (4, 8):
        arms |= {f"{m}_r{radius}": {"q": 1.0 + radius} for m in METHODS}
        arms[f"borep_r{radius}"] = {"q": 0.5}
    arms |= {f"{m}_rnn": {"ce": 0.5} for m in METHODS} | {"borep_rnn": {"ce": 0.25}}
    arms |= {f"{m}_cleaning": {"error": 8.0} for m in METHODS} | {"borep_cleaning": {"error": 6.0}}
    (seed,) = seeds_of(**arms)
    found = {claim: estimand(seed) for claim, estimand in STUDY.estimands.items()}
    assert found["unbounded-smoothness"] == {"masoba": 4.5, "soba": 4.5, "stocbio": 4.5}
    assert found["beats-clipping"] == {"r = 4": 4.5, "r = 8": 8.5}
    assert found["refinement-and-periods"] == {"r = 4": 4.5, "r = 8": 8.5}
    assert found["rnn-representation"] == pytest.approx(dict.fromkeys(("masoba", "soba", "stocbio"), math.log(2)))
    assert found["rnn-beats-clipping"] == pytest.approx({"clipped_masoba": math.log(2)})
    assert found["hyper-cleaning"] == {"masoba": 2.0, "stocbio": 2.0}


@pytest.mark.parametrize(
    "regime, arm, good, bad",
    [
        (study.curvature_explodes, "masoba_grid", {"exploded": 0.3}, {"exploded": 0.29}),
        (study.gradients_explode, "masoba_rnn", {"norm_ratio": 5.0}, {"norm_ratio": 4.9}),
        (
            study.noise_hurts, "no_cleaning",
            {"accuracy": 89.0, "accuracy_clean_labels": 94.0}, {"accuracy": 89.5, "accuracy_clean_labels": 94.0},
        ),
    ],
)  # fmt: skip
def test_regimes_hold_from_their_threshold_on(regime, arm, good, bad):
    assert [c.holds for c in regime(seeds_of(**{arm: good}))] == [True]
    assert [c.holds for c in regime(seeds_of(**{arm: bad}))] == [False]


def test_the_exact_claim_holds_in_every_case(invariants):
    assert len(invariants) == 3 * 5 * 3 and all(case.holds for case in invariants)


@pytest.mark.slow
def test_on_the_unbounded_problem_normalised_steps_go_where_plain_ones_leave_the_numbers():
    laptop = {**COSH, "budget": 6000}
    normalised = run(trial(settings("borep", laptop), "tune")).metrics
    plain = run(trial(settings("masoba", laptop), "tune")).metrics
    assert normalised["no_progress"] == 0.0 and normalised["q"] < 0.5
    assert plain["no_progress"] > 0.5
