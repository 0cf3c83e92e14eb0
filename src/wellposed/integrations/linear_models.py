"""Ridge and logistic regression under learned penalties: both levels of the bilevel problem in closed form."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..tuning.lower_level import Values

INTERCEPT_PENALTY = 1e-3


class Standardisation:
    """Features of mean 0 and standard deviation 1 on training data; without an intercept they are only scaled.

    Args:
        X: training inputs.
        y: training targets of a regression, to be centred; None for classes.
        centre: whether to subtract means.

    Attributes:
        mean, scale: of the features.
        target_mean: of the targets.

    Example:
        >>> scale = Standardisation(np.array([[0.0], [2.0]]), np.array([1.0, 3.0]), centre=True)
        >>> scale.inputs(np.array([[0.0], [2.0]])).tolist(), scale.targets(np.array([1.0, 3.0])).tolist()
        ([[-1.0], [1.0]], [-1.0, 1.0])
    """

    def __init__(self, X: np.ndarray, y: np.ndarray | None, centre: bool) -> None:
        self.mean = X.mean(0) if centre else np.zeros(X.shape[1])
        scale = np.sqrt(((X - self.mean) ** 2).mean(0))
        # A feature that does not vary (but for rounding) keeps its scale: its penalty then decides.
        self.scale = np.where(scale > 1e-12 * (1 + np.abs(self.mean)), scale, 1.0)
        self.target_mean = float(y.mean()) if centre and y is not None else 0.0

    def inputs(self, X: np.ndarray) -> Float[Tensor, "examples features"]:
        """Standardised inputs."""
        return torch.from_numpy((X - self.mean) / self.scale)

    def targets(self, y: np.ndarray) -> Float[Tensor, " examples"]:
        """Centred targets."""
        return torch.from_numpy(np.asarray(y, np.float64) - self.target_mean)


class RidgeLevels:
    """`h = mean((X w - t)^2) / 2 + sum_j weight_j w_j^2 / 2`, upper loss `mean((V w - s)^2) / 2`.

    Args:
        inputs, targets: X and t.
        validation, validation_targets: V and s.

    Attributes:
        curvature_bound: the Hessian of the loss is at most this times `X'X / n`.
        quadratic: whether h is quadratic in w.
    """

    curvature_bound, quadratic = 1.0, True

    def __init__(
        self,
        inputs: Float[Tensor, "examples features"],
        targets: Float[Tensor, " examples"],
        validation: Float[Tensor, "held_out features"],
        validation_targets: Float[Tensor, " held_out"],
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.validation, self.validation_targets = validation, validation_targets

    def start(self) -> Tensor:
        """Coefficients zero."""
        return torch.zeros(self.inputs.shape[1], dtype=self.inputs.dtype)

    def mu(self, values: Values) -> Tensor:
        """Modulus of strong convexity."""
        return values["weight"].min()

    def largest_weight(self, values: Values) -> Tensor:
        """What the penalty adds to the modulus of smoothness."""
        return values["weight"].max()

    def jacobian_norm(self, w: Tensor, values: Values) -> Tensor:
        """Norm of the mixed derivative in the log-weights: it is diagonal."""
        return (values["weight"] * w).abs().max()

    def objective(self, w: Tensor, values: Values) -> Tensor:
        """The inner objective."""
        fit = (self.inputs @ w - self.targets).square().mean()
        return 0.5 * (fit + (values["weight"] * w.square()).sum())

    def gradient(self, w: Tensor, values: Values) -> Tensor:
        """Its gradient in w."""
        return self.inputs.T @ (self.inputs @ w - self.targets) / len(self.inputs) + values["weight"] * w

    def second(self, w: Tensor, values: Values) -> _RidgeCurvature:
        """Its second derivatives."""
        return _RidgeCurvature(self.inputs, w, values["weight"])

    def loss(self, w: Tensor) -> Tensor:
        """The upper loss."""
        return 0.5 * (self.validation @ w - self.validation_targets).square().mean()

    def loss_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The upper loss and its gradient."""
        residual = self.validation @ w - self.validation_targets
        return 0.5 * residual.square().mean(), self.validation.T @ residual / len(residual)


class LogisticLevels:
    """`h = mean cross-entropy + sum_j weight_j sum_c w_cj^2 / 2`, upper loss: cross-entropy on validation data.

    Args:
        inputs, labels: training data, labels from 0.
        validation, validation_labels: validation data.
        classes: number of classes.
        intercept: whether a constant feature with a small fixed penalty is appended.
    """

    curvature_bound, quadratic = 0.5, False

    def __init__(
        self,
        inputs: Float[Tensor, "examples features"],
        labels: Int[Tensor, " examples"],
        validation: Float[Tensor, "held_out features"],
        validation_labels: Int[Tensor, " held_out"],
        classes: int,
        intercept: bool,
    ) -> None:
        self.inputs, self.validation = (F.pad(x, (0, 1), value=1.0) if intercept else x for x in (inputs, validation))
        self.labels, self.validation_labels = labels, validation_labels
        self.classes, self.intercept = classes, intercept
        self._columns, self._held_out_columns = self.inputs.T.contiguous(), self.validation.T.contiguous()
        # Classes by examples: a softmax over the first axis is fast for few classes.
        self._targets, self._held_out_targets = (
            F.one_hot(y, classes).T.to(inputs.dtype).contiguous() for y in (labels, validation_labels)
        )

    def start(self) -> Tensor:
        """Coefficients zero: (classes, features)."""
        return torch.zeros(self.classes, self.inputs.shape[1], dtype=self.inputs.dtype)

    def weights(self, values: Values) -> Tensor:
        """One weight a column: the learned ones, and the intercept's."""
        columns = self.inputs.shape[1] - self.intercept
        weight = values["weight"].expand(columns)
        return F.pad(weight, (0, 1), value=INTERCEPT_PENALTY) if self.intercept else weight

    def mu(self, values: Values) -> Tensor:
        """Modulus of strong convexity."""
        return self.weights(values).min()

    def largest_weight(self, values: Values) -> Tensor:
        """What the penalty adds to the modulus of smoothness."""
        return self.weights(values).max()

    def objective(self, w: Tensor, values: Values) -> Tensor:
        """The inner objective."""
        return F.cross_entropy(self.inputs @ w.T, self.labels) + 0.5 * (self.weights(values) * w.square()).sum()

    def gradient(self, w: Tensor, values: Values) -> Tensor:
        """Its gradient in w."""
        errors = torch.softmax(w @ self._columns, 0) - self._targets
        return errors @ self.inputs / len(self.inputs) + self.weights(values) * w

    def second(self, w: Tensor, values: Values) -> _LogisticCurvature:
        """Its second derivatives."""
        learned = w[:, : self.inputs.shape[1] - self.intercept]
        return _LogisticCurvature(self._columns, self.inputs, w, self.weights(values), learned, values["weight"].ndim)

    def loss(self, w: Tensor) -> Tensor:
        """The upper loss."""
        return F.cross_entropy(self.validation @ w.T, self.validation_labels)

    def loss_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The upper loss and its gradient."""
        log_p = torch.log_softmax(w @ self._held_out_columns, 0)
        loss = -(log_p * self._held_out_targets).sum() / len(self.validation)
        return loss, (log_p.exp() - self._held_out_targets) @ self.validation / len(self.validation)


class _RidgeCurvature:
    def __init__(self, inputs: Tensor, w: Tensor, weight: Tensor) -> None:
        self.inputs, self.w, self.weight = inputs, w, weight

    def hvp(self, vector: Tensor, /) -> Tensor:
        return self.inputs.T @ (self.inputs @ vector) / len(self.inputs) + self.weight * vector

    def mixed_vjp(self, vector: Tensor, /) -> Values:
        found = vector * self.w
        return {"weight": found if self.weight.ndim else found.sum()}


class _LogisticCurvature:
    def __init__(
        self, columns: Tensor, inputs: Tensor, w: Tensor, weights: Tensor, learned: Tensor, per_feature: int
    ) -> None:
        self.columns, self.inputs, self.weights = columns, inputs, weights
        self.learned, self.per_feature = learned, per_feature
        self.p = torch.softmax(w @ columns, 0)

    def hvp(self, vector: Tensor, /) -> Tensor:
        s = self.p * (vector @ self.columns)
        s = s - self.p * s.sum(0)
        return s @ self.inputs / len(self.inputs) + self.weights * vector

    def mixed_vjp(self, vector: Tensor, /) -> Values:
        found = (vector[:, : self.learned.shape[1]] * self.learned).sum(0)
        return {"weight": found if self.per_feature else found.sum()}
