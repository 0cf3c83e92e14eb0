"""Noisy handwritten digits under eight regularization strengths, and a hand-written training loop that is fast.

300 examples to train, 300 to validate, 1197 to test; a perceptron 64-256-256-10 that overfits them. The strengths:
dropout of the inputs and of both hidden layers, noise on the inputs, label smoothing, and an L2 coefficient a layer.

Searches train thousands of such steps with strengths that are plain numbers, so that the gradients are written out
here; a test holds them against autograd and the library's own methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ...indexed_dataset import epoch_seed
from ..training import multilayer_perceptron

CLASSES = 10
TRAIN, VALIDATION, TEST = 300, 300, 1197
NOISE = 0.3
WIDTHS = (64, 256, 256, 10)
BATCH = 100
MOMENTUM = 0.9
EVALUATE_EVERY = 50
UNIFORM = math.log(CLASSES)
"""Cross-entropy of the uniform prediction: what a run that diverged counts as."""

DROPOUTS = ("dropout_input", "dropout_hidden1", "dropout_hidden2")
DECAYS = ("l2_layer1", "l2_layer2", "l2_layer3")
NAMES = (*DROPOUTS, "noise", "smoothing", *DECAYS)
INITIAL: Mapping[str, float] = {
    **dict.fromkeys(DROPOUTS, 0.05), "noise": 0.05, "smoothing": 0.02, **dict.fromkeys(DECAYS, 1e-5),
}  # fmt: skip
RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(DROPOUTS, (0.0, 0.8)), "noise": (0.0, 0.6), "smoothing": (0.0, 0.3),
    **dict.fromkeys(DECAYS, (1e-6, 1e-2)),
}  # fmt: skip
"""Where searches look; L2 coefficients on a logarithmic scale."""


@dataclass(frozen=True)
class RegularizedDigits:
    """One draw of the problem. Inputs are float32 (examples, 64), labels int64; the noise belongs to the image."""

    train: Float[Tensor, "train 64"]
    labels: Int[Tensor, " train"]
    validation: Float[Tensor, "validation 64"]
    validation_labels: Int[Tensor, " validation"]
    test: Float[Tensor, "test 64"]
    test_labels: Int[Tensor, " test"]


def regularized_digits(seed: int) -> RegularizedDigits:
    """Split the digits that ship with scikit-learn, and add N(0, 0.3^2) to every pixel of [0, 1].

    Args:
        seed: re-draws the stratified split and the noise.

    Example:
        >>> problem = regularized_digits(seed=0)
        >>> len(problem.train), len(problem.validation), len(problem.test)
        (300, 300, 1197)
    """
    inputs, labels = _digits()
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=VALIDATION, stratify=labels[rest], random_state=seed)
    generator = np.random.default_rng(seed)
    noisy = inputs + NOISE * generator.standard_normal(inputs.shape, dtype=np.float32)
    parts = [torch.from_numpy(source[part]) for part in (train, validation, test) for source in (noisy, labels)]
    return RegularizedDigits(*parts)


class Perceptron:
    """A plain run: SGD with momentum under given strengths, the same for all examples of a batch.

    Initialisation and batch order depend on the problem's seed alone, masks and noise also on `draw`.

    Args:
        problem: the data.
        seed: of initialisation and order.
        learning_rate: of SGD.
        draw: number of the run among those of one seed.

    Attributes:
        steps: training steps done.
        best: lowest validation cross-entropy of an evaluation, and the weights it was found with.

    Example:
        >>> run = Perceptron(regularized_digits(0), seed=0, learning_rate=0.05)
        >>> run.train(100, INITIAL)
        >>> run.steps, run.best[0] < UNIFORM
        (100, True)
    """

    def __init__(self, problem: RegularizedDigits, seed: int, learning_rate: float, draw: int = 0) -> None:
        self.problem, self.seed, self.learning_rate = problem, seed, learning_rate
        network = multilayer_perceptron(WIDTHS, seed)
        self.tensors = [p.detach().clone() for p in network.parameters()]
        self.velocities = [torch.zeros_like(p) for p in self.tensors]
        self.targets = F.one_hot(problem.labels, CLASSES).float()
        self.steps = 0
        self.diverged = False
        self.best: tuple[float, list[Tensor]] = (UNIFORM, [])
        self._generator = torch.Generator().manual_seed(epoch_seed(seed, 1_000_000 + draw))
        # Uniform numbers in 16 bits, four to a draw: masks are what most random numbers are for.
        self._bits = torch.empty(BATCH, sum(WIDTHS[:-1]) // 4, dtype=torch.int64)
        self._order = torch.empty(0, dtype=torch.int64)

    def train(self, steps: int, strengths: Mapping[str, float]) -> None:
        """Take steps; every `EVALUATE_EVERY` and after the last one the run is evaluated on the validation data."""
        for _ in range(steps):
            self.step(strengths)
            if self.steps % EVALUATE_EVERY == 0:
                self.evaluate()
        if self.steps % EVALUATE_EVERY:
            self.evaluate()

    def evaluate(self) -> None:
        """Keep the weights if they are the best so far."""
        loss = float(F.cross_entropy(self.logits(self.problem.validation), self.problem.validation_labels))
        self.diverged = self.diverged or not math.isfinite(loss)
        if loss < self.best[0]:
            self.best = (loss, [t.clone() for t in self.tensors])

    @property
    def validation(self) -> float:
        """Lowest validation cross-entropy so far; that of the uniform prediction if the run diverged."""
        return UNIFORM if self.diverged else self.best[0]

    def logits(self, inputs: Tensor, tensors: list[Tensor] | None = None) -> Tensor:
        """Outputs without dropout or noise."""
        h, own = inputs, self.tensors if tensors is None else tensors
        for layer in range(3):
            h = F.linear(h if layer == 0 else h.relu_(), own[2 * layer], own[2 * layer + 1])
        return h

    def step(self, strengths: Mapping[str, float]) -> None:
        """One step of SGD on the next batch."""
        rows = self._next_rows()
        noise = torch.randn((len(rows), WIDTHS[0]), generator=self._generator)
        x = self.problem.train[rows].add_(noise, alpha=strengths["noise"])
        gradients = self.gradients(x, self.targets[rows], self.masks(strengths), strengths)
        torch._foreach_mul_(self.velocities, MOMENTUM)
        torch._foreach_add_(self.velocities, gradients)
        torch._foreach_add_(self.tensors, self.velocities, alpha=-self.learning_rate)
        self.steps += 1

    def masks(self, strengths: Mapping[str, float]) -> list[Tensor]:
        """Which units stay: (batch, width) bool for the inputs and both hidden layers, at rates rounded to 1/65536."""
        self._bits.random_(-(2**63), None, generator=self._generator)
        parts = self._bits.view(torch.int16).split(WIDTHS[:-1], 1)
        return [part >= round(strengths[name] * 2**16) - 2**15 for part, name in zip(parts, DROPOUTS, strict=True)]

    def gradients(
        self, x: Tensor, targets: Tensor, masks: list[Tensor], strengths: Mapping[str, float]
    ) -> list[Tensor]:
        """Of the smoothed cross-entropy of a batch plus `l2 * ||W||^2` a layer, in the order of `tensors`.

        Args:
            x: inputs with their noise.
            targets: one-hot.
            masks: see `masks`.
            strengths: by name.
        """
        keep = [1.0 / (1.0 - strengths[name]) for name in DROPOUTS]
        inputs = [x.mul_(masks[0]).mul_(keep[0])]
        for layer in range(2):
            h = F.linear(inputs[layer], self.tensors[2 * layer], self.tensors[2 * layer + 1])
            inputs.append(h.relu_().mul_(masks[layer + 1]).mul_(keep[layer + 1]))
        logits = F.linear(inputs[2], self.tensors[4], self.tensors[5])
        smoothing = strengths["smoothing"]
        delta = logits.softmax(1).sub_(targets, alpha=1.0 - smoothing).sub_(smoothing / CLASSES).div_(len(x))
        found: list[Tensor] = []
        for layer in (2, 1, 0):
            weight = self.tensors[2 * layer]
            found[:0] = [torch.addmm(weight, delta.T, inputs[layer], beta=2.0 * strengths[DECAYS[layer]]), delta.sum(0)]
            if layer:
                # A unit that was dropped, or that ReLU cut off, is zero now: what is left has slope 1 / (1 - p).
                delta = (delta @ weight).mul_(inputs[layer] > 0).mul_(keep[layer])
        return found

    def _next_rows(self) -> Tensor:
        size = len(self.problem.train)
        first = self.steps * BATCH % size
        if first == 0:
            order = torch.Generator().manual_seed(epoch_seed(self.seed, self.steps * BATCH // size))
            self._order = torch.randperm(size, generator=order)
        return self._order[first : first + BATCH]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = load_digits(return_X_y=True)
    return (inputs / 16).astype(np.float32), labels.astype(np.int64)
