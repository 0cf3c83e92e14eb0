"""What is exactly true of best responses: gating under ridge, the Jacobian for quadratic losses, and what has a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...bilevel import BilevelProblem
from ...compose import Compose
from ...features import Cutout
from ...hyperparameter import Hyperparameter
from ...lab.study import Case
from ...objective import cross_entropy
from ...tuning import HyperDropout, SelfTuner

DRAWS = 5


def ridge_weights(x: Tensor, targets: Tensor, log_strength: float) -> Tensor:
    """Argmin over w of (1/n) ||X w - t||^2 + exp(log_strength) ||w||^2, from the normal equations."""
    rows, columns = x.shape
    gram = x.T @ x / rows + math.exp(log_strength) * torch.eye(columns, dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ targets / rows)


def gated_weights(x: Tensor, targets: Tensor, log_strength: float) -> Tensor:
    """The same as hidden units gated by a sigmoid of the hyperparameter (arXiv 1903.03088, section 2.3).

    With X = U diag(d) Z': w = Z diag(sigmoid(log d^2 - log n - log_strength)) diag(1 / d) U' t.
    """
    u, d, z = torch.linalg.svd(x, full_matrices=False)
    gates = torch.sigmoid(2 * d.log() - math.log(len(x)) - log_strength)
    return z.T @ (gates / d * (u.T @ targets))


def affine_response(hessian: Tensor, mixed: Tensor, scale: float) -> Tensor:
    """Theta that minimises E_e [ 1/2 w' A w + w' B u ] over w = Theta (u0 + e) + b, e ~ N(0, scale^2), at u0 = 0.

    The expectation is exact: its gradient in Theta is (A Theta + B) E[e e'], that in b is A b. Found by Newton's
    method on the gradient that autograd gives, from zero; the losses are quadratic, so that one step is all.
    """
    outputs, n = mixed.shape

    def expected_loss(flat: Tensor) -> Tensor:
        theta, b = flat[: outputs * n].reshape(outputs, n), flat[outputs * n :]
        # E[w w'] = Theta S Theta' + b b' and E[u w'] = S Theta' for S = scale^2 I.
        second = scale**2 * theta @ theta.T + torch.outer(b, b)
        return 0.5 * (hessian * second).sum() + scale**2 * (mixed * theta).sum()

    start = torch.zeros(outputs * n + outputs, dtype=hessian.dtype)
    gradient = torch.func.grad(expected_loss)(start)
    curvature = torch.func.hessian(expected_loss)(start)
    return (start - torch.linalg.solve(curvature, gradient))[: outputs * n].reshape(outputs, n)


def best_response_cases() -> list[Case]:
    """Gating (relative error) and the Jacobian of the affine response (absolute error), in float64."""
    cases = []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
        targets = torch.randn(20, generator=generator, dtype=torch.float64)
        for log_strength in (-3.0, 0.0, 2.0):
            expected = ridge_weights(x, targets, log_strength)
            error = (gated_weights(x, targets, log_strength) - expected).norm() / expected.norm()
            cases.append(Case(f"gating, draw {draw}, log strength {log_strength:g}", float(error), 1e-10))
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        hessian = root @ root.T + torch.eye(4, dtype=torch.float64)
        mixed = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        for scale in (0.1, 1.0):
            error = (affine_response(hessian, mixed, scale) + torch.linalg.solve(hessian, mixed)).abs().max()
            cases.append(Case(f"Jacobian, draw {draw}, scale {scale:g}", float(error), 1e-6))
    return cases


def hypergradients(seed: int, delta: bool) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the training and of the validation loss in a dropout rate and in a floored number of holes.

    A network of two layers on 8x8 images, after a few self-tuning steps: the response of a fresh Delta-STN is zero.

    Returns:
        Of the training loss by hyperparameter (None: it is not reached); of the validation loss, (2,).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        rate = Hyperparameter(0.3, 0.0, 0.9, per_example=True, name="rate")
        holes = Hyperparameter(2.5, 0.0, 6.0, discrete=True, per_example=True, name="holes")
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), HyperDropout(rate), nn.Linear(16, 3))
        problem = BilevelProblem.from_regularizer(model, Compose(Cutout(holes, 3)), cross_entropy, seed=seed)
        images = torch.randn(2, 40, 1, 8, 8, generator=generator)
        labels = torch.randint(0, 3, (2, 40), generator=generator)
        tuner = SelfTuner(problem, delta=delta, warmup_steps=100, seed=seed)
        train, validation = ((images[i], labels[i]) for i in range(2))
        for _ in range(10):
            tuner.training_step(train)
        raw = problem.raw()
        response = tuner.response
        with response.at(response.rest[None]):
            loss = problem.evaluate(problem.inner_loss, problem.params, raw, train)
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(raw.values()), allow_unused=True)
        tuner.validation_step(validation)
        assert tuner.u.grad is not None
    return list(found), tuner.u.grad.clone()


def no_training_gradient_cases() -> list[Case]:
    """The error is 0 where no training gradient exists and both validation gradients are finite and not zero."""
    cases = []
    for draw in range(DRAWS):
        for delta in (False, True):
            training, validation = hypergradients(draw, delta)
            unreached = all(g is None or not bool(g.any()) for g in training)
            useful = bool(torch.isfinite(validation).all() and (validation != 0).all())
            error = float(not (unreached and useful))
            cases.append(Case(f"{'Delta-STN' if delta else 'STN'}, draw {draw}", error, 0.0))
    return cases
