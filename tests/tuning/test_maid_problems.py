"""MAID on the problems that users bring: networks under a method, plain losses, `fit`; and what it refuses."""

import math
from functools import partial

import pytest
import torch
from jaxtyping import config
from scipy.optimize import minimize_scalar
from torch import nn

from wellposed import BilevelProblem, Hyperparameter, IndexedDataset, Regularizer, fit
from wellposed.hyperparameter import value_of
from wellposed.losses import EarlyLearning
from wellposed.tuning import HOAG, MAID, CertifiedProblem, FixedArmijo, FixedStep, Known, LowerLevel, UpperLoss
from wellposed.tuning.certified_problem import largest_curvature

F64 = torch.float64


@pytest.fixture
def unchecked():
    """For bad arguments, which jaxtyping would refuse before our own errors, and for runs of many small steps."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


class SquaredPenalty(Regularizer):
    """`strength |w|^2` of all parameters."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def penalty(self, step):
        return value_of(self.strength) * sum(p.square().sum() for p in step.model.parameters())


def squared_error(outputs, targets):
    return (outputs[:, 0] - targets).square()


def ridge_data(seed=0, features=6):
    g = torch.Generator().manual_seed(seed)
    planted = torch.randn(features, generator=g, dtype=F64)
    parts = []
    for count in (25, 40):
        X = torch.randn(count, features, generator=g, dtype=F64)
        parts.append((X, X @ planted + 2 * torch.randn(count, generator=g, dtype=F64)))
    return parts


def best_log_weight(train, validation):
    (X, t), (V, s) = train, validation

    def f(u):
        w = torch.linalg.solve(X.T @ X / len(X) + math.exp(u) * torch.eye(X.shape[1], dtype=F64), X.T @ t / len(X))
        return float((V @ w - s).square().mean())

    return minimize_scalar(f, bounds=(-8, 5), method="bounded", options={"xatol": 1e-8}).x


def network_problem():
    train, validation = ridge_data()
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    strength = Hyperparameter(0.01, chart="exp").double()
    problem = BilevelProblem.from_regularizer(model, SquaredPenalty(strength), squared_error)
    return problem, strength, train, validation


MU = {"mu": lambda v: 2 * v["strength"]}


@pytest.mark.parametrize(
    "make",
    [
        partial(MAID, alpha0=1.0, on_uncertified="ignore", **MU),
        partial(FixedArmijo, eps=1e-6, alpha=1.0, on_uncertified="ignore", **MU),
        partial(FixedStep, eps=1e-6, alpha=1.0, on_uncertified="ignore", **MU),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_network_under_a_squared_penalty_lands_on_the_weight_that_brent_finds(make):
    problem, strength, train, validation = network_problem()
    tuner = make(problem)
    tuner.run([train], [validation], 60, tol=1e-2)
    assert float(strength.raw) == pytest.approx(best_log_weight(train, validation), abs=0.05)
    # The network holds the inner solution, and the counts are the problem's.
    X, t = train
    w = torch.linalg.solve(X.T @ X / 25 + float(strength.value) * torch.eye(6, dtype=F64), X.T @ t / 25)
    torch.testing.assert_close(problem.model.weight[0], w, rtol=0, atol=2e-2)
    assert problem.counts.inner_grad >= tuner.work.inner > 0


@pytest.mark.usefixtures("unchecked")
def test_a_network_whose_constants_are_known_is_certified():
    problem, _, train, validation = network_problem()
    (X, _), (V, _) = train, validation
    L_data, L_g = (2 * float(torch.linalg.eigvalsh(A.T @ A)[-1]) / len(A) for A in (X, V))
    tuner = MAID(problem, L=Known(lambda v: L_data + 2 * v["strength"]), L_g=L_g, **MU)
    info = tuner.step(iter([train]), iter([validation]))
    assert info.certified and tuner.certified
    uncertain = MAID(network_problem()[0], on_uncertified="warn", **MU)
    with pytest.warns(UserWarning, match="L, L_g only estimated"):
        assert not uncertain.step(iter([train]), iter([validation])).certified
    assert uncertain.work.hvp > tuner.work.hvp  # the estimates are paid for


def test_the_problem_s_own_modulus_is_used_where_none_is_given():
    w, target = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    shift = Hyperparameter(0.2, -9.0, 9.0, chart="sigmoid").double()
    problem = BilevelProblem(
        None,
        lambda p, v, b: 0.5 * (p["w"] - v["shift"] * b).square().sum(),
        lambda p, v, b: 0.5 * (p["w"] - 2.0 * b).square().sum() + 0.0 * v["shift"],
        params={"w": w}, hypers={"shift": shift}, strong_convexity=1.0,
    )  # fmt: skip
    tuner = MAID(problem, alpha0=1.0, on_uncertified="ignore")
    tuner.run([target], [target], 60, tol=1e-4)
    assert float(shift.value) == pytest.approx(2.0, abs=1e-3)
    torch.testing.assert_close(problem.params["w"], target * shift.value, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_a_resumed_network_continues_bit_for_bit():
    data, tuners = None, []
    for _ in range(3):
        problem, strength, *data = network_problem()
        tuners.append((MAID(problem, alpha0=1.0, on_uncertified="ignore", **MU), strength))
    (whole, weight), (first, _), (second, resumed) = tuners
    whole.run([data[0]], [data[1]], 4)
    first.run([data[0]], [data[1]], 2)
    second.load_state_dict(first.state_dict())
    second.run([data[0]], [data[1]], 2)
    assert torch.equal(resumed.raw, weight.raw)
    assert second.work.inner == whole.work.inner
    assert torch.equal(second.problem.params["weight"], whole.problem.params["weight"])


def test_fit_takes_it_as_a_tuner():
    train, validation = ridge_data()
    model = nn.Linear(6, 1, bias=False).double()
    strength = Hyperparameter(0.01, chart="exp").double()
    result = fit(
        model, IndexedDataset(torch.utils.data.TensorDataset(*train)), batch_size=40, epochs=6, seed=0,
        validation=torch.utils.data.TensorDataset(*validation), regularizer=SquaredPenalty(strength),
        criterion=squared_error, tuner=partial(MAID, alpha0=1.0, on_uncertified="ignore", **MU),
    )  # fmt: skip
    assert float(strength.raw) == pytest.approx(best_log_weight(train, validation), abs=0.05)
    assert len(result.history) == 6 and result.tuner is not None


def test_batches_that_are_not_all_the_data_are_refused():
    train, validation = ridge_data()
    strength = Hyperparameter(0.01, chart="exp").double()
    with pytest.raises(ValueError, match=r"MAID: the train batches differ; .*batch_size=len\(data\)"):
        fit(
            nn.Linear(6, 1).double(), torch.utils.data.TensorDataset(*train), batch_size=10, epochs=2, seed=0,
            validation=torch.utils.data.TensorDataset(*validation), regularizer=SquaredPenalty(strength),
            criterion=squared_error, tuner=partial(MAID, on_uncertified="ignore", **MU),
        )  # fmt: skip
    with pytest.raises(ValueError, match="needs iterators of its batches"):
        MAID(network_problem()[0], on_uncertified="ignore", **MU).step()


# Refusals


def regularized(model, method=None):
    strength = Hyperparameter(0.1, chart="exp")
    return BilevelProblem.from_regularizer(model, method or SquaredPenalty(strength), squared_error)


@pytest.mark.parametrize("train", [True, False])
def test_random_and_batch_dependent_networks_are_refused_in_either_mode(train):
    for layer, words in ((nn.Dropout(0.5), "draws random numbers"), (nn.BatchNorm1d(3), "statistics of the batch")):
        model = nn.Sequential(nn.Linear(2, 3), layer, nn.Linear(3, 1)).train(train)
        with pytest.raises(ValueError, match=f"'1' .*{words}"):
            MAID(regularized(model), mu=0.1)
    MAID(regularized(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.0), nn.Linear(3, 1)).train(train)), mu=0.1)


def test_methods_that_keep_state_are_refused_by_name():
    method = EarlyLearning(10, 2, strength=Hyperparameter(1.0))
    with pytest.raises(ValueError, match="MAID cannot train under EarlyLearning, which acts in 'on_backward'"):
        MAID(regularized(nn.Linear(2, 2), method), mu=0.1)


def test_a_problem_without_a_modulus_is_refused():
    for make in (MAID, HOAG, partial(FixedStep, eps=0.1, alpha=0.1)):
        with pytest.raises(ValueError, match="mu is missing: give the modulus of strong convexity"):
            make(regularized(nn.Linear(2, 1)))


def test_a_hyperparameter_that_the_training_loss_cannot_feel_is_refused():
    method = SquaredPenalty(Hyperparameter(0.1, chart="exp"))
    method.count = Hyperparameter(3.0, 1.0, 9.0, discrete=True)
    with pytest.raises(ValueError, match="'count' is discrete"):
        MAID(regularized(nn.Linear(2, 1), method), mu=0.1)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x0": torch.zeros(2, dtype=torch.int64)}, TypeError, "x0 must be a floating tensor, got torch.int64"),
        ({"x0": torch.zeros(2, dtype=torch.bfloat16)}, TypeError, "float32 or float64"),
        ({"mu": None}, ValueError, "mu is missing and cannot be inferred"),
        ({"L": None}, ValueError, "L is missing and cannot be inferred"),
        ({"mu": "1"}, TypeError, "mu must be a number"),
        ({"hypers": {}}, ValueError, "hypers is empty"),
        ({"hypers": {"a": 1.0}}, TypeError, "must be a Hyperparameter, got float"),
        ({"hypers": {"a": Hyperparameter(2.0, discrete=True)}}, ValueError, "is discrete"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_inner_problem_that_makes_no_sense_is_refused(changes, error, words):
    arguments = {"x0": torch.zeros(2), "hypers": {"a": Hyperparameter(1.0)}, "mu": 1.0, "L": 1.0, **changes}
    with pytest.raises(error, match=words):
        LowerLevel(lambda x, v: x.square().sum(), **arguments)


@pytest.mark.usefixtures("unchecked")
def test_losses_of_the_wrong_shape_are_named():
    h = {"a": Hyperparameter(1.0)}
    lower = LowerLevel(lambda x, v: x.square(), torch.zeros(2), h, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"objective must return a scalar, got shape \(2,\)"):
        lower.gradient(lower.x0, lower.u0)
    upper = UpperLoss(lambda x: x.square().sum(), 1.0)
    with pytest.raises(ValueError, match=r"value must return one number a sample, shape \(3,\)"):
        upper.value_and_gradient(torch.zeros(3, 2), per_sample=True)
    with pytest.raises(ValueError, match="L_g is missing"):
        UpperLoss(lambda x: x.sum(), None)
    with pytest.raises(TypeError, match="takes a LowerLevel and an UpperLoss, got LowerLevel and function"):
        CertifiedProblem(lower, lambda x: x)


def test_an_objective_without_a_second_derivative_is_an_error():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 0.5 * x.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]

    weight = Hyperparameter(1.0, chart="exp").double()
    lower = LowerLevel(
        lambda x, v: Once.apply(x - 1.0) + 0.5 * v["weight"] * x.square().sum(), torch.zeros(2, dtype=F64),
        {"weight": weight}, 1.0, 9.0,
    )  # fmt: skip
    tuner = MAID(CertifiedProblem(lower, UpperLoss(lambda x: x.square().sum(), 2.0, True)))
    with pytest.raises(
        ValueError, match="the Hessian product differs from differences of the gradient by .* once_differ"
    ):
        tuner.step()


@pytest.mark.parametrize("what", ["hvp", "mixed_vjp"])
def test_a_slip_in_a_closed_form_is_found(what):
    y = torch.linspace(0, 1, 5, dtype=F64)

    class Slip:
        def __init__(self, x, weight):
            self.x, self.weight = x, weight

        def hvp(self, v):
            return (1 + self.weight * (2 if what == "hvp" else 1)) * v

        def mixed_vjp(self, v):
            return {"weight": (v * self.x).sum() * (-1 if what == "mixed_vjp" else 1)}

    lower = LowerLevel(
        lambda x, v: 0.5 * (x - y).square().sum() + 0.5 * v["weight"] * x.square().sum(), y,
        {"weight": Hyperparameter(1.0, chart="exp").double()}, lambda v: 1 + v["weight"], lambda v: 1 + v["weight"],
        curvature=lambda x, v: Slip(x, v["weight"]),
    )  # fmt: skip
    tuner = MAID(CertifiedProblem(lower, UpperLoss(lambda x: x.square().sum(), 2.0, True)))
    with pytest.raises(ValueError, match="Hessian product" if what == "hvp" else "mixed derivative differs"):
        tuner.step()


def test_the_largest_curvature_is_close_and_from_below():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(40, 30, generator=g, dtype=F64)
    exact = float(torch.linalg.eigvalsh(A.T @ A)[-1])
    found = largest_curvature(lambda x: 0.5 * (A @ x).square().sum(), torch.zeros(30, dtype=F64))
    assert 0.97 * exact <= found <= exact * (1 + 1e-12)
