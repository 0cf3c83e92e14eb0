"""Ridge and logistic regression whose penalties, one a feature, are learned on validation data: scikit-learn estimators.

    from wellposed.integrations.scikit_learn import BilevelRidge
    model = BilevelRidge().fit(X, y)              # or .fit(X, y, X_val, y_val)
    model.penalty_, model.certified_

Grid search can choose one penalty, not one for each of a thousand features; an implicit gradient can.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor

from ..hyperparameter import Hyperparameter
from ..numerics.eigenvalues import lanczos
from ..tuning import MAID, CertifiedProblem, Estimated, Known, LowerLevel, UpperLoss
from ..tuning.constants import Constant
from ..tuning.newton import newton_solver
from .linear_models import LogisticLevels, RidgeLevels, Standardisation

LEAST_PENALTY = 1e-4
"""Learned penalties stay above: without a penalty the inner problem need not be strongly convex."""
EXACT_UP_TO = 1500
"""Rows or columns up to which the largest singular value of the data is computed exactly; above, it is estimated."""


class _BilevelLinear(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the split, the descent on the penalties, and the certificate."""

    def __init__(
        self,
        penalty: Literal["per_feature", "single"] = "per_feature",
        *,
        initial_penalty: float = 0.1,
        max_outer: int = 50,
        budget: float = 20_000,
        tol: float = 1e-6,
        validation_fraction: float = 0.25,
        fit_intercept: bool = True,
        random_state: Any = None,
    ) -> None:
        self.penalty = penalty
        self.initial_penalty = initial_penalty
        self.max_outer = max_outer
        self.budget = budget
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.fit_intercept = fit_intercept
        self.random_state = random_state

    def _check_parameters(self) -> None:
        owner = type(self).__name__
        if self.penalty not in ("per_feature", "single"):
            raise ValueError(f"{owner}: penalty must be 'per_feature' or 'single', got {self.penalty!r}")
        for name, least in (("initial_penalty", LEAST_PENALTY), ("budget", 0.0), ("tol", 0.0)):
            if not getattr(self, name) > least:
                raise ValueError(f"{owner}: {name} must be > {least:g}, got {getattr(self, name)}")
        if not isinstance(self.max_outer, int) or self.max_outer < 1:
            raise ValueError(f"{owner}: max_outer must be an integer >= 1, got {self.max_outer!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"{owner}: validation_fraction must lie in (0, 1), got {self.validation_fraction}")

    def _split(self, X: np.ndarray, y: np.ndarray, X_val: Any, y_val: Any, stratify: bool) -> tuple[np.ndarray, ...]:
        """Train and validation data; the user's, or a split."""
        owner = type(self).__name__
        if (X_val is None) != (y_val is None):
            raise ValueError(f"{owner}: X_val and y_val must be given together")
        if X_val is not None:
            X_val, y_val = validate_data(self, X_val, y_val, reset=False, dtype=np.float64, y_numeric=not stratify)
            return X, X_val, y, y_val
        if len(X) < 2:
            raise ValueError(f"{owner}: cannot learn a penalty from 1 sample; give at least 2, or X_val and y_val")
        held_out = min(len(X) - 1, max(1, round(self.validation_fraction * len(X))))
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        labels = None
        if stratify:
            counts = np.unique(y, return_counts=True)[1]
            if counts.min() >= 2 and min(held_out, len(X) - held_out) >= len(counts):
                labels = y
        parts = train_test_split(X, y, test_size=held_out, random_state=seed, stratify=labels)
        return parts[0], parts[1], parts[2], parts[3]

    def _lower(self, levels: RidgeLevels | LogisticLevels, weight: Hyperparameter) -> LowerLevel:
        """The inner problem with its moduli, solved by Newton's method."""
        bound = _scaled(largest_eigenvalue(levels.inputs), levels.curvature_bound, levels.largest_weight)
        diagonal = isinstance(levels, RidgeLevels) and weight.raw.ndim
        lower = LowerLevel(
            levels.objective, levels.start(), {"weight": weight}, mu=levels.mu, L=bound, quadratic=levels.quadratic,
            J_norm=Known(levels.jacobian_norm) if isinstance(levels, RidgeLevels) and diagonal else None,
            L_J=levels.largest_weight if levels.quadratic else None,
            gradient=levels.gradient, curvature=levels.second,
        )  # fmt: skip
        lower.solver = newton_solver(lower)
        return lower

    def _learn(self, levels: RidgeLevels | LogisticLevels, features: int) -> Hyperparameter:
        """Descend on the penalties; returns the learned ones."""
        shape = (features,) if self.penalty == "per_feature" else ()
        weight = Hyperparameter(self.initial_penalty, LEAST_PENALTY, chart="exp", shape=shape).double()
        lower = self._lower(levels, weight)
        L_g = largest_eigenvalue(levels.validation)
        bound = _scaled(L_g, levels.curvature_bound, None)
        upper = UpperLoss(levels.loss, bound, convex=True, gradient=levels.loss_and_gradient)
        with warnings.catch_warnings():
            # The attributes certified_ and certificate_ say it.
            warnings.simplefilter("ignore", UserWarning)
            tuner = MAID(CertifiedProblem(lower, upper))
        tuner.run(max_outer=self.max_outer, budget=self.budget, tol=self.tol)
        self.certified_ = tuner.certified
        self.certificate_ = (
            "every accepted step lowered the exact validation loss"
            if tuner.certified
            else "the data's largest singular value was estimated: accepted steps are likely, not certain, to have "
            "lowered the exact validation loss"
        )
        self.n_iter_ = len(tuner.history)
        self.status_ = tuner.status
        self.validation_loss_ = tuner.history[-1].outer_loss
        self.penalty_ = weight.value.expand(features).numpy().copy()
        return weight


class BilevelRidge(RegressorMixin, _BilevelLinear):  # type: ignore[misc]
    """Ridge regression with one penalty a feature, learned on validation data by MAID (arXiv 2308.10098).

    Minimises `mean((X w + b - y)^2) / 2 + sum_j penalty_j w_j^2 / 2` over standardised features; the penalties minimise
    the mean squared error on validation data. With few validation examples and many features, they may overfit those.

    Args:
        penalty: "per_feature", or "single" for one penalty that all features share.
        initial_penalty: where the penalties start, > 1e-4, in units of standardised features.
        max_outer: largest number of steps on the penalties.
        budget: largest work, in gradients over the data.
        tol: norm of the hypergradient at which the descent ends.
        validation_fraction: share that is split off for validation where `fit` is given no validation data; the
            coefficients are then fitted to all data under the learned penalties.
        fit_intercept: whether to fit b.
        random_state: of the split.

    Attributes:
        coef_, intercept_: in units of the features given.
        penalty_: (features,), learned.
        certified_, certificate_: whether every accepted step provably lowered the exact validation loss, in words.
        validation_loss_: half the mean squared error on validation data, at the end of the descent.
        n_iter_, status_: steps on the penalties, and why they ended.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(80, 6))
        >>> y = X[:, 0] + 0.5 * np.random.default_rng(1).normal(size=80)
        >>> model = BilevelRidge(random_state=0).fit(X, y)
        >>> int(model.coef_.argmax()), bool(model.score(X, y) > 0.7), model.certified_
        (0, True, True)
    """

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> Self:
        """Learn penalties and coefficients.

        Args:
            X, y: training data, (examples, features) and (examples,).
            X_val, y_val: validation data; split off from X and y if not given.

        Raises:
            ValueError: for a parameter out of range, or validation data without targets.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        train, held_out, target, held_out_target = self._split(X, y, X_val, y_val, stratify=False)
        scale = Standardisation(train, target, self.fit_intercept)
        levels = RidgeLevels(
            scale.inputs(train), scale.targets(target), scale.inputs(held_out), scale.targets(held_out_target)
        )
        self._learn(levels, X.shape[1])
        if X_val is None:
            scale = Standardisation(X, y, self.fit_intercept)
            train, target = X, y
        inputs, centred = scale.inputs(train), scale.targets(target)
        system = inputs.T @ inputs / len(inputs) + torch.diag(torch.from_numpy(self.penalty_))
        w = torch.linalg.solve(system, inputs.T @ centred / len(inputs)).numpy()
        self.coef_ = w / scale.scale
        self.intercept_ = float(scale.target_mean - scale.mean @ self.coef_) if self.fit_intercept else 0.0
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions, (examples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return X @ self.coef_ + self.intercept_  # type: ignore[no-any-return]


class BilevelLogisticRegression(ClassifierMixin, _BilevelLinear):  # type: ignore[misc]
    """Multinomial logistic regression with one penalty a feature, learned on validation data by MAID.

    Minimises the mean cross-entropy plus `sum_j penalty_j sum_c w_cj^2 / 2` over standardised features; the penalties
    minimise the cross-entropy on validation data. Intercepts carry a fixed penalty of 1e-3, without which the inner
    problem would not be strongly convex.

    Args:
        penalty, initial_penalty, max_outer, budget, tol, validation_fraction, fit_intercept, random_state: as of
            `BilevelRidge`.

    Attributes:
        classes_: labels in order.
        coef_, intercept_: (classes, features) and (classes,); one row for two classes.
        penalty_, certified_, certificate_, validation_loss_, n_iter_, status_: as of `BilevelRidge`.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(120, 5))
        >>> y = np.where(X[:, 0] > 0, "yes", "no")
        >>> model = BilevelLogisticRegression(random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.9, int(model.penalty_.argmin())
        (True, 0)
    """

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> Self:
        """Learn penalties and coefficients; arguments and errors as of `BilevelRidge.fit`.

        Raises:
            ValueError: also for fewer than two classes, or validation labels that training does not have.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"BilevelLogisticRegression: needs at least 2 classes, got 1 class: {self.classes_[0]!r}")
        if y_val is not None:
            unknown = sorted(set(np.asarray(y_val).tolist()) - set(self.classes_.tolist()))
            if unknown:
                raise ValueError(f"BilevelLogisticRegression: y_val holds {unknown[0]!r}, which y does not")
            y_val = np.searchsorted(self.classes_, y_val)
        train, held_out, target, held_out_target = self._split(X, codes, X_val, y_val, stratify=True)
        scale = Standardisation(train, None, self.fit_intercept)
        levels = self._levels(scale, train, target, held_out, held_out_target)
        weight = self._learn(levels, X.shape[1])
        if X_val is None:
            scale = Standardisation(X, None, self.fit_intercept)
            levels = self._levels(scale, X, codes, held_out, held_out_target)
        w = self._coefficients(levels, weight).numpy()
        weights, bias = (w[:, :-1], w[:, -1]) if self.fit_intercept else (w, np.zeros(len(w)))
        weights = weights / scale.scale
        bias = bias - weights @ scale.mean if self.fit_intercept else bias
        if len(self.classes_) == 2:
            weights, bias = weights[1:] - weights[:1], bias[1:] - bias[:1]
        self.coef_, self.intercept_ = weights, bias
        return self

    def _levels(
        self, scale: Standardisation, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray
    ) -> LogisticLevels:
        return LogisticLevels(
            scale.inputs(X), torch.from_numpy(y), scale.inputs(X_val), torch.from_numpy(np.asarray(y_val)),
            len(self.classes_), self.fit_intercept,
        )  # fmt: skip

    def _coefficients(self, levels: LogisticLevels, weight: Hyperparameter) -> Tensor:
        """The inner solution under the learned penalties, to 1e-8."""
        lower = self._lower(levels, weight)
        values = {"weight": weight.value}
        mu, L = lower.mu.lower(values), lower.L.upper(values)
        assert lower.solver is not None
        return lower.solver(lower.x0, values, mu, L, 1e-8, 100_000, None).x[0]

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores: (examples, classes), or (examples,) for two classes."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores  # type: ignore[no-any-return]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (examples, classes)."""
        scores = torch.from_numpy(self.decision_function(X))
        if scores.ndim == 1:
            scores = torch.stack([torch.zeros_like(scores), scores], 1)
        return scores.softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels, (examples,)."""
        scores = self.decision_function(X)
        index = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        return self.classes_[index]  # type: ignore[no-any-return]


def largest_eigenvalue(inputs: Tensor) -> Constant:
    """Largest eigenvalue of `X'X / n`: exact and `Known` up to `EXACT_UP_TO` rows or columns, else `Estimated`.

    Example:
        >>> largest_eigenvalue(torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
        Known(value=2.0)
    """
    n, p = inputs.shape
    if min(n, p) <= EXACT_UP_TO:
        gram = inputs @ inputs.T if n < p else inputs.T @ inputs
        return Known(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])) / n)
    generator = torch.Generator().manual_seed(0)
    found = lanczos(lambda v: inputs.T @ (inputs @ v), p, min(20, p), generator, dtype=inputs.dtype).ritz()[0]
    return Estimated(float(found[-1]) / n, safety=1.1)


def _scaled(constant: Constant, factor: float, plus: Any) -> Constant:
    """`factor * constant + plus(hypers)`, known or estimated as the constant is."""
    size = factor * float(constant.value)  # type: ignore[arg-type]
    value: Any = size if plus is None else (lambda hypers: size + plus(hypers))
    return Known(value) if isinstance(constant, Known) else Estimated(value, constant.safety)
