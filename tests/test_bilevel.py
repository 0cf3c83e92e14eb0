"""The oracles against autograd and the closed form of ridge regression with a logarithmic weight."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from wellposed import BilevelProblem, Hyperparameter, TensorLoader
from wellposed.numerics import conjugate_gradient
from wellposed.objective import squared_error
from wellposed.tuner import StepInfo, Tuner, check_tunable
from wellposed.weights import WeightDecay

torch.manual_seed(0)
# Few and noisy rows, so that the best weight lies inside and not at zero.
A, B = torch.randn(12, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
TRUE = torch.randn(5, dtype=torch.float64)
Y, Z = A @ TRUE + 3.0 * torch.randn(12, dtype=torch.float64), B @ TRUE + 0.5 * torch.randn(40, dtype=torch.float64)


def ridge(u):
    return torch.linalg.solve(A.T @ A / 12 + u.exp() * torch.eye(5, dtype=torch.float64), A.T @ Y / 12)


def outer_value(u):
    return (B @ ridge(u) - Z).square().mean()


@pytest.fixture
def problem():
    model = nn.Linear(5, 1, bias=False).double()
    h = Hyperparameter(torch.tensor(0.3, dtype=torch.float64), chart="exp")
    h.double()

    def inner(w, v, batch):
        return (A @ w["weight"][0] - Y).square().mean() + v["decay"] * w["weight"].square().sum()

    def outer(w, v, batch):
        return (B @ w["weight"][0] - Z).square().mean()

    problem = BilevelProblem(model, inner, outer, hypers={"decay": h})
    with torch.no_grad():
        model.weight.copy_(ridge(h.raw)[None])
    return problem


def test_the_inner_gradient_vanishes_at_the_closed_form(problem):
    assert problem.inner_grad(None)["weight"].abs().max() < 1e-12
    assert problem.counts.inner_grad == 1


def hypergradient(problem):
    _, by_weight, by_raw = problem.outer_grads(None)
    solution = conjugate_gradient(
        lambda v: problem.hvp({"weight": v.reshape(1, 5)}, None)["weight"].reshape(-1),
        by_weight["weight"].reshape(-1),
        tol=1e-12,
        max_iterations=50,
    ).solution
    return by_raw["decay"] - problem.mixed_vjp({"weight": solution.reshape(1, 5)}, None)["decay"]


def test_implicit_differentiation_with_the_oracles_equals_the_derivative_of_the_closed_form(problem):
    u = problem.hypers["decay"].raw.clone().requires_grad_()
    expected = torch.autograd.grad(outer_value(u), u)[0]
    torch.testing.assert_close(hypergradient(problem), expected, rtol=1e-8, atol=1e-10)


def test_finite_differences_agree(problem):
    exact = hypergradient(problem)
    cheap = BilevelProblem(
        problem.model, problem.inner_loss, problem.outer_loss, hypers=problem.hypers, derivatives="differences"
    )
    assert cheap.fallback == "finite differences, as asked for"
    torch.testing.assert_close(hypergradient(cheap), exact, rtol=1e-4, atol=1e-6)
    with pytest.raises((ValueError, TypeError), match="derivatives"):  # the checker of annotations may come first
        BilevelProblem(problem.model, problem.inner_loss, problem.outer_loss, hypers=problem.hypers, derivatives="none")


def test_both_products_from_one_graph_equal_the_dense_derivatives(problem):
    vector = {"weight": torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    hvp, mixed = problem.second_derivatives(vector, None)

    def inner(w, u):
        return (A @ w - Y).square().mean() + u.exp() * w.square().sum()

    w, u, v = problem.model.weight.detach()[0], problem.hypers["decay"].raw, vector["weight"][0]
    (ww, wu), _ = torch.autograd.functional.hessian(inner, (w, u))
    torch.testing.assert_close(hvp["weight"][0], ww @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed["decay"], wu @ v, rtol=1e-12, atol=1e-12)
    assert (problem.counts.hvp, problem.counts.mixed_vjp) == (1, 1)


def test_half_precision_parameters_get_half_precision_products():
    model = nn.Linear(3, 1).bfloat16()
    loss = lambda w, v, b: (w["weight"].square().sum() + w["bias"].sum()) * v["h"]  # noqa: E731
    problem = BilevelProblem(model, loss, loss, hypers={"h": Hyperparameter(2.0)})
    vector = {n: torch.ones_like(p, dtype=torch.float32) for n, p in problem.params.items()}
    hvp, mixed = problem.second_derivatives(vector, None)
    assert hvp["weight"].dtype == torch.bfloat16
    assert bool((hvp["weight"] == 4).all())
    assert mixed["h"].dtype == torch.float32


def test_a_problem_of_plain_tensors_needs_no_model():
    w, h = torch.ones(2, requires_grad=True), Hyperparameter(1.0, chart="exp")
    loss = lambda p, v, b: v["h"] * p["w"].square().sum()  # noqa: E731
    problem = BilevelProblem(None, loss, loss, {"w": w}, {"h": h})
    torch.testing.assert_close(problem.hvp({"w": torch.ones(2)}, None)["w"], torch.full((2,), 2.0))
    with pytest.raises(ValueError, match=r"the parameter 'w' must be floating, got torch\.int64"):
        BilevelProblem(None, loss, loss, {"w": torch.ones(2, dtype=torch.int64)}, {"h": h})
    with pytest.raises(ValueError, match="'w' is a parameter and the hyperparameter 'h'"):
        BilevelProblem(None, loss, loss, {"w": h.raw}, {"h": h})


def test_a_function_without_second_derivative_falls_back_and_says_why():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    model = nn.Linear(3, 1, bias=False).double()
    loss = lambda w, v, b: Once.apply(w["weight"]).sum() * v["h"]  # noqa: E731
    problem = BilevelProblem(model, loss, loss, hypers={"h": Hyperparameter(2.0)})
    found = problem.hvp({"weight": torch.ones(1, 3, dtype=torch.float64)}, None)["weight"]
    torch.testing.assert_close(found, torch.full((1, 3), 4.0, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert "once_differentiable" in problem.fallback


def test_descending_the_hypergradient_lands_where_brent_finds_the_minimum(problem):
    best = minimize_scalar(lambda u: float(outer_value(torch.tensor(u))), bounds=(-8, 4), method="bounded").x
    h = problem.hypers["decay"]
    for _ in range(300):
        with torch.no_grad():
            problem.model.weight.copy_(ridge(h.raw)[None])
        h.raw.sub_(1.0 * hypergradient(problem).detach())
    assert -6 < best < 3
    assert abs(float(h.raw) - best) < 0.05


def test_inner_includes_the_penalty_and_outer_does_not():
    model, x, y = nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8)
    method = WeightDecay(Hyperparameter(0.5))
    problem = BilevelProblem.from_regularizer(model, method, squared_error)
    raw = problem.raw()
    inner, outer = (problem.evaluate(f, problem.params, raw, (x, y)) for f in (problem.inner_loss, problem.outer_loss))
    torch.testing.assert_close(inner - outer, 0.25 * model.weight.square().sum())
    assert torch.autograd.grad(inner, raw["strength"])[0] != 0
    swapped = {n: torch.zeros_like(p) for n, p in problem.params.items()}
    torch.testing.assert_close(problem.evaluate(problem.inner_loss, swapped, raw, (x, y)), y.square().mean())


def test_requirements_name_the_offending_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    problem = BilevelProblem(model, lambda w, v, b: None, lambda w, v, b: None, hypers={"h": Hyperparameter(1.0)})
    with pytest.raises(ValueError, match=r"MAID requires 'deterministic', but the module '1' \(Dropout\) draws random"):
        check_tunable(problem, {"deterministic"}, "MAID")
    with pytest.raises(ValueError, match="no response layer; convert it first"):
        check_tunable(problem, {"response_layers"}, "STN")
    with pytest.raises(ValueError, match="states no strong_convexity"):
        check_tunable(problem, {"strongly_convex"}, "MAID")
    check_tunable(problem, {"double_backward"}, "BOREP")


def test_a_tuner_stops_at_a_loss_that_is_not_finite_and_shows_the_values():
    class Broken(Tuner):
        def step(self, train, validation):
            return StepInfo(inner_loss=float("nan"))

    model = nn.Linear(1, 1)
    problem = BilevelProblem(model, lambda *_: None, lambda *_: None, hypers={"h": Hyperparameter(1.0)})
    loader = TensorLoader(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ArithmeticError, match=r"Broken: the inner loss is nan at .*'h'"):
        Broken(problem).run(loader, loader, 1)


def test_empty_problems_are_refused():
    with pytest.raises(ValueError, match="hypers is empty"):
        BilevelProblem(nn.Linear(1, 1), lambda *_: None, lambda *_: None)
    with pytest.raises(ValueError, match="params is empty"):
        BilevelProblem(nn.Identity(), lambda *_: None, lambda *_: None, hypers={"h": Hyperparameter(1.0)})
