"""The scikit-learn faces: its own test suite, the exact inner solution, honest certificates, and readable refusals."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from wellposed.integrations import scikit_learn
from wellposed.integrations.linear_models import INTERCEPT_PENALTY, LogisticLevels, RidgeLevels
from wellposed.integrations.scikit_learn import (
    LEAST_PENALTY,
    BilevelLogisticRegression,
    BilevelRidge,
    largest_eigenvalue,
)
from wellposed.tuning import Estimated, Known

FAST = {"max_outer": 4, "budget": 300, "random_state": 0}


@parametrize_with_checks([BilevelRidge(**FAST), BilevelLogisticRegression(**FAST)])
def test_scikit_learn_s_own_checks_pass(estimator, check):
    check(estimator)


def regression(seed=0, n=120, features=8):
    g = np.random.default_rng(seed)
    X = g.normal(size=(n, features)) * np.geomspace(0.1, 10, features) + 3
    w = np.zeros(features)
    w[:2] = 10.0, -2.0
    return X, X @ w + 2 * g.normal(size=n) + 5


def classification(seed=0, n=150, features=5, classes=3):
    g = np.random.default_rng(seed)
    X = g.normal(size=(n, features))
    scores = X[:, :1] * np.arange(classes) + X[:, 1:2] * np.arange(classes)[::-1]
    return X, np.array(["a", "b", "c"])[(scores + g.gumbel(size=(n, classes))).argmax(1)]


@pytest.mark.parametrize("intercept", [True, False])
def test_under_one_penalty_the_coefficients_are_ridge_s(intercept):
    X, y = regression()
    model = BilevelRidge("single", fit_intercept=intercept, random_state=0).fit(X, y)
    assert np.ptp(model.penalty_) == 0
    scale = np.sqrt(((X - (X.mean(0) if intercept else 0)) ** 2).mean(0))
    peer = Ridge(alpha=model.penalty_[0] * len(X), fit_intercept=intercept).fit(X / scale, y)
    np.testing.assert_allclose(model.coef_, peer.coef_ / scale, rtol=1e-6)
    np.testing.assert_allclose(model.predict(X), peer.predict(X / scale), rtol=1e-6)


def test_under_one_penalty_the_coefficients_are_logistic_regression_s():
    X, y = classification()
    X = StandardScaler().fit_transform(X)
    model = BilevelLogisticRegression("single", fit_intercept=False, random_state=0).fit(X, y)
    peer = LogisticRegression(C=1 / (model.penalty_[0] * len(X)), fit_intercept=False, tol=1e-10, max_iter=2000)
    scale = np.sqrt((X**2).mean(0))
    peer.fit(X / scale, y)
    np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(X / scale), atol=1e-5)


def test_given_validation_data_the_penalties_minimise_the_loss_there():
    """No penalty nearby gives a lower validation loss: the descent has arrived."""
    X, y = regression()
    V, s = regression(1)
    model = BilevelRidge(max_outer=200, tol=1e-8).fit(X, y, V, s)
    mean, scale = X.mean(0), X.std(0)
    train, held_out = (X - mean) / scale, (V - mean) / scale

    def loss(penalty):
        w = np.linalg.solve(train.T @ train / len(X) + np.diag(penalty), train.T @ (y - y.mean()) / len(X))
        return 0.5 * np.mean((held_out @ w - (s - y.mean())) ** 2)

    best = loss(model.penalty_)
    assert best == pytest.approx(model.validation_loss_, rel=1e-4)
    for j in range(X.shape[1]):
        for factor in (0.8, 1.25):
            other = model.penalty_.copy()
            other[j] = max(LEAST_PENALTY, other[j] * factor)
            assert loss(other) >= best - 1e-3 * best


def test_one_penalty_a_feature_fits_the_validation_data_better_than_one_for_all():
    X, y = regression()
    V, s = regression(1)
    single, many = (BilevelRidge(penalty).fit(X, y, V, s).validation_loss_ for penalty in ("single", "per_feature"))
    assert many < single


def test_closed_forms_are_autograd_s():
    g = torch.Generator().manual_seed(0)
    X, V = torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randn(15, 4, generator=g, dtype=torch.float64)
    y, s = torch.arange(20) % 3, torch.arange(15) % 3
    for levels in (
        RidgeLevels(X, y.double(), V, s.double()),
        LogisticLevels(X, y, V, s, 3, True),
        LogisticLevels(X, y, V, s, 3, False),
    ):
        for shape in ((), (4,)):
            values = {"weight": torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)}
            w = torch.randn(levels.start().shape, generator=g, dtype=torch.float64).requires_grad_()
            v = torch.randn(levels.start().shape, generator=g, dtype=torch.float64)
            slope = torch.autograd.grad(levels.objective(w, values), w, create_graph=True)[0]
            torch.testing.assert_close(levels.gradient(w, values), slope)
            hvp, mixed = torch.autograd.grad(slope, (w, values["weight"]), v)
            second = levels.second(w.detach(), {"weight": values["weight"].detach()})
            torch.testing.assert_close(second.hvp(v), hvp)
            torch.testing.assert_close(second.mixed_vjp(v)["weight"], mixed)
            loss, gradient = levels.loss_and_gradient(w.detach())
            torch.testing.assert_close(loss, levels.loss(w.detach()))
            torch.testing.assert_close(gradient, torch.autograd.grad(levels.loss(w), w)[0])
    assert float(levels.mu(values).detach()) == pytest.approx(0.3)
    assert float(LogisticLevels(X, y, V, s, 3, True).mu(values).detach()) == pytest.approx(INTERCEPT_PENALTY)


def test_the_certificate_says_when_a_constant_was_estimated(monkeypatch):
    X, y = regression()
    known = BilevelRidge(random_state=0).fit(X, y)
    assert known.certified_ and known.certificate_ == "every accepted step lowered the exact validation loss"
    monkeypatch.setattr(scikit_learn, "EXACT_UP_TO", 2)
    guessed = BilevelRidge(random_state=0).fit(X, y)
    assert not guessed.certified_ and "estimated" in guessed.certificate_
    np.testing.assert_allclose(guessed.predict(X), known.predict(X), rtol=0.05)


def test_the_largest_eigenvalue_is_exact_or_said_to_be_estimated(monkeypatch):
    inputs = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = float(torch.linalg.eigvalsh(inputs.T @ inputs)[-1]) / 30
    assert isinstance(largest_eigenvalue(inputs), Known)
    assert largest_eigenvalue(inputs).value == pytest.approx(exact)
    assert largest_eigenvalue(inputs.T).value == pytest.approx(exact * 30 / 12)
    monkeypatch.setattr(scikit_learn, "EXACT_UP_TO", 2)
    guess = largest_eigenvalue(inputs)
    assert isinstance(guess, Estimated) and exact <= guess.upper() <= 1.11 * exact


def test_it_stands_in_a_pipeline_and_a_clone_is_fresh():
    X, y = classification()
    model = make_pipeline(StandardScaler(), BilevelLogisticRegression(**FAST)).fit(X, y)
    assert model.score(X, y) > 0.5
    assert not hasattr(clone(model[-1]), "coef_")
    again = make_pipeline(StandardScaler(), BilevelLogisticRegression(**FAST)).fit(X, y)
    np.testing.assert_array_equal(model[-1].coef_, again[-1].coef_)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"penalty": "both"}, "penalty must be 'per_feature' or 'single'"),
        ({"initial_penalty": 0.0}, "initial_penalty must be > 0.0001"),
        ({"budget": 0}, "budget must be > 0"),
        ({"tol": -1.0}, "tol must be > 0"),
        ({"max_outer": 0}, "max_outer must be an integer >= 1"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie in"),
    ],
)
@pytest.mark.parametrize("kind", [BilevelRidge, BilevelLogisticRegression])
def test_parameters_out_of_range_are_named_at_fit(kind, changes, words):
    X, _ = regression()
    with pytest.raises(ValueError, match=f"{kind.__name__}: {words}"):
        kind(**changes).fit(X, np.arange(len(X)) % 2)


def test_validation_data_that_make_no_sense_are_refused():
    X, y = classification()
    with pytest.raises(ValueError, match="X_val and y_val must be given together"):
        BilevelLogisticRegression().fit(X, y, X)
    with pytest.raises(ValueError, match="y_val holds 'z', which y does not"):
        BilevelLogisticRegression().fit(X, y, X[:2], ["a", "z"])
    with pytest.raises(ValueError, match="features"):
        BilevelRidge().fit(X, np.arange(len(X)), X[:, :2], np.arange(len(X)))
    with pytest.raises(ValueError, match="at least 2 classes, got 1 class"):
        BilevelLogisticRegression().fit(X, ["a"] * len(X))
