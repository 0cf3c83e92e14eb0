"""Hyper-representation: a recurrent encoder is the upper level, a linear head on its last state the lower one.

scikit-learn's digits, read row by row as 16 steps of 4 pixels. The oracles are hand-derived: every second derivative of
a linear head is first-order in the encoder, so that one pass through time, and back, is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...bilevel import BilevelProblem
from ...hyperparameter import Hyperparameter

STEPS, PIXELS, CLASSES = 16, 4, 10
HIDDEN, PENALTY, BATCH = 32, 1e-2, 64
SIZES = (600, 400, 797)


@dataclass(frozen=True)
class Part:
    """Examples of one part of the split: inputs (steps, examples, pixels), one-hot targets (examples, classes)."""

    inputs: Float[Tensor, "steps examples pixels"]
    targets: Float[Tensor, "examples classes"]


def split_digits(seed: int, sizes: tuple[int, int, int] = SIZES) -> list[Part]:
    """Training, validation and test part, drawn anew by the seed.

    Example:
        >>> [len(part.targets) for part in split_digits(0)]
        [600, 400, 797]
    """
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    sequences = torch.tensor(inputs[order] / 16, dtype=torch.float32).reshape(-1, STEPS, PIXELS).transpose(0, 1)
    targets = F.one_hot(torch.tensor(labels[order]), CLASSES).float()
    bounds = np.cumsum([0, *sizes])
    return [
        Part(sequences[:, a:b].contiguous(), targets[a:b].contiguous())
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


class RecurrentDigits(BilevelProblem):
    """The bilevel problem. A batch is (inputs, targets) as in `Part`.

    Upper level x: input weights (32, 4) from N(0, 1/4), recurrent weights (32, 32) from gain/sqrt(32) N(0, 1), bias 0.
    Lower level y: head (10, 33), the last column its bias, from 0. Inner loss: cross-entropy + 1e-2 |y|^2; outer:
    cross-entropy.

    Args:
        gain: of the recurrent weights; 3 makes gradients explode.
        seed: of the initialisation.

    Example:
        >>> problem = RecurrentDigits(gain=3.0, seed=0)
        >>> {name: tuple(h.raw.shape) for name, h in problem.hypers.items()}
        {'input': (32, 4), 'recurrent': (32, 32), 'bias': (32,)}
    """

    def __init__(self, gain: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = {
            "input": 0.5 * torch.randn(HIDDEN, PIXELS, generator=generator),
            "recurrent": gain / math.sqrt(HIDDEN) * torch.randn(HIDDEN, HIDDEN, generator=generator),
            "bias": torch.zeros(HIDDEN),
        }
        hypers = {n: Hyperparameter(v, -math.inf, math.inf, "identity", name=n) for n, v in start.items()}
        head = {"head": torch.zeros(CLASSES, HIDDEN + 1, requires_grad=True)}
        super().__init__(None, self._inner, self._outer, head, hypers, strong_convexity=2 * PENALTY)
        self.head = head["head"]

    def _inner(self, params: dict[str, Tensor], hypers: dict[str, Tensor], batch: Any) -> Tensor:
        return self._outer(params, hypers, batch) + PENALTY * params["head"].square().sum()

    @staticmethod
    def _outer(params: dict[str, Tensor], hypers: dict[str, Tensor], batch: Any) -> Tensor:
        features = _extended(states(hypers, batch[0])[-1])
        return -(batch[1] * (features @ params["head"].T).log_softmax(-1)).sum(-1).mean()

    def features(self, inputs: Float[Tensor, "steps batch pixels"]) -> Float[Tensor, "batch features"]:
        """Last state of the encoder and a one."""
        return _extended(states(self._weights(), inputs)[-1])

    @torch.no_grad()
    def inner_value_and_grad(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.counts.inner_grad += 1
        features = self.features(batch[0])
        log_p, residual = self._residual(features, batch[1])
        value = -(batch[1] * log_p).sum() / len(features) + PENALTY * self.head.square().sum()
        gradient = torch.addmm(self.head, residual.T, features, beta=2 * PENALTY, alpha=1 / len(features))
        return value, {"head": gradient}

    @torch.no_grad()
    def hvp(self, vector: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        self.counts.hvp += 1
        features, v = self.features(batch[0]), vector["head"]
        change = _softmax_change((features @ self.head.T).softmax(-1), features @ v.T)
        return {"head": torch.addmm(v, change.T, features, beta=2 * PENALTY, alpha=1 / len(features))}

    @torch.no_grad()
    def mixed_vjp(self, vector: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        self.counts.mixed_vjp += 1
        v = vector["head"]
        hidden = states(self._weights(), batch[0])
        features = _extended(hidden[-1])
        p = (features @ self.head.T).softmax(-1)
        # d/dfeatures of <grad_y g, v> = mean_i <p_i - t_i, v features_i>: through the factor, and through p.
        slope = (p - batch[1]) @ v + _softmax_change(p, features @ v.T) @ self.head
        return self._back(hidden, batch[0], slope[:, :-1] / len(features))

    def second_derivatives(self, vector: dict[str, Tensor], batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.hvp(vector, batch), self.mixed_vjp(vector, batch)

    @torch.no_grad()
    def outer_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        self.counts.outer_grads += 1
        hidden = states(self._weights(), batch[0])
        features = _extended(hidden[-1])
        log_p, residual = self._residual(features, batch[1])
        value = -(batch[1] * log_p).sum() / len(features)
        by_head = residual.T @ features / len(features)
        slope = residual @ self.head[:, :-1] / len(features)
        return value, {"head": by_head}, self._back(hidden, batch[0], slope)

    def _weights(self) -> dict[str, Tensor]:
        return {name: h.raw for name, h in self.hypers.items()}

    def _residual(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (features @ self.head.T).log_softmax(-1)
        return log_p, log_p.exp() - targets

    def _back(self, hidden: list[Tensor], inputs: Tensor, slope: Tensor) -> dict[str, Tensor]:
        """Backpropagation through time of the slope in the last state."""
        recurrent = self.hypers["recurrent"].raw
        slopes: list[Tensor] = []
        for step in range(STEPS, 0, -1):
            slopes.append(slope * (1.0 - hidden[step].square()))
            slope = slopes[-1] @ recurrent
        slopes.reverse()
        every = torch.cat(slopes)
        return {
            "input": every.T @ inputs.reshape(-1, PIXELS),
            "recurrent": every.T @ torch.cat(hidden[:-1]),
            "bias": every.sum(0),
        }


def states(weights: dict[str, Tensor], inputs: Float[Tensor, "steps batch pixels"]) -> list[Tensor]:
    """The encoder's states: zeros, then one after each step, each (batch, hidden).

    Example:
        >>> weights = {"input": torch.zeros(32, 4), "recurrent": torch.zeros(32, 32), "bias": torch.ones(32)}
        >>> len(states(weights, torch.zeros(16, 2, 4)))
        17
    """
    driven = (inputs @ weights["input"].T + weights["bias"]).unbind(0)
    recurrent = weights["recurrent"].T
    hidden = [torch.zeros_like(driven[0])]
    for drive in driven:
        hidden.append(torch.addmm(drive, hidden[-1], recurrent).tanh())
    return hidden


def batches(part: Part, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of 64 without end, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(part.targets), generator=generator).split(BATCH):
            if len(rows) == BATCH:
                yield part.inputs[:, rows], part.targets[rows]


def solved_head(
    features: Float[Tensor, "examples features"], targets: Float[Tensor, "examples classes"], penalty: float = PENALTY
) -> Float[Tensor, "classes features"]:
    """The lower level's solution on all examples, by L-BFGS in float64.

    Example:
        >>> head = solved_head(torch.eye(2), torch.eye(2), penalty=1e-2)
        >>> bool(head[0, 0] > 0), bool(head[0, 1] < 0)
        (True, True)
    """
    from scipy.optimize import minimize

    x, t = features.double().numpy(), targets.double().numpy()
    shape = (t.shape[1], x.shape[1])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        head = flat.reshape(shape)
        logits = x @ head.T
        logits -= logits.max(1, keepdims=True)
        total = np.exp(logits).sum(1, keepdims=True)
        value = (np.log(total[:, 0]) - (logits * t).sum(1)).mean() + penalty * (head**2).sum()
        gradient = (np.exp(logits) / total - t).T @ x / len(x) + 2 * penalty * head
        return float(value), gradient.reshape(-1)

    found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return torch.from_numpy(found.x.reshape(shape))


def head_loss(features: Tensor, targets: Tensor, head: Tensor) -> float:
    """Mean cross-entropy of a head, in nats."""
    log_p = (features.double() @ head.double().T).log_softmax(-1)
    return float(-(targets.double() * log_p).sum(-1).mean())


def _extended(hidden: Tensor) -> Tensor:
    return F.pad(hidden, (0, 1), value=1.0)


def _softmax_change(p: Tensor, change: Tensor) -> Tensor:
    """Derivative of the softmax along a change of the logits."""
    weighted = p * change
    return weighted - p * weighted.sum(-1, keepdim=True)


def labels_of(targets: Float[Tensor, "examples classes"]) -> Int[Tensor, " examples"]:
    """Classes of one-hot targets."""
    return targets.argmax(-1)
