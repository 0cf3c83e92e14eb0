"""BO-REP against closed forms, hand-written loops and its own invariants; numbers as in the list of the method's tests."""

import copy
import math

import pytest
import torch
from bilevel_doubles import Recorder, WeightedRegression, noises, quadratic
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config
from scipy.optimize import minimize_scalar
from torch import nn

from wellposed import BilevelProblem, Hyperparameter
from wellposed.step import DivergenceError
from wellposed.studies.problems import bo_rep_invariants
from wellposed.studies.problems.bo_rep_invariants import OUTER_LR, trajectory
from wellposed.studies.problems.unbounded_smoothness import CoshProblem, noise_stream
from wellposed.tuning import BOREP, StocBiO, clipped_ma_soba, ma_soba, normalized_ma_soba, soba, upper_parameters
from wellposed.tuning.bilevel_updates import linear_system_step, project_to_ball, refinement_step_sizes, schedule_factor


@pytest.fixture
def unchecked():
    """For bad arguments, which jaxtyping would refuse before our own errors, and for runs of many small steps."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def streams(seed=3):
    return Recorder(noises(50, seed=seed)), Recorder(noises(50, seed=seed + 1))


def still():
    zero = torch.zeros(4, dtype=torch.float64)
    return Recorder([zero]), Recorder([zero])


# 1 and 2: the step's length and the scale of the outer loss


@pytest.mark.parametrize("radius", [1.0, 4.0, 8.0])
@pytest.mark.usefixtures("unchecked")
def test_every_step_has_length_outer_lr_and_no_other_scale_of_the_outer_loss_moves_a_path(radius, monkeypatch):
    monkeypatch.setattr(bo_rep_invariants, "STEPS", 25)  # the study's exact claim has 100
    x, y, tuner = trajectory([0], radius)
    assert float(((x[2:] - x[1:-1]).norm(dim=-1) / OUTER_LR - 1).abs().max()) < 1e-6
    assert torch.equal(x[0], x[1])  # z and m start at zero: the first step has no direction
    for c in (1e-3, 1e3):
        other_x, other_y, other = trajectory([0], radius, scale=c)
        torch.testing.assert_close(other_x, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_y, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.z[0], c * tuner.z[0], rtol=1e-4, atol=c * 1e-5)
        torch.testing.assert_close(other.momentum[0], c * tuner.momentum[0], rtol=1e-4, atol=c * 1e-5)


def test_one_hyperparameter_moves_by_outer_lr_against_the_sign_of_the_momentum():
    decay = Hyperparameter(0.5, chart="exp").double()
    w = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)}
    inner = lambda p, v, b: (p["w"] - b).square().sum() + v["decay"] * p["w"].square().sum()  # noqa: E731
    outer = lambda p, v, b: (p["w"] - 0.3 * b).square().sum()  # noqa: E731
    tuner = BOREP(BilevelProblem(None, inner, outer, w, {"decay": decay}), 0.05, 0.1, 0.1)
    train, validation = Recorder([torch.ones(2).double(), 2 * torch.ones(2).double()]), Recorder([1.5])
    for step in range(30):
        before = decay.raw.clone()
        tuner.step(train, validation)
        expected = 0.0 if step == 0 else -0.05 * math.copysign(1, float(tuner.momentum[0]))
        assert float(decay.raw - before) == pytest.approx(expected, rel=1e-6)


# 3 and 4: the linear system and the direction


@given(seed=st.integers(0, 20), share=st.floats(0.05, 1.0))
def test_z_approaches_the_solution_at_the_rate_one_minus_nu_mu(seed, share):
    a = quadratic(seed=seed).parts[0]
    eigenvalues = torch.linalg.eigvalsh(a)
    nu, b = share / float(eigenvalues[-1]), torch.ones(4, dtype=torch.float64)
    solution, z = torch.linalg.solve(a, b), [torch.zeros(4, dtype=torch.float64)]
    start = solution.norm()
    for k in range(1, 30):
        z = linear_system_step(z, [a @ z[0]], [b], nu)
        bound = (1 - nu * float(eigenvalues[0])) ** k * start
        assert (z[0] - solution).norm() <= bound * (1 + 1e-6) + 1e-14


@pytest.mark.parametrize("seed", range(3))
def test_at_the_lower_solution_the_direction_is_that_of_the_closed_form(seed):
    problem = quadratic(seed=seed)
    a, b, c, d = problem.parts
    x = problem.hypers["x"].raw.clone().requires_grad_()
    solution = torch.linalg.solve(a, b @ x)
    phi = 0.5 * (solution - c).square().sum() + d @ x
    expected = torch.autograd.grad(phi, x)[0]
    tuner = BOREP(problem, 0.1, 0.1, 0.1, refine_steps=0, inner_steps=1)
    with torch.no_grad():
        problem.params["y"].copy_(solution)
    tuner.z = [torch.linalg.solve(a, solution.detach() - c)]
    before = problem.hypers["x"].raw.clone()
    tuner.step(*still())
    moved = problem.hypers["x"].raw - before
    assert torch.nn.functional.cosine_similarity(moved, -expected, dim=0) > 1 - 1e-8
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-9)


# 5: reductions to MA-SOBA and SOBA


def ma_soba_by_hand(problem, train, validation, eta, gamma, nu, beta, steps, y_first):
    a, b, c, d = problem.parts
    x, y = problem.hypers["x"].raw.clone(), problem.params["y"].detach().clone()
    z, m = torch.zeros_like(y), torch.zeros_like(x)
    for _ in range(steps):
        if y_first:
            y = y - gamma * (a @ y - b @ x + next(train))
        by_y = (y - c) + next(validation)
        next(train)  # the noise of this problem is linear in y: second derivatives do not see it
        product, mixed = a @ z, -(b.T @ z)
        next(train)
        new_y = y if y_first else y - gamma * (a @ y - b @ x + next(train))
        z, m = z - nu * (product - by_y), beta * m + (1 - beta) * (d - mixed)
        x, y = x - eta * m, new_y
    return x, y, z


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
def test_plain_single_loop_is_ma_soba_and_without_momentum_soba(order, beta):
    settings = {"eta": 0.05, "gamma": 0.1, "nu": 0.1}
    expected = ma_soba_by_hand(quadratic(), *streams(), **settings, beta=beta, steps=40, y_first=order != "jacobi")
    problem = quadratic()
    if order == "jacobi":
        tuner = soba(problem, 0.05, 0.1, 0.1) if beta == 0 else ma_soba(problem, 0.05, 0.1, 0.1, beta)
    else:
        tuner = BOREP(problem, 0.05, 0.1, 0.1, beta, 1, 1, 0, mode="plain")
    train, validation = streams()
    for _ in range(40):
        tuner.step(train, validation)
    found = problem.hypers["x"].raw, problem.params["y"].detach(), tuner.z[0]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_jacobi_moves_all_three_from_the_old_point_bit_for_bit():
    problem, other = quadratic(), quadratic()
    tuner = ma_soba(problem, 0.05, 0.1, 0.1)
    z, m = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    train, validation = streams()
    own_train, own_validation = streams()
    for _ in range(20):
        tuner.step(train, validation)
        _, by_y, by_x = other.outer_grads(next(own_validation))
        product = other.hvp({"y": z}, next(own_train))["y"]
        mixed = other.mixed_vjp({"y": z}, next(own_train))["x"]
        gradient = other.inner_grad(next(own_train))["y"]
        z = torch.add(z, product - by_y["y"], alpha=-0.1)
        m = torch.add(m * 0.9, by_x["x"] - mixed, alpha=1.0 - 0.9)
        with torch.no_grad():
            other.params["y"].add_(gradient, alpha=-0.1)
            other.hypers["x"].raw.sub_(0.05 * m)
    assert torch.equal(problem.params["y"], other.params["y"])
    assert torch.equal(problem.hypers["x"].raw, other.hypers["x"].raw)
    assert torch.equal(tuner.z[0], z) and torch.equal(tuner.momentum[0], m)


def test_clipping_leaves_short_momenta_alone_and_shortens_long_ones_to_the_threshold():
    lengths = {}
    for clip in (1e6, 1e-3):
        problem = quadratic()
        tuner = clipped_ma_soba(problem, 0.1, 0.1, 0.1, clip)
        before = problem.hypers["x"].raw.clone()
        tuner.step(*still())
        lengths[clip] = float((problem.hypers["x"].raw - before).norm())
        norm = float(tuner.momentum[0].norm())
    assert lengths[1e6] == pytest.approx(0.1 * norm, rel=1e-9)
    assert lengths[1e-3] == pytest.approx(0.1 * 1e-3, rel=1e-6)


# 6 and 7: second derivatives (the problem's own tests have the closed forms)


def test_the_mixed_product_is_the_finite_difference_of_the_inner_gradient():
    problem, h = quadratic(), 1e-5
    z = {"y": torch.randn(4, dtype=torch.float64)}
    noise = noises(1)[0]
    mixed = problem.mixed_vjp(z, noise)["x"]
    raw = problem.hypers["x"].raw
    for i in range(3):
        values = []
        for sign in (1, -1):
            raw[i] += sign * h
            values.append(float(problem.inner_grad(noise)["y"] @ z["y"]))
            raw[i] -= sign * h
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(mixed[i]), rel=1e-5, abs=1e-8)


def softmax_problem():
    torch.manual_seed(0)
    model, decay = WeightedRegression().double(), Hyperparameter(0.1, chart="exp").double()
    inputs, targets = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 4, (30,))

    def inner(params, hypers, batch):
        logits = torch.func.functional_call(model, params, (inputs,))
        penalty = sum(p.square().sum() for p in params.values())
        return nn.functional.cross_entropy(logits, targets) + hypers["decay"] * penalty

    return BilevelProblem(model, inner, inner, hypers={"decay": decay})


def test_the_hessian_product_is_the_dense_hessian_and_its_fallback_is_close():
    problem = softmax_problem()
    v = {n: torch.randn_like(p) for n, p in problem.params.items()}
    flat = torch.cat([p.detach().reshape(-1) for p in problem.params.values()])
    assert len(flat) == 20
    shapes = {n: p.shape for n, p in problem.params.items()}

    def loss(vector):
        parts, start = {}, 0
        for n, shape in shapes.items():
            parts[n] = vector[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        return problem.evaluate(problem.inner_loss, parts, problem.raw(), None)

    dense = torch.autograd.functional.hessian(loss, flat) @ torch.cat([x.reshape(-1) for x in v.values()])
    exact = torch.cat([x.reshape(-1) for x in problem.hvp(v, None).values()])
    torch.testing.assert_close(exact, dense, rtol=1e-10, atol=1e-12)
    problem.fallback = "forced by the test"
    differences = torch.cat([x.reshape(-1) for x in problem.hvp(v, None).values()])
    torch.testing.assert_close(differences, dense, rtol=1e-4, atol=1e-6)


# 8 to 12: batches, periods, projection, momentum


@pytest.mark.parametrize("period, inner_steps, refine_steps, steps", [(1, 1, 0, 5), (2, 3, 50, 7), (5, 4, 10, 11)])
def test_lower_gradients_are_counted_as_refinement_plus_periods(period, inner_steps, refine_steps, steps):
    problem = quadratic()
    tuner = BOREP(problem, 0.1, 0.1, 0.1, period=period, inner_steps=inner_steps, refine_steps=refine_steps)
    train, validation = streams()
    due = [tuner.step(train, validation).extra["did_inner_update"] for _ in range(steps)]
    assert problem.counts.inner_grad == refine_steps + inner_steps * math.ceil(steps / period)
    assert (problem.counts.hvp, problem.counts.mixed_vjp, problem.counts.outer_grads) == (steps, steps, steps)
    assert due == [float(k % period == 0) for k in range(steps)]
    assert len(validation.taken) == steps
    assert len(train.taken) == problem.counts.inner_grad + 2 * steps


@pytest.mark.parametrize("radius", [None, 0.05])
def test_the_lower_level_stays_in_the_ball_of_each_period(radius):
    problem = quadratic()
    tuner = BOREP(problem, 0.1, 0.3, 0.1, inner_steps=5, period=1, refine_steps=0, radius=radius)
    train, validation = streams()
    distances = []
    for _ in range(6):
        centre = problem.params["y"].detach().clone()
        tuner.step(train, validation)
        distances.append(float((problem.params["y"].detach() - centre).norm()))
    if radius is None:
        assert max(distances) > 0.05
    else:
        assert max(distances) <= radius * (1 + 1e-6) and max(distances) > 0.9 * radius


def test_projection_leaves_points_inside_alone_and_treats_independent_problems_apart():
    y = torch.tensor([[0.1, 0.0], [3.0, 4.0]])
    before = y.clone()
    project_to_ball([y], [torch.zeros(2, 2)], 1.0, independent=1)
    assert torch.equal(y[0], before[0])
    torch.testing.assert_close(y[1], torch.tensor([0.6, 0.8]))


def test_lower_steps_do_not_accumulate_gradients():
    problem, other = quadratic(), quadratic()
    train, validation = streams()
    BOREP(problem, 0.1, 0.1, 0.1, inner_steps=3, refine_steps=0).step(train, validation)
    for noise in train.taken[:3]:
        gradient = other.inner_grad(noise)["y"]
        with torch.no_grad():
            other.params["y"].add_(gradient, alpha=-0.1)
    assert torch.equal(problem.params["y"], other.params["y"])


@pytest.mark.parametrize("solver", ["sgd", "cg"])
def test_second_derivatives_read_training_batches_and_the_outer_loss_validation_batches(solver):
    seen = {"inner": [], "outer": []}
    problem = quadratic()
    for name in seen:
        loss = getattr(problem, f"{name}_loss")

        def recorded(params, hypers, batch, loss=loss, name=name):
            seen[name].append(batch[0])
            return loss(params, hypers, batch[1])

        setattr(problem, f"{name}_loss", recorded)
    train = Recorder([(f"train {i}", noise) for i, noise in enumerate(noises(50))])
    validation = Recorder([("validation", noise) for noise in noises(50)])
    tuner = BOREP(problem, 0.1, 0.1, 0.1, refine_steps=4, linear_solver=solver, inner_steps=2)
    for _ in range(3):
        tuner.step(train, validation)
    assert set(seen["outer"]) == {"validation"} and not {"validation"} & set(seen["inner"])
    assert sorted(set(seen["inner"])) == sorted(name for name, _ in train.taken)  # each taken batch is used


def test_momentum_without_memory_is_the_present_hypergradient():
    problem = quadratic()
    tuner = BOREP(problem, 0.1, 0.1, 0.1, beta=0.0, reuse_batch=True)
    train, validation = streams()
    for _ in range(5):
        z = tuner.z[0].clone()
        info = tuner.step(train, validation)
        expected = problem.parts[3] + problem.parts[1].T @ z
        torch.testing.assert_close(tuner.momentum[0], expected, rtol=1e-12, atol=1e-12)
        assert info.extra["hypergrad_norm"] == pytest.approx(float(expected.norm()), rel=1e-6)


def test_one_batch_for_both_second_derivatives_takes_one_training_batch_and_finds_the_same():
    paths = []
    for reuse in (True, False):
        problem = quadratic()
        tuner = BOREP(problem, 0.1, 0.1, 0.1, refine_steps=0, inner_steps=1, period=100, reuse_batch=reuse)
        train, validation = still()
        for _ in range(4):
            tuner.step(train, validation)
        paths.append(problem.hypers["x"].raw.clone())
        assert len(train.taken) == 1 + (4 if reuse else 8)
    torch.testing.assert_close(*paths)


def test_accumulated_batches_are_averaged_before_anything_is_normalised():
    mean, split = quadratic(), quadratic()
    pairs = noises(40)
    means = [(a + b) / 2 for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    for problem, batches, accumulate in ((mean, means, 1), (split, pairs, 2)):
        tuner = BOREP(problem, 0.1, 0.1, 0.1, refine_steps=3, accumulate=accumulate)
        train, validation = Recorder(batches), Recorder(batches)
        for _ in range(5):
            tuner.step(train, validation)
    torch.testing.assert_close(mean.hypers["x"].raw, split.hypers["x"].raw, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean.params["y"], split.params["y"], rtol=1e-10, atol=1e-12)


# 13: the tuning problem that all tuners share


def ridge():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a, b, true = draw(12, 5), draw(40, 5), draw(5)
    y, t = a @ true + 3.0 * draw(12), b @ true + 0.5 * draw(40)

    def solved(u):
        return torch.linalg.solve(a.T @ a / 12 + math.exp(u) * torch.eye(5, dtype=torch.float64), a.T @ y / 12)

    best = minimize_scalar(lambda u: float((b @ solved(u) - t).square().mean()), bounds=(-8, 4), method="bounded").x
    decay = Hyperparameter(0.3, chart="exp").double()
    w = {"w": torch.zeros(5, dtype=torch.float64, requires_grad=True)}
    inner = lambda p, v, _: (a @ p["w"] - y).square().mean() + v["decay"] * p["w"].square().sum()  # noqa: E731
    outer = lambda p, v, _: (b @ p["w"] - t).square().mean()  # noqa: E731
    return BilevelProblem(None, inner, outer, w, {"decay": decay}), best


@pytest.mark.parametrize("solver", ["sgd", "cg"])
@pytest.mark.usefixtures("unchecked")
def test_ridge_with_decayed_steps_lands_where_brent_finds_the_minimum(solver):
    problem, best = ridge()
    tuner = BOREP(problem, 0.1, 0.1, 0.1, schedule="cosine", linear_solver=solver, reuse_batch=True, cg_steps=2)
    history = tuner.run([0], [0], steps=300 if solver == "sgd" else 160)
    assert abs(float(problem.hypers["decay"].raw) - best) < 0.05
    assert len(history) in (160, 300)
    assert history[-1].values["decay"] == pytest.approx(math.exp(float(problem.hypers["decay"].raw)))


@pytest.mark.usefixtures("unchecked")
def test_stocbio_lands_there_too():
    problem, best = ridge()
    StocBiO(problem, 1.0, 0.1, 0.1, schedule="cosine").run([0], [0], steps=60)
    assert abs(float(problem.hypers["decay"].raw) - best) < 0.05


def test_conjugate_gradients_solve_the_linear_system_of_one_batch_to_the_end():
    problem = quadratic()
    tuner = BOREP(problem, 0.1, 0.1, 0.1, refine_steps=0, linear_solver="cg", cg_steps=8)
    tuner.step(*still())
    a, _, c, _ = problem.parts
    expected = torch.linalg.solve(a, problem.params["y"].detach() - c)
    torch.testing.assert_close(tuner.z[0], expected, rtol=1e-8, atol=1e-10)


def test_the_neumann_series_is_the_truncated_inverse():
    problem = quadratic()
    a = problem.parts[0]
    lr, vector = 0.9 / float(torch.linalg.eigvalsh(a)[-1]), torch.ones(4, dtype=torch.float64)
    tuner = StocBiO(problem, 0.1, 0.1, lr, neumann_steps=6)
    power, expected = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(7):
        expected, power = expected + lr * power @ vector, power - lr * a @ power
    train = Recorder(noises(10))
    torch.testing.assert_close(tuner.inverse_product([vector], train)[0], expected, rtol=1e-10, atol=1e-12)
    assert problem.counts.hvp == 6 and len(train.taken) == 6


# 14 and 15: nothing to do, something wrong, and resuming


def test_a_zero_momentum_moves_nothing():
    problem = quadratic()
    problem.outer_loss = lambda p, v, b: 0.0 * p["y"].sum()
    before = problem.hypers["x"].raw.clone()
    tuner = BOREP(problem, 0.1, 0.1, 0.1)
    for _ in range(3):
        tuner.step(*still())
    assert torch.equal(problem.hypers["x"].raw, before) and bool(problem.params["y"].isfinite().all())


@pytest.mark.parametrize(
    "oracle, message",
    [
        ("outer_grads", "the oracle outer_grads is not finite at step 0"),
        ("hvp", "the oracle hvp is not finite at step 0"),
        ("mixed_vjp", "the oracle mixed_vjp is not finite at step 0"),
        ("inner_value_and_grad", "the parameters are not finite at step 0, after inner_grad moved them"),
    ],
)
def test_an_oracle_that_is_not_finite_is_named(monkeypatch, oracle, message):
    problem = quadratic()
    real = getattr(problem, oracle)

    def broken(*args):
        found = real(*args)
        parts = [found] if isinstance(found, dict) else [part for part in found if isinstance(part, dict)]
        for part in parts:
            next(iter(part.values())).fill_(math.nan)
        return found

    monkeypatch.setattr(problem, oracle, broken)
    with pytest.raises(DivergenceError, match=f"BOREP: {message}"):
        BOREP(problem, 0.1, 0.1, 0.1).step(*still())


@pytest.mark.parametrize("inner_optimizer", [None, lambda params: torch.optim.Adam(params, lr=0.05)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(inner_optimizer):
    def make(problem):
        return BOREP(
            problem, 0.1, 0.1, 0.1, schedule="cosine", total_steps=20, inner_optimizer=inner_optimizer, refine_steps=5
        )

    problem = quadratic()
    tuner = make(problem)
    train, validation = streams()
    for _ in range(7):
        tuner.step(train, validation)
    state = copy.deepcopy(tuner.state_dict())
    other = quadratic(seed=0)
    resumed = make(other)
    resumed.load_state_dict(state)
    assert resumed.refined
    for t in (tuner, resumed):
        positions = len(train.taken), len(validation.taken)
        for _ in range(7):
            t.step(train, validation)
        if t is tuner:
            del train.taken[positions[0] :], validation.taken[positions[1] :]
    assert torch.equal(problem.params["y"], other.params["y"])
    assert torch.equal(problem.hypers["x"].raw, other.hypers["x"].raw)
    assert torch.equal(tuner.z[0], resumed.z[0]) and torch.equal(tuner.momentum[0], resumed.momentum[0])


# Many problems side by side, schedules, encoders


@pytest.mark.parametrize("make", [
    lambda p: BOREP(p, 0.05, 0.3, 0.3, independent=1, radius=0.5),
    lambda p: normalized_ma_soba(p, 0.05, 0.3, 0.3, independent=1),
    lambda p: clipped_ma_soba(p, 0.05, 0.3, 0.3, 2.0, independent=1),
    lambda p: StocBiO(p, 0.01, 0.3, 0.3, independent=1),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_independent_problems_run_as_each_would_alone(make):
    def path(seeds):
        problem = CoshProblem(seeds, 1.0)
        tuner, train, validation = make(problem), noise_stream(seeds, 0), noise_stream(seeds, 1)
        for _ in range(30):
            tuner.step(train, validation)
        return problem.hypers["x"].raw

    together = path([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], path([i]), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_one_independent_problem_is_the_plain_one():
    paths = []
    for independent in (0, 1):
        problem = CoshProblem([3], 4.0)
        tuner = BOREP(problem, 0.1, 0.3, 0.3, independent=independent)
        train, validation = noise_stream([3], 0), noise_stream([3], 1)
        for _ in range(40):
            tuner.step(train, validation)
        paths.append(problem.hypers["x"].raw)
    torch.testing.assert_close(*paths, rtol=1e-9, atol=1e-12)


def test_refinement_has_stages_of_doubling_length_and_halved_steps():
    sizes = refinement_step_sizes(0.8, 70)
    assert [sizes.count(s) for s in (0.8, 0.4, 0.2)] == [10, 20, 40] and sizes == sorted(sizes, reverse=True)
    assert len(refinement_step_sizes(0.8, 50)) == 50 and refinement_step_sizes(0.8, 0) == []


def test_schedules_scale_the_outer_step_alone():
    problem = quadratic()
    tuner = BOREP(problem, 0.1, 0.1, 0.1, schedule=lambda k: 1 / (k + 1), refine_steps=0)
    train, validation = streams()
    for k in range(5):
        before = problem.hypers["x"].raw.clone()
        tuner.step(train, validation)
        assert float((problem.hypers["x"].raw - before).norm()) == pytest.approx(0.1 / (k + 1), rel=1e-8)
    assert [schedule_factor("cosine", k, 4) for k in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    with pytest.raises(ValueError, match="'cosine' needs total_steps"):
        BOREP(quadratic(), 0.1, 0.1, 0.1, schedule="cosine").step(*still())


@pytest.mark.usefixtures("unchecked")
def test_an_encoder_is_learned_in_place_and_its_head_stays_the_lower_level():
    torch.manual_seed(0)
    encoder, head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
    inputs = torch.randn(40, 3)
    targets = (inputs[:, 0] > 0).long()

    def loss(params, hypers, rows):
        features = torch.func.functional_call(encoder, hypers, (inputs[rows],))
        logits = torch.func.functional_call(head, params, (features,))
        return nn.functional.cross_entropy(logits, targets[rows]) + 1e-2 * sum(
            p.square().sum() for p in params.values()
        )

    problem = BilevelProblem(head, loss, loss, hypers=upper_parameters(encoder))
    before = encoder[0].weight.clone()
    tuner = BOREP(problem, 0.05, 0.5, 0.3, schedule="cosine")
    history = tuner.run([slice(0, 20)], [slice(20, 40)], steps=100)
    assert not torch.equal(encoder[0].weight, before)
    assert history[-1].outer_loss < 0.7 * history[0].outer_loss
    assert "0.weight" not in problem.params and "0.bias" in history[-1].values
    assert all(h.raw.data_ptr() == dict(encoder.named_parameters())[n].data_ptr() for n, h in problem.hypers.items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"outer_lr": 0.0}, "BOREP: outer_lr must be > 0 and finite, got 0.0"),
        ({"inner_lr": -1.0}, "BOREP: inner_lr must be > 0 and finite, got -1.0"),
        ({"z_lr": 0.0}, "BOREP: z_lr must be > 0 and finite, got 0.0"),
        ({"z_lr": math.inf}, "BOREP: z_lr must be > 0 and finite, got inf"),
        ({"beta": 1.0}, r"BOREP: beta must lie in \[0, 1\), got 1.0"),
        ({"period": 0}, "BOREP: period must be >= 1, got 0"),
        ({"inner_steps": 0}, "BOREP: inner_steps must be >= 1, got 0"),
        ({"refine_steps": -1}, "BOREP: refine_steps must be >= 0, got -1"),
        ({"radius": 0.0}, "BOREP: radius must be > 0"),
        ({"clip": 0.0}, "BOREP: clip must be > 0"),
        ({"mode": "sign"}, r"BOREP: mode must be one of \['normalized', 'clipped', 'plain'\], got 'sign'"),
        ({"order": "both"}, "BOREP: order must be one of"),
        ({"linear_solver": "lu"}, "BOREP: linear_solver must be one of"),
        ({"schedule": "linear"}, "BOREP: schedule must be None, 'cosine' or a function, got 'linear'"),
        ({"linear_solver": "cg", "independent": 1}, "'cg' solves one problem, got independent=1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        BOREP(quadratic(), **{"outer_lr": 0.1, "inner_lr": 0.1, "z_lr": 0.1, **options})


def test_stocbio_refuses_bad_arguments():
    with pytest.raises(ValueError, match="StocBiO: neumann_lr must be > 0 and finite, got 0.0"):
        StocBiO(quadratic(), 0.1, 0.1, 0.0)
    with pytest.raises(ValueError, match="inner_steps must be >= 1 and neumann_steps >= 0, got 0 and 10"):
        StocBiO(quadratic(), 0.1, 0.1, 0.1, inner_steps=0)


def test_a_parameter_on_both_levels_is_refused():
    encoder = nn.Linear(2, 2)
    loss = lambda p, v, b: sum(x.sum() for x in [*p.values(), *v.values()])  # noqa: E731
    problem = BilevelProblem(encoder, loss, loss, hypers=upper_parameters(encoder))
    with pytest.raises(ValueError, match="the parameter 'weight' is the hyperparameter 'weight' as well"):
        BOREP(problem, 0.1, 0.1, 0.1)


def test_a_recurrent_network_on_cudnn_is_refused_with_the_remedy(monkeypatch):
    model, h = nn.RNN(2, 2), Hyperparameter(1.0)
    problem = BilevelProblem(model, lambda *_: None, lambda *_: None, hypers={"h": h})
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    with pytest.raises(ValueError, match=r"BOREP requires 'double_backward'.*\(RNN\) runs on cuDNN.*enabled=False"):
        BOREP(problem, 0.1, 0.1, 0.1)
    with torch.backends.cudnn.flags(enabled=False):
        BOREP(problem, 0.1, 0.1, 0.1)


def test_a_hyperparameter_without_inner_derivative_is_refused_by_name():
    discrete = Hyperparameter(2.5, 0.0, 5.0, discrete=True)
    loss = lambda p, v, b: v["width"] * p["w"].square().sum()  # noqa: E731
    w = {"w": torch.ones(2, requires_grad=True)}
    with pytest.raises(ValueError, match="the hyperparameter 'width' is discrete"):
        BOREP(BilevelProblem(None, loss, loss, w, {"width": discrete}), 0.1, 0.1, 0.1)
    unread = lambda p, v, b: p["w"].square().sum()  # noqa: E731
    tuner = BOREP(BilevelProblem(None, unread, unread, w, {"rate": Hyperparameter(0.5)}), 0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="no derivative in the hyperparameter 'rate'"):
        tuner.step(iter([0] * 99), iter([0] * 99))


def test_reentrant_checkpointing_is_refused_with_the_remedy():
    from torch.utils.checkpoint import checkpoint

    layer, h = nn.Linear(2, 1), Hyperparameter(1.0)

    def loss(params, hypers, reentrant):
        inputs = torch.ones(3, 2, requires_grad=True)
        run = lambda x: torch.func.functional_call(layer, params, (x,))  # noqa: E731
        return hypers["h"] * checkpoint(run, inputs, use_reentrant=reentrant).square().mean()

    problem = BilevelProblem(layer, loss, loss, hypers={"h": h})
    with pytest.raises(ValueError, match="the model uses re-entrant activation checkpointing.*use_reentrant=False"):
        BOREP(problem, 0.1, 0.1, 0.1).step(iter([True] * 99), iter([True] * 99))
    BOREP(problem, 0.1, 0.1, 0.1).step(iter([False] * 99), iter([False] * 99))


@pytest.mark.slow
def test_a_compiled_model_gives_the_hessian_product_of_the_eager_one_or_says_that_it_differentiates_numerically():
    torch.manual_seed(0)
    model, h = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), Hyperparameter(0.1)
    inputs, v = torch.randn(8, 3), None
    found = []
    for net in (model, torch.compile(model, backend="aot_eager")):
        prefix = "" if net is model else "_orig_mod."

        def loss(params, hypers, batch, net=net, prefix=prefix):
            outputs = torch.func.functional_call(net, {prefix + n: p for n, p in params.items()}, (inputs,))
            return outputs.square().mean() + hypers["h"] * sum(p.square().sum() for p in params.values())

        problem = BilevelProblem(model, loss, loss, hypers={"h": h})
        v = v or {n: torch.randn_like(p) for n, p in problem.params.items()}
        found.append(torch.cat([x.reshape(-1) for x in problem.hvp(v, 0).values()]))
        assert net is model or problem.fallback is not None
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_ridge_problem_is_tuned_on_an_accelerator():
    model, decay = nn.Linear(3, 1, bias=False).cuda(), Hyperparameter(1.0, chart="exp").cuda()
    data = torch.randn(20, 3, device="cuda")
    inner = lambda p, v, b: (data @ p["weight"].T - 1).square().mean() + v["d"] * p["weight"].square().sum()  # noqa: E731
    outer = lambda p, v, b: (data @ p["weight"].T - 1).square().mean()  # noqa: E731
    tuner = BOREP(BilevelProblem(model, inner, outer, hypers={"d": decay}), 0.1, 0.1, 0.1)
    tuner.run([0], [0], steps=30)
    assert float(decay()) < 0.5
