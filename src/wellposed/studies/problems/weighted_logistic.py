"""Multinomial logistic regression on digits with one L2 weight for each of its 650 coefficients."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ...hyperparameter import Hyperparameter
from ...tuning import CertifiedProblem, FixedStep, InnerSolverError, LowerLevel, UpperLoss
from ...tuning.lower_level import Values

CLASSES = 10
TRAIN, VALIDATION = 600, 400
LOG_WEIGHT = -3.0
"""Where every log-weight starts."""


class WeightedLogistic:
    """`h = mean cross-entropy + sum_i exp(theta_i) w_i^2 / 2`, upper loss: mean cross-entropy on validation data.

    Args:
        seed: re-draws the stratified split.
        train, validation: numbers of examples; the rest tests.

    Example:
        >>> problem = WeightedLogistic(seed=0)
        >>> problem.inputs.shape, len(problem.test_labels)
        (torch.Size([600, 65]), 797)
    """

    def __init__(self, seed: int, train: int = TRAIN, validation: int = VALIDATION) -> None:
        inputs, labels = _digits()
        rest, test = train_test_split(
            np.arange(len(labels)), test_size=len(labels) - train - validation, stratify=labels, random_state=seed
        )
        first, second = train_test_split(rest, test_size=validation, stratify=labels[rest], random_state=seed)
        self.inputs, self.validation, self.test = (torch.from_numpy(inputs[part]) for part in (first, second, test))
        self.labels, self.validation_labels, self.test_labels = (
            torch.from_numpy(labels[part]) for part in (first, second, test)
        )
        # Classes by examples: softmax over the first axis is several times faster than over a last axis of ten.
        self._columns, self._validation_columns = self.inputs.T.contiguous(), self.validation.T.contiguous()
        self._targets, self._validation_targets = (
            torch.nn.functional.one_hot(labels, CLASSES).T.double().contiguous()
            for labels in (self.labels, self.validation_labels)
        )
        # The Hessian of the softmax cross-entropy in the logits is at most 1/2.
        self.L_data, self.L_g = (
            float(torch.linalg.eigvalsh(x.T @ x)[-1]) / (2 * len(x)) for x in (self.inputs, self.validation)
        )

    def levels(self) -> CertifiedProblem:
        """The problem for tuners, at log-weights -3 and coefficients 0."""
        shape = (CLASSES, self.inputs.shape[1])
        weight = Hyperparameter(torch.full(shape, LOG_WEIGHT).exp(), chart="exp", shape=shape).double()
        with torch.no_grad():
            weight.raw.fill_(LOG_WEIGHT)
        lower = LowerLevel(
            self._objective, torch.zeros(shape, dtype=torch.float64), {"weight": weight},
            mu=lambda v: v["weight"].min(), L=lambda v: self.L_data + v["weight"].max(),
            gradient=self._gradient, curvature=lambda x, v: _Curvature(self._columns, self.inputs, x, v["weight"]),
        )  # fmt: skip
        return CertifiedProblem(lower, UpperLoss(self._upper, self.L_g, convex=True, gradient=self._upper_gradient))

    def _objective(self, w: Tensor, values: Values) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.inputs @ w.T, self.labels)
        return loss + 0.5 * (values["weight"] * w.square()).sum()

    def _gradient(self, w: Tensor, values: Values) -> Tensor:
        errors = torch.softmax(w @ self._columns, 0).sub_(self._targets)
        return torch.addcmul((errors @ self.inputs).div_(len(self.inputs)), values["weight"], w)

    def _upper(self, w: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.validation @ w.T, self.validation_labels)

    def _upper_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(w @ self._validation_columns, 0)
        loss = -(log_p * self._validation_targets).sum() / len(self.validation)
        errors = log_p.exp_().sub_(self._validation_targets)
        return loss, (errors @ self.validation).div_(len(self.validation))

    def f(self, u: Tensor, start: Tensor, eps: float = 1e-4) -> tuple[float, Tensor]:
        """The upper loss at unconstrained values u with an inner solve to `eps`, and the coefficients found.

        Infinite where the inner problem is too stiff to be solved.
        """
        problem = self.levels()
        solver = FixedStep(problem, eps, 1.0, max_inner=20_000)
        try:
            point = solver.solve_at(u, start, eps)
        except InnerSolverError:
            return math.inf, start[0]
        return point.upper, point.x[0]

    def test_metrics(self, w: Tensor) -> dict[str, float]:
        """Cross-entropy and accuracy (in %) on test data."""
        logits = self.test @ w.T
        loss = torch.nn.functional.cross_entropy(logits, self.test_labels)
        return {"loss": float(loss), "accuracy": 100.0 * float((logits.argmax(1) == self.test_labels).double().mean())}


class _Curvature:
    def __init__(self, columns: Tensor, inputs: Tensor, w: Tensor, weight: Tensor) -> None:
        self.columns, self.inputs, self.w, self.weight = columns, inputs, w, weight
        self.p = torch.softmax(w @ columns, 0)

    def hvp(self, vector: Tensor, /) -> Tensor:
        s = (vector @ self.columns).mul_(self.p)
        s.addcmul_(self.p, s.sum(0, keepdim=True), value=-1.0)
        return torch.addcmul((s @ self.inputs).div_(len(self.inputs)), self.weight, vector)

    def mixed_vjp(self, vector: Tensor, /) -> Values:
        return {"weight": vector * self.w}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = load_digits(return_X_y=True)
    return np.hstack([inputs / 16, np.ones((len(inputs), 1))]), labels.astype(np.int64)
