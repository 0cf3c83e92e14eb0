"""MAID's study: the problems are what the card says, arms and estimands do what they say, smoke runs everything."""

import math
import statistics

import pytest
import torch
from jaxtyping import config

from wellposed.lab.study import Seed, protocol_of
from wellposed.lab.study_run import StudyOptions, run_study
from wellposed.lab.trial import Outcome, Trial
from wellposed.papers.catalogue import find_card
from wellposed.studies.maid import (
    METHODS,
    RIVALS,
    STUDY,
    advance,
    cost_to_gap,
    last_accepted,
    logistic_learnable,
    make_tuner,
    run,
    sensitive_and_solvable,
    worth_learning,
)
from wellposed.studies.problems.bilevel_reference import (
    denoising_reference,
    search_by_tpe,
)
from wellposed.studies.problems.decoupled_quadratic import DecoupledQuadratic
from wellposed.studies.problems.log_cosh import STEEPEST, LogCosh
from wellposed.studies.problems.maid_certificates import bound_cases, certificates, descent_cases, exact_runs
from wellposed.studies.problems.maid_grid import ACCURACIES, GRID
from wellposed.studies.problems.variational_denoising import photographs
from wellposed.studies.problems.weighted_logistic import WeightedLogistic
from wellposed.tuning import HOAG, MAID, FixedArmijo, FixedStep

F64 = torch.float64
PROTOCOL = protocol_of(find_card("maid"))
SMALL = dict(PROTOCOL.smoke)
"""What the smoke run has: its reference solutions are then at hand."""


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Without types and shapes, which the tests of tuning/ check: a study's many steps would double in time."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def trial(arm, phase="evaluate", seed=None, **changes):
    seed = (1000 if phase == "evaluate" else 0) if seed is None else seed
    return Trial("s", arm, "smoke", phase, {**PROTOCOL.arms[arm].fixed, **SMALL, **changes}, seed, "f")


def test_smoke_runs_every_arm_and_claim(tmp_path):
    found = run_study(STUDY, find_card("maid"), StudyOptions("smoke", tmp_path, engine="serial"))
    assert set(found.values) == set(STUDY.estimands)
    assert all(o.status == "finished" for arm in found.arms.values() for o in arm.outcomes)
    drawn = STUDY.figures(found)
    assert len(drawn) == 3 and all(figure.svg.startswith("<svg") for figure in drawn)


# The problems


@pytest.mark.parametrize("condition", [10.0, 30.0, 100.0])
def test_the_quadratic_problem_has_the_conditions_that_the_card_states(condition):
    problem = DecoupledQuadratic(3, condition)
    assert problem.L / problem.mu == pytest.approx(condition**2, rel=1e-8)
    upper = torch.linalg.eigvalsh(problem.mixing.T @ problem.mixing)
    torch.testing.assert_close(upper, torch.tensor([1.0, 1.67**2, 2.33**2, 9.0], dtype=F64))
    theta = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    problem.f(theta).backward()
    torch.testing.assert_close(theta.grad, problem.gradient(theta.detach()))
    # f* is reached where the inner solution meets the target.
    best = theta.detach() - torch.linalg.solve(problem.mixing.T @ problem.mixing, theta.grad)
    assert float(problem.f(best)) == pytest.approx(problem.f_star, abs=1e-12)


def test_the_quadratic_problem_is_the_one_of_eighty_equations():
    """The reduced problem against one that is built from the same numbers in full."""
    problem = DecoupledQuadratic(0, 10.0)
    g = torch.Generator().manual_seed(0)

    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, 4, generator=g, dtype=F64)).Q

    A1 = orthonormal(80)
    A2 = orthonormal(80) @ torch.diag(torch.logspace(0, 1, 4, dtype=F64)) @ orthonormal(4).T
    M = orthonormal(4) @ torch.diag(torch.tensor([1.0, 1.67, 2.33, 3.0], dtype=F64)) @ orthonormal(4).T
    A3 = A2 @ M
    x1, x2, planted = torch.rand(3, 4, generator=g, dtype=F64)
    noise = 0.01 * torch.randn(2, 80, generator=g, dtype=F64)
    b1, b2 = A1 @ x1 + noise[0], A2 @ x2 + A3 @ planted + noise[1]
    theta = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=F64)
    x = torch.linalg.lstsq(A2, (b2 - A3 @ theta)[:, None]).solution[:, 0]
    torch.testing.assert_close(problem.minimiser(theta), x)
    assert float(problem.f(theta)) == pytest.approx(float(0.5 * (A1 @ x - b1).square().sum()), rel=1e-12)
    lower = problem.levels().lower
    slope = A2.T @ (A2 @ x1 + A3 @ theta - b2)
    torch.testing.assert_close(lower.gradient(x1[None], theta)[0], slope)


@pytest.mark.parametrize(("condition", "eps"), [(10.0, 1.0), (30.0, 1e-4), (100.0, 1e-8)])
def test_the_table_holds_the_iterates_of_the_accelerated_method(condition, eps):
    problem = DecoupledQuadratic(1, condition)
    tabulated, running = (FixedStep(problem.levels(flag), eps, 1.0) for flag in (True, False))
    theta = torch.tensor([0.5, 2.0, -1.0, 0.1], dtype=F64)
    start = torch.ones(1, 4, dtype=F64)
    a, b = (tuner.solve_at(theta, start, eps) for tuner in (tabulated, running))
    assert tabulated.work == running.work
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.eps, b.eps, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["maid", "fixed_armijo", "hoag_geometric"])
def test_a_run_on_the_table_counts_as_the_real_solver(method):
    problem = DecoupledQuadratic(2, 30.0)
    found = []
    for tabulated in (True, False):
        tuner = make_tuner(method, problem.levels(tabulated), 0.1, 1.0, 0.3)
        advance(tuner, 1500)
        found.append((tuner.history, tuner.u))
    # Rounding may move the end of a solve by an iteration; the steps are the same.
    (table, u), (real, v) = found
    assert [i.n_backtrack for i in table[:-1]] == [i.n_backtrack for i in real[:-1]]
    assert table[-2].units == pytest.approx(real[-2].units, rel=0.02)
    torch.testing.assert_close(u, v, rtol=0, atol=1e-4)


def test_the_curved_problem_s_constants_are_bounds():
    problem = LogCosh(0)
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
    assert problem.slope(problem.minimiser(theta), theta).norm() < 1e-12
    lower = problem.levels().lower
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        x, y = torch.randn(2, 5, generator=g, dtype=F64)
        (Hx, Jx), (Hy, Jy) = problem.second(x, theta), problem.second(y, theta)
        distance = (x - y).norm()
        assert torch.linalg.matrix_norm(Jx - Jy, 2) <= lower.L_J.upper({}) * distance
        inverses = torch.linalg.inv(Hx) - torch.linalg.inv(Hy)
        assert torch.linalg.matrix_norm(inverses, 2) <= lower.L_Hinv.upper({}) * distance
        assert lower.mu.lower({}) <= torch.linalg.eigvalsh(Hx)[0] and torch.linalg.eigvalsh(Hx)[-1] <= lower.L.upper({})
    t = torch.linspace(-3, 3, 100_001, dtype=F64)
    assert float((1 / t.cosh() ** 2).diff().abs().max() / (t[1] - t[0])) == pytest.approx(STEEPEST, rel=1e-6)
    numeric = torch.autograd.functional.jacobian(lambda s: problem._objective(theta.new_ones(5), {"theta": s}), theta)
    assert numeric.isfinite().all()


def test_logistic_regression_is_split_and_its_moduli_hold():
    problem = WeightedLogistic(0)
    assert [len(x) for x in (problem.inputs, problem.validation, problem.test)] == [600, 400, 797]
    rows = torch.cat([problem.inputs, problem.validation, problem.test])
    assert float(rows[:, -1].min()) == 1.0 and float(rows[:, :-1].max()) == 1.0
    assert not torch.equal(WeightedLogistic(1).labels, problem.labels)
    levels = problem.levels()
    assert levels.lower.u0.shape == (650,) and bool((levels.lower.u0 == -3.0).all())
    small = WeightedLogistic(0, train=40, validation=30)
    x = 0.3 * torch.randn(10, 65, generator=torch.Generator().manual_seed(0), dtype=F64)
    lower = small.levels().lower
    u = lower.u0
    eye = torch.eye(650, dtype=F64).reshape(650, 10, 65)
    curvature = lower.curvature(x[None], u)
    H = torch.stack([curvature.hvp(row[None]).reshape(-1) for row in eye])
    spectrum = torch.linalg.eigvalsh(H)
    values = lower.values(u)
    assert lower.mu.lower(values) <= float(spectrum[0]) + 1e-12
    assert float(spectrum[-1]) <= lower.L.upper(values)


def test_photographs_are_cut_averaged_and_noisy():
    problem = photographs(0)
    assert problem.clean.shape == (4, 48, 48) and problem.clean.dtype == F64
    assert float((problem.noisy - problem.clean).std()) == pytest.approx(0.1, rel=0.03)
    assert float(problem.clean.min()) >= 0 and float(problem.clean.max()) <= 1
    assert not torch.equal(problem.clean, problem.fresh_clean)
    assert not torch.equal(photographs(1).clean, problem.clean)
    assert torch.equal(photographs(0).noisy, problem.noisy)
    with pytest.raises(ValueError):
        photographs(0, size=400)


def test_denoising_s_closed_forms_are_autograd_s_and_its_moduli_hold():
    problem = photographs(3, size=6)
    levels = problem.levels()
    lower = levels.lower
    u = torch.tensor([-1.0, -2.0], dtype=F64)
    values = lower.values(u)
    x = problem.noisy
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(problem._objective(leaf, values).sum(), leaf)[0]
    torch.testing.assert_close(lower.gradient(x, u), expected)
    H = torch.func.hessian(lambda z: problem._objective(z.reshape(4, 6, 6), values)[0])(x.reshape(-1))[:36, :36]
    spectrum = torch.linalg.eigvalsh(H)
    assert float(spectrum[0]) >= 1.0 - 1e-12
    assert float(spectrum[-1]) <= float(lower.L.upper(values))


def test_the_reference_is_no_worse_than_any_arm_and_the_search_starts_where_they_do():
    problem = photographs(2, size=8)
    reference = denoising_reference(problem)
    start = torch.tensor([-5.0, -5.0], dtype=F64)
    assert reference.f_start == problem.f(start) and reference.gap(reference.f_start) == 1.0
    assert problem.f(start) > problem.f(torch.tensor([-2.0, -5.0], dtype=F64)) >= reference.f_star - 1e-3
    found = search_by_tpe(problem, 0, 1)
    assert found.raw.tolist() == [-5.0, -5.0]
    more = search_by_tpe(problem, 0, 12)
    assert reference.f_star - 1e-3 <= more.f < found.f and more.units > found.units
    probe = FixedStep(problem.levels(), 1e-8, 1e-300)
    probe.run(max_outer=1)
    assert reference.natural == pytest.approx(1 / float(probe.z.abs().max()), rel=1e-4)


# The arms


def test_the_grid_is_the_one_of_the_card_and_every_arm_runs_it():
    assert len(GRID) == 20 and {eps for eps, _ in GRID} == {10.0, 0.1, 1e-3, 1e-5} == set(ACCURACIES)
    names = {f"{problem}_{method}" for problem in ("denoising", "logistic", "quadratic") for method in METHODS}
    assert set(PROTOCOL.arms) == names | {"denoising_tpe50"}
    budgets = {"denoising": 1500, "logistic": 2500, "quadratic": 200_000}
    for arm in PROTOCOL.arms.values():
        assert arm.rounds == 0 and not arm.space
        if arm.name != "denoising_tpe50":
            assert arm.fixed["budget"] == budgets[arm.fixed["problem"]]
            assert arm.name == f"{arm.fixed['problem']}_{arm.fixed['method']}"


def test_the_arms_are_what_their_names_say():
    problem = DecoupledQuadratic(0, 10.0)
    made = {m: make_tuner(m, problem.levels(), 0.5, 3.0, 2.0) for m in METHODS}
    assert isinstance(made["maid"], MAID) and not made["maid"].accelerate
    assert made["maid"]._first == {"eps": 0.5, "delta": 0.5, "alpha": 6.0}
    assert made["maid_accelerated"].accelerate
    for name in ("geometric", "quadratic", "cubic"):
        tuner = made[f"hoag_{name}"]
        assert isinstance(tuner, HOAG) and (tuner.schedule, tuner.eps0, tuner.step_scale) == (name, 0.5, 3.0)
    assert type(made["fixed_step"]) is FixedStep and type(made["fixed_armijo"]) is FixedArmijo
    assert (made["fixed_step"].eps, made["fixed_step"].delta, made["fixed_step"].alpha) == (0.5, 0.5, 6.0)
    assert {tuner.max_step for tuner in made.values()} == {2.0}
    assert made["maid"].check_descent
    assert not make_tuner("maid", photographs(0, 6).levels(), 0.1, 1.0, 1.0).check_descent
    assert not make_tuner("maid", WeightedLogistic(0, 40, 30).levels(), 0.1, 1.0, 1.0).check_descent


def test_a_run_that_cannot_finish_keeps_the_last_accepted_point():
    tuner = make_tuner("fixed_step", photographs(0, 6).levels(), 1e-3, 10.0, 1.0)
    tuner.max_inner = 40
    advance(tuner, 1500)
    assert len(tuner.history) > 3 and tuner.work.units < 1000  # some steps were taken, and the next could not be
    u, x = last_accepted(tuner)
    assert torch.equal(u, tuner.point.u) and torch.equal(x, tuner.point.x)
    untouched = make_tuner("maid", photographs(0, 6).levels(), 1e-3, 1.0, 1.0)
    advance(untouched, 2)
    assert torch.equal(last_accepted(untouched)[0], torch.full((2,), -5.0, dtype=F64))


@pytest.mark.parametrize("arm", ["denoising_maid", "logistic_hoag_cubic", "quadratic_fixed_step", "denoising_tpe50"])
def test_a_trial_is_a_function_of_its_seed_and_tuning_sees_no_test_data(arm):
    budget = 2000 if arm.startswith("quadratic") else SMALL["budget"]
    first, again = run(trial(arm, budget=budget)), run(trial(arm, budget=budget))
    assert first.metrics == again.metrics and first.curves == again.curves
    tuning = run(trial(arm, "tune", seed=3, budget=budget))
    tested = {"psnr", "psnr_worst", "psnr_best", "test_loss", "accuracy", "accuracy_worst", "accuracy_best"}
    assert not tested & set(tuning.metrics)
    assert tuning.metrics != first.metrics


def test_the_metrics_of_the_grid_are_those_of_its_final_losses():
    result = run(trial("denoising_maid"))
    metrics, losses, gaps = result.metrics, result.curves["loss"], result.curves["gap"]
    assert len(losses) == 3  # every seventh of twenty settings
    logs = [math.log(loss) for loss in losses]
    assert metrics["spread"] == pytest.approx(max(logs) - min(logs))
    assert metrics["mean_log_loss"] == pytest.approx(statistics.fmean(logs))
    assert metrics["median_log_loss"] == pytest.approx(statistics.median(logs))
    assert metrics["success"] == statistics.fmean(gap <= 0.05 for gap in gaps)
    expected = [(loss - metrics["f_star"]) / (metrics["f_start"] - metrics["f_star"]) for loss in losses]
    assert gaps == pytest.approx(expected)
    assert "success_10" in metrics


def test_cost_is_counted_to_the_gap_and_is_the_budget_where_it_is_never_reached():
    problem = DecoupledQuadratic(0, 10.0)
    tuner = FixedStep(problem.levels(), 1e-6, 1 / problem.L_f)
    cost = cost_to_gap(problem, tuner, 1e5)
    assert cost == tuner.work.units
    start = problem.f(torch.ones(4, dtype=F64)) - problem.f_star
    assert problem.f(tuner.u) - problem.f_star <= 5e-3 * start
    assert cost_to_gap(problem, FixedStep(problem.levels(), 10.0, 1e-3), 1e5) == 1e5
    assert cost_to_gap(problem, FixedStep(problem.levels(), 1e-6, 1 / problem.L_f), 200) == 200


# The claims


def test_the_exact_claims_hold_in_every_case():
    for cases in (descent_cases(), bound_cases()):
        assert len(cases) >= 120 and all(case.holds for case in cases)
    assert sum(found.steps for _, found, _ in exact_runs()) > 400
    names = " ".join(case.name for case in descent_cases())
    assert all(f"seed {seed}" in names for seed in range(1000, 1012))


def test_a_wrong_bound_would_be_found():
    problem = DecoupledQuadratic(1000, 10.0)
    honest = certificates(problem, 0.1, 1.0, True)
    assert honest.bound <= 0 and honest.descent <= 1e-12
    levels = problem.levels

    def lying(tabulated=True):
        made = levels(tabulated)
        made.lower.mu = made.lower.L  # claims an accuracy that the solver does not deliver
        made.lower.solver = None
        return made

    problem.levels = lying
    found = certificates(problem, 1.0, 1.0, False)
    wrong = certificates(problem, 1.0, 1.0, True)
    assert max(found.descent, wrong.descent, wrong.bound) > 1e-3


def outcome(**metrics):
    return Outcome("finished", metrics)


def seed(**changes):
    arms = {
        "denoising_maid": outcome(success=1.0, spread=0.1, median_log_loss=0.5),
        "denoising_tpe50": outcome(f_end=math.exp(0.49)),
        **{f"denoising_{r}": outcome(success=0.5, spread=1.5, f_star=2.0, f_start=10.0) for r in RIVALS},
        "logistic_maid": outcome(mean_log_loss=-0.9),
        **{f"logistic_{r}": outcome(mean_log_loss=-0.8, least_loss=0.3, f_start=0.9) for r in RIVALS},
        "quadratic_maid": outcome(claimed_cost=1000.0),
        "quadratic_fixed_step": outcome(claimed_cost=2000.0),
    }
    return Seed(1000, {**arms, **changes}, dict(PROTOCOL.worst))


def test_estimands_are_those_of_the_card():
    found = {name: estimand(seed()) for name, estimand in STUDY.estimands.items()}
    assert found["robust-to-settings"] == {f"denoising_{rival}": 0.5 for rival in RIVALS}
    assert found["small-spread"] == pytest.approx(1.4)
    assert found["blind-logistic"] == pytest.approx(
        {f"logistic_{rival}": 0.1 for rival in ("hoag_geometric", "fixed_step", "fixed_armijo")}
    )
    assert found["cheaper-than-safe"] == pytest.approx(math.log(2.0))
    assert found["as-good-as-search"] == pytest.approx(-0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True] * 4),
        ({"denoising_fixed_step": outcome(success=0.8, f_star=2.0, f_start=10.0)}, [False, True, True, True]),
        ({"denoising_hoag_geometric": outcome(success=0.0)}, [True, False, True, True]),
        ({"denoising_fixed_armijo": outcome(success=0.0)}, [True, True, False, True]),
        ({"denoising_fixed_step": outcome(success=0.5, f_star=9.0, f_start=10.0)}, [True, True, True, False]),
    ],
)
def test_the_regime_of_denoising_is_judged_on_the_rivals_alone(changes, expected):
    assert [c.holds for c in sensitive_and_solvable([seed(**changes)])] == expected
    assert [c.holds for c in worth_learning([seed(**changes)])] == expected[3:]


def test_the_regime_of_logistic_regression_asks_for_a_third():
    assert [c.holds for c in logistic_learnable([seed()])] == [True]
    poor = outcome(mean_log_loss=0.0, least_loss=0.8, f_start=0.9)
    assert [c.holds for c in logistic_learnable([seed(logistic_fixed_step=poor)])] == [False]
