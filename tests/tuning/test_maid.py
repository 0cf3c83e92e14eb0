"""MAID and its rivals: certified steps, the limit of exact Armijo descent, traps, budgets, and exact continuation."""

import itertools
import math
import warnings

import pytest
import torch
from jaxtyping import config

from wellposed import Hyperparameter
from wellposed.studies.problems.decoupled_quadratic import DecoupledQuadratic
from wellposed.studies.problems.log_cosh import LogCosh
from wellposed.studies.problems.variational_denoising import photographs
from wellposed.studies.problems.weighted_logistic import WeightedLogistic
from wellposed.tuning import (
    HOAG,
    MAID,
    CertifiedProblem,
    FixedArmijo,
    FixedStep,
    InnerSolverError,
    LowerLevel,
    UpperLoss,
)
from wellposed.tuning.hoag import SLACK, scheduled_accuracy
from wellposed.tuning.line_search import capped
from wellposed.tuning.sufficient_decrease import certified_change, lower_value, upper_value

F64 = torch.float64


@pytest.fixture
def unchecked():
    """For bad arguments, which jaxtyping would refuse before our own errors, and for runs of many small steps."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


RIVALS = {
    "maid": lambda p: MAID(p, 0.1, 0.1, 1.0),
    "accelerated": lambda p: MAID(p, 0.1, 0.1, 1.0, accelerate=True),
    "hoag": lambda p: HOAG(p, 0.1),
    "step": lambda p: FixedStep(p, 1e-3, 0.1),
    "armijo": lambda p: FixedArmijo(p, 1e-3, 1.0),
}


def denoising(seed=0, size=12):
    return photographs(seed, size)


# Certificates


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.usefixtures("unchecked")
def test_every_accepted_step_lowers_the_exact_loss_by_the_certified_amount(checked):
    accepted = 0
    for seed, eps, alpha in itertools.product(range(3), (10.0, 0.1, 1e-3), (1e-2, 10.0)):
        problem = DecoupledQuadratic(seed, 10.0)
        tuner = MAID(problem.levels(), eps, eps, alpha, check_descent=checked)
        before = float(problem.f(tuner.u))
        for _ in range(6):
            info = tuner.step()
            after = float(problem.f(tuner.u))
            assert after - before <= -tuner.armijo * info.alpha * info.z_norm**2 + 1e-12
            accepted += info.alpha > 0
            before = after
    assert accepted > 80


@pytest.mark.usefixtures("unchecked")
def test_after_the_descent_test_the_direction_descends():
    for seed in range(5):
        for problem in (DecoupledQuadratic(seed, 10.0), LogCosh(seed)):
            tuner = MAID(problem.levels(), 1.0, 1.0, 1.0, check_descent=True)
            for _ in range(4):
                u = tuner.u
                info = tuner.step()
                assert float(tuner.z @ problem.gradient(u)) >= tuner.eta * info.z_norm**2 - 1e-12
                assert info.omega <= (1 - tuner.eta) * info.z_norm


def test_the_accelerated_variant_stays_below_the_average_of_its_past():
    problem = DecoupledQuadratic(0, 10.0)
    tuner = MAID(problem.levels(), 0.1, 0.1, 1.0, accelerate=True)
    past = [float(problem.f(tuner.u))]
    for _ in range(20):
        tuner.step()
        past.append(float(problem.f(tuner.u)))
        assert past[-1] <= max(past[:-1]) + 1e-12
    assert past[-1] - problem.f_star < 1e-4 * (past[0] - problem.f_star)


@pytest.mark.usefixtures("unchecked")
def test_with_exact_solves_it_is_armijo_gradient_descent():
    problem = DecoupledQuadratic(0, 10.0)
    tuner = MAID(problem.levels(), 1e-10, 1e-10, 1.0, nu_up=1.0)
    theta, alpha, seen = torch.ones(4, dtype=F64), 1.0, []
    for _ in range(20):
        z = problem.gradient(theta)
        step = min(alpha, 2.0 / float(z.abs().max()))
        rejected = 0
        while problem.f(theta - step * z) - problem.f(theta) + 0.1 * step * z @ z > 0:
            step, rejected = 0.5 * step, rejected + 1
        theta, alpha = theta - step * z, 1.5 * step
        info = tuner.step()
        assert info.n_backtrack == rejected
        if float(z.norm()) > 1e-4:  # the certificate's slack is 1e-10; below, it may reject what exact Armijo takes
            torch.testing.assert_close(tuner.u, theta, rtol=1e-6, atol=1e-9)
            assert info.alpha == pytest.approx(step, rel=1e-6)
            seen.append(step)
        else:
            break
    assert float(problem.f(theta)) - problem.f_star < 1e-5 and len(seen) > 8


@pytest.mark.slow
def test_the_reference_quadratic_is_solved_from_every_start():
    g = torch.Generator().manual_seed(0)
    A1, A2, A3 = torch.rand(3, 1000, 10, generator=g, dtype=F64)
    x1, x2, planted = torch.rand(3, 10, generator=g, dtype=F64)
    noise = 0.01 * torch.randn(2, 1000, generator=g, dtype=F64)
    b1, b2 = A1 @ x1 + noise[0], A2 @ x2 + A3 @ planted + noise[1]
    H, J = A2.T @ A2, A2.T @ A3
    spectrum = torch.linalg.eigvalsh(H)
    response = -torch.linalg.solve(H, J)

    def f(theta):
        return 0.5 * float((A1 @ (torch.linalg.solve(H, A2.T @ b2) + response @ theta) - b1).square().sum())

    B = A1 @ response
    residual = b1 - A1 @ torch.linalg.solve(H, A2.T @ b2)
    best = f(torch.linalg.lstsq(B, residual[:, None]).solution[:, 0])
    start = f(torch.ones(10, dtype=F64))
    gaps = []
    for eps, alpha in ((0.1, 1e-2), (0.1, 1e-5), (1e-3, 1e-2)):
        theta = Hyperparameter(1.0, -math.inf, math.inf, shape=(10,)).double()
        lower = LowerLevel(
            lambda x, v: 0.5 * (A2 @ x + A3 @ v["theta"] - b2).square().sum(), torch.zeros(10, dtype=F64),
            {"theta": theta}, float(spectrum[0]), float(spectrum[-1]), quadratic=True, L_J=0.0,
            J_norm=float(torch.linalg.matrix_norm(J, 2)), gradient=lambda x, v: H @ x + J @ v["theta"] - A2.T @ b2,
        )  # fmt: skip
        L_g = float(torch.linalg.eigvalsh(A1.T @ A1)[-1])
        upper = UpperLoss(lambda x: 0.5 * (A1 @ x - b1).square().sum(), L_g, convex=True)
        tuner = MAID(CertifiedProblem(lower, upper), eps, eps, alpha)
        tuner.run(max_outer=400)
        gaps.append((f(tuner.u) - best) / (start - best))
    assert max(gaps) <= 0.05
    assert max(gaps) - min(gaps) <= 0.05 * max(gaps)


def test_the_bounds_sandwich_and_the_change_adds_up():
    loss, slope, eps = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.1])
    assert float(upper_value(loss, slope, eps, 3.0)) == pytest.approx(1 + 0.2 + 0.015)
    assert float(lower_value(loss, slope, eps, 3.0, False)) == pytest.approx(1 - 0.2 - 0.015)
    assert float(lower_value(loss, slope, eps, 3.0, True)) == pytest.approx(0.8)
    assert certified_change(1.0, 2.0, 0.5, 2.0, 0.1) == pytest.approx(-1.0 + 0.1 * 0.5 * 4.0)


# Traps


def test_no_hyperparameter_moves_by_more_than_the_cap_whatever_the_first_step_size():
    for tuner in (MAID(denoising().levels(), 0.1, 0.1, 1e6), FixedStep(denoising().levels(), 0.1, 1e6, max_step=0.5)):
        before = tuner.u
        tuner.step()
        assert float((tuner.u - before).abs().max()) <= tuner.max_step * (1 + 1e-12)
    assert capped(10.0, torch.zeros(3), 2.0) == 10.0


def test_a_hopeless_trial_is_cut_short_and_the_result_is_the_same():
    """The first trials' solutions are far worse: their inner problems of condition 1e3 need not be finished."""

    def build(watched):
        y = torch.linspace(-1, 1, 30, dtype=F64)
        curve = torch.logspace(0, 3, 30, dtype=F64)
        shift = Hyperparameter(0.0, -math.inf, math.inf).double()
        lower = LowerLevel(
            lambda x, v: 0.5 * (curve * (x - y - v["shift"]).square()).sum(), y, {"shift": shift}, 1.0, 1e3,
            quadratic=True, gradient=lambda x, v: curve * (x - y - v["shift"]),
        )  # fmt: skip
        upper = UpperLoss(lambda x: 0.5 * (x - y - 0.1).square().sum(), 1.0, convex=True)
        tuner = MAID(CertifiedProblem(lower, upper), 1e-4, 1e-4, 30.0, max_step=1e3, check_descent=False)
        if not watched:
            plain = tuner._accelerated
            lower.solver = lambda x0, v, mu, L, eps, limit, watch: plain(x0, v, mu, L, eps, limit, None)
        info = tuner.step()
        return tuner, info

    watched, with_watch = build(True)
    plain, without = build(False)
    assert with_watch.n_backtrack == without.n_backtrack > 3
    torch.testing.assert_close(watched.u, plain.u, rtol=1e-9, atol=0)
    assert with_watch.n_inner < 0.8 * without.n_inner


@pytest.mark.usefixtures("unchecked")
def test_a_start_at_which_nothing_is_coupled_yet_is_no_stationary_point():
    """At coefficients 0 the mixed derivative of a ridge penalty is zero, and so is z; eps = 10 accepts that point."""
    problem = WeightedLogistic(0, train=80, validation=60)
    for tuner in (MAID(problem.levels(), 10.0, 10.0, 1.0), HOAG(problem.levels(), 10.0)):
        before = float(tuner.upper.value_and_gradient(tuner.x, False)[0])
        tuner.run(budget=600)
        assert tuner.point.upper < 0.9 * before
    stalled = FixedArmijo(problem.levels(), 1e3, 1.0)
    stalled.run(max_outer=3)
    assert stalled.status == "stalled" and len(stalled.history) == 1


def test_the_delivered_accuracy_is_used_not_the_one_asked_for():
    tuner = MAID(denoising().levels(), 10.0, 10.0, 1.0)
    tuner.step()
    mu, slopes = 1.0, tuner.lower.gradient(tuner.point.x, tuner.point.u)
    torch.testing.assert_close(tuner.point.eps, slopes.flatten(1).norm(dim=1) / mu)
    assert float(tuner.point.eps.max()) < tuner.eps


@pytest.mark.usefixtures("unchecked")
def test_a_coarse_fixed_accuracy_stalls_where_maid_tightens():
    problem = denoising()
    fixed, adaptive = FixedArmijo(problem.levels(), 10.0, 1.0), MAID(problem.levels(), 10.0, 10.0, 1.0)
    fixed.run(max_outer=6)
    adaptive.run(max_outer=6)
    assert fixed.status == "stalled"
    assert problem.f(adaptive.u) < 0.7 * problem.f(fixed.u)


# HOAG


def test_hoag_follows_its_schedule_and_its_rules():
    problem = DecoupledQuadratic(1, 10.0)
    tuner = HOAG(problem.levels(), 0.5, "quadratic", step_scale=100.0)
    eps = []
    for _ in range(8):
        point, inverse, before = tuner.point, tuner.inverse_step, tuner.eps
        info = tuner.step()
        eps.append(info.eps)
        if point is None or math.isnan(inverse):
            continue
        if info.alpha == 0.0:  # rejected: L doubles, the accuracy is halved, and theta stands
            assert tuner.inverse_step == 2 * inverse
            assert torch.equal(tuner.u, point.u)
            assert tuner.eps == pytest.approx(0.5 * scheduled_accuracy(0.5, tuner.iteration, "quadratic"))
        else:
            assert tuner.inverse_step in (inverse, 0.95 * inverse)
            change = info.alpha * info.z_norm
            bound = SLACK * tuner.eps + before * (SLACK + 1) * change - inverse * change**2
            assert (tuner.inverse_step < inverse) == (tuner.point.upper <= point.upper + bound or tuner._again)
    assert eps[0] == 0.5 and min(eps) < 0.02
    assert scheduled_accuracy(1.0, 2, "cubic") == pytest.approx(1 / 27)


def test_hoag_starts_with_the_step_of_its_author():
    problem = DecoupledQuadratic(0, 10.0)
    tuner = HOAG(problem.levels(), 1e-6)
    u = tuner.u
    info = tuner.step()
    natural = math.sqrt(4) / info.z_norm
    assert info.alpha == pytest.approx(min(natural, 2.0 / float(tuner.z.abs().max())))
    torch.testing.assert_close(tuner.u, u - info.alpha * tuner.z)


# Runs


@pytest.mark.parametrize("name", RIVALS)
def test_a_budget_is_kept_and_the_tuner_stands_on_a_solved_point(name):
    tuner = RIVALS[name](denoising().levels())
    tuner.run(budget=150)
    assert tuner.status == "budget"
    assert 120 < tuner.work.units <= 156
    assert torch.equal(tuner.u, tuner.point.u)
    assert tuner.work.units == tuner.history[-1].units
    tuner.run(budget=300)  # a larger budget goes on
    assert 250 < tuner.work.units <= 306


@pytest.mark.parametrize("name", RIVALS)
def test_a_resumed_run_continues_bit_for_bit(name):
    whole, first = (RIVALS[name](denoising().levels()) for _ in range(2))
    whole.run(max_outer=6)
    first.run(max_outer=3)
    state = first.state_dict()
    second = RIVALS[name](denoising().levels())
    second.load_state_dict(state)
    second.run(max_outer=3)
    assert torch.equal(second.u, whole.u) and torch.equal(second.reconstruction, whole.reconstruction)
    assert second.work == whole.work
    assert [i.alpha for i in second.history] == [i.alpha for i in whole.history[3:]]


@pytest.mark.usefixtures("unchecked")
def test_the_default_settings_reach_the_optimum_and_the_information_adds_up():
    problem = DecoupledQuadratic(2, 10.0)
    levels = problem.levels()
    tuner = MAID(levels)
    history = tuner.run(max_outer=60, tol=1e-6)
    assert tuner.status == "converged"
    assert history[-1].z_norm + history[-1].omega <= 1e-6
    assert float(problem.f(tuner.u)) - problem.f_star < 1e-10
    assert sum(i.n_inner for i in history) == tuner.work.inner == levels.counts.inner_grad
    assert sum(i.n_hvp for i in history) == tuner.work.hvp == levels.counts.hvp
    assert history[-1].certified and tuner.certified and tuner.check_descent
    assert torch.equal(levels.params["x"], tuner.reconstruction)
    assert torch.equal(tuner.values()["theta"], tuner.u)
    assert history[3].f_lower == pytest.approx(history[3].inner_loss)


@pytest.mark.usefixtures("unchecked")
def test_without_a_tolerance_it_ends_where_rounding_errors_do():
    tuner = MAID(DecoupledQuadratic(0, 10.0).levels(), 0.1, 0.1, 0.1)
    tuner.run(max_outer=500)
    assert tuner.status == "attainable accuracy reached"
    count = len(tuner.history)
    assert tuner.step().alpha == 0.0 and count < 500


def test_the_descent_test_is_on_only_where_it_can_pay():
    assert MAID(DecoupledQuadratic(0, 10.0).levels()).check_descent
    assert MAID(LogCosh(0).levels()).check_descent  # every constant was given
    assert not MAID(denoising().levels()).check_descent
    assert MAID(denoising().levels(), check_descent=True).check_descent


@pytest.mark.usefixtures("unchecked")
def test_scaling_the_inner_objective_changes_nothing():
    y = torch.linspace(0, 1, 20, dtype=F64)
    ends = []
    for scale in (1.0, 1e3):
        weight = Hyperparameter(1.0, chart="exp").double()
        lower = LowerLevel(
            lambda x, v, c=scale: c * (0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.diff().square().sum()),
            y, {"weight": weight}, scale, lambda v, c=scale: c * (1 + 4 * v["weight"]), quadratic=True,
        )  # fmt: skip
        upper = UpperLoss(lambda x: 0.5 * (x - 0.9 * y).square().sum(), 1.0, convex=True)
        # The adjoint system's right-hand side is not scaled, so that its residual stays the same.
        tuner = MAID(CertifiedProblem(lower, upper), 1e-3, 1e-3, 1.0, check_descent=False)
        tuner.run(max_outer=8)
        ends.append(tuner.u)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-8)


def test_float32_works_down_to_its_floor_and_says_so():
    y = torch.linspace(0, 1, 20)
    weight = Hyperparameter(1.0, chart="exp")
    lower = LowerLevel(
        lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(), y, {"weight": weight},
        lambda v: 1 + v["weight"], lambda v: 1 + v["weight"],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="float32 inner problems are solved to about 1e-5"):
        tuner = MAID(CertifiedProblem(lower, UpperLoss(lambda x: 0.5 * (x - 0.8 * y).square().sum(), 1.0, True)))
    tuner.run(max_outer=100)
    assert float(weight.value) == pytest.approx(0.25, rel=0.02)
    assert tuner.u.dtype == torch.float32


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rho": 1.0}, "rho must lie in"),
        ({"rho": 0.0}, "rho must lie in"),
        ({"nu": 1.0}, "nu must lie in"),
        ({"nu": -0.5}, "nu must lie in"),
        ({"eta": 1.0}, "eta must lie in"),
        ({"armijo": 0.0}, "armijo must lie in"),
        ({"armijo": 0.5}, "armijo must be < eta"),
        ({"rho_up": 1.0}, "rho_up must be > 1"),
        ({"nu_up": 0.9}, "nu_up >= 1"),
        ({"max_bt": 0}, "max_bt must be an integer >= 1"),
        ({"check_descent": "maybe"}, "check_descent must be"),
        ({"eps0": 0.0}, "eps0 must be > 0"),
        ({"alpha0": -1.0}, "alpha0 must be > 0"),
        ({"delta0": -1.0}, "delta0 must be > 0"),
        ({"max_step": 0.0}, "max_step must be > 0"),
        ({"max_inner": 0}, "max_inner must be > 0"),
        ({"on_uncertified": "shout"}, "on_uncertified must be"),
        ({"mu": 1.0}, "belong to a plain BilevelProblem"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_out_of_range_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        MAID(DecoupledQuadratic(0, 10.0).levels(), **changes)


def test_armijo_above_eta_is_allowed_where_nothing_is_tested():
    MAID(DecoupledQuadratic(0, 10.0).levels(), armijo=0.6, check_descent=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: HOAG(p, 0.0), "HOAG: eps0 must be > 0"),
        (lambda p: HOAG(p, schedule="linear"), "HOAG: schedule must be"),
        (lambda p: HOAG(p, factor=1.0), "HOAG: factor must lie in"),
        (lambda p: FixedStep(p, -1.0, 1.0), "FixedStep: eps must be > 0"),
        (lambda p: FixedStep(p, 1.0, 0.0), "FixedStep: alpha must be > 0"),
        (lambda p: FixedArmijo(p, 1.0, 1.0, rho=2.0), "FixedArmijo: rho and armijo"),
        (lambda p: FixedArmijo(p, 1.0, 1.0, max_bt=0), "FixedArmijo: max_bt"),
        (lambda p: MAID(p).run(), "give max_outer, budget or tol"),
        (lambda p: MAID(p).run(max_outer=0), "max_outer must be > 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_the_rivals_and_run_name_their_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make(DecoupledQuadratic(0, 10.0).levels())


def test_an_inner_problem_that_is_not_finished_says_where():
    tuner = MAID(DecoupledQuadratic(0, 100.0).levels(), 1e-8, 1e-8, 1.0, max_inner=20)
    with pytest.raises(
        InnerSolverError, match=r"MAID: the inner problem was not solved at theta = \[1, 1, 1, 1\]"
    ) as caught:
        tuner.step()
    assert caught.value.kappa == pytest.approx(1e4) and caught.value.residual > 0
    assert torch.equal(caught.value.theta, torch.ones(4, dtype=F64))


def test_moduli_that_are_none_are_an_error_that_names_theta():
    y = torch.ones(3, dtype=F64)
    weight = Hyperparameter(1.0, chart="exp").double()
    lower = LowerLevel(
        lambda x, v: v["weight"] * (x - y).square().sum(), 0 * y, {"weight": weight}, 2.0, lambda v: v["weight"]
    )
    tuner = FixedStep(CertifiedProblem(lower, UpperLoss(lambda x: x.square().sum(), 2.0)), 0.1, 1.0)
    with pytest.raises(InnerSolverError, match="no moduli 0 < mu <= L < inf"):
        tuner.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_it_runs_on_an_accelerator():
    y = torch.linspace(0, 1, 20, dtype=F64, device="cuda")
    weight = Hyperparameter(1.0, chart="exp").double().cuda()
    lower = LowerLevel(
        lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(), y, {"weight": weight},
        lambda v: 1 + v["weight"], lambda v: 1 + v["weight"],
    )  # fmt: skip
    tuner = MAID(CertifiedProblem(lower, UpperLoss(lambda x: 0.5 * (x - 0.8 * y).square().sum(), 1.0, True)))
    tuner.run(max_outer=60)
    assert float(weight.value) == pytest.approx(0.25, rel=1e-3)


def test_the_accelerated_variant_warns_of_nothing_and_restarts_without_a_past():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner = MAID(denoising().levels(), accelerate=True)
        tuner.step()
    assert tuner._last is not None and tuner._window[0] > 1
