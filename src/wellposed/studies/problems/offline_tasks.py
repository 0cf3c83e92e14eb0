"""Offline optimization: five families of black-box functions, each with data on which their best designs are missing.

A seed draws the function, too, so that no setting can be fitted to one of them. All are exact and need no download.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

POINTS, OFFLINE = 4000, 1500
"""How many designs are drawn, and how many of their worse half are offered as data."""

STYBLINSKI_TANG_OPTIMUM = 39.16616570377142
LETTERS, POSITIONS = 4, 8

Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]


@dataclass(frozen=True)
class Bounds:
    """Where designs may lie: coordinate by coordinate, (d,) each."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class OfflineTask:
    """A function to maximise, known from a fixed set of its poorer values.

    Attributes:
        name, seed: which one; see `offline_task`.
        x: (1500, d) float32, designs drawn from the lower half of 4000.
        y: (1500,) float32, their values.
        bounds: box of valid designs.
        low, high: the values that score 0 and 1: the extremes of the 4000 designs, or of all sequences.
        optimum: largest value of the function; None where it is unknown.
        function: from designs (n, d) to values (n,), in float64.
        discrete: whether designs are sequences, written as logits.

    Example:
        >>> task = offline_task("ackley", seed=0)
        >>> task.x.shape, bool(task.score(task.x).max() < 1)
        (torch.Size([1500, 10]), True)
    """

    name: str
    seed: int
    x: Tensor
    y: Tensor
    bounds: Bounds
    low: float
    high: float
    optimum: float | None
    function: Function
    discrete: bool = False

    def dataset(self) -> tuple[Tensor, Tensor]:
        """The data that a method may see: designs and their values."""
        return self.x, self.y

    def repair(self, x: Tensor) -> Tensor:
        """The valid design nearest to each x: cut off at the box, or decoded to a sequence and written as logits."""
        if self.discrete:
            return torch.from_numpy(sequence_logits(decode_sequences(_array(x)))).to(x)
        return torch.minimum(torch.maximum(x, self.bounds.low.to(x)), self.bounds.high.to(x))

    def value(self, x: Tensor) -> Tensor:
        """True values, (n,), of repaired designs: the query that offline optimization may not make.

        Raises:
            ValueError: if x is not (n, d).
        """
        if x.ndim != 2 or x.shape[1] != self.x.shape[1]:
            raise ValueError(f"OfflineTask.value: x must be (n, {self.x.shape[1]}), got {tuple(x.shape)}")
        return torch.from_numpy(self.function(_array(self.repair(x)))).to(x)

    def normalize(self, y: Tensor) -> Tensor:
        """Values as scores: 0 is the worst of the hidden data, 1 the best; better designs exceed 1."""
        return (y - self.low) / (self.high - self.low)

    def score(self, x: Tensor) -> Tensor:
        """Normalised true values of designs, (n,)."""
        return self.normalize(self.value(x))

    def best_score(self) -> float | None:
        """Score of the optimum; None where it is unknown."""
        return None if self.optimum is None else (self.optimum - self.low) / (self.high - self.low)


@lru_cache(maxsize=32)
def offline_task(name: str, seed: int) -> OfflineTask:
    """Draw a task; the same name and seed give the same task.

    ==================  ====  =====================================================================================
    name                d     function F, maximised
    ==================  ====  =====================================================================================
    `ackley`            10    minus Ackley's function of 4 x - c, c uniform on [-1, 1]^10
    `styblinski_tang`   10    minus Styblinski and Tang's function of 5 S x, S random signs
    `rosenbrock`        8     -log(1 + Rosenbrock's function of 2 Q x), Q a random rotation or reflection
    `nk`                24    NK landscape: mean over 8 positions of a random table of 4 neighbouring letters of 4;
                              designs are logits of sequences
    `diabetes`          10    a random forest fitted to scikit-learn's diabetes data
    ==================  ====  =====================================================================================

    Continuous designs are uniform on [-1, 1]^d (`diabetes`: its rows with noise).

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> offline_task("nk", 1).best_score()
        1.0
    """
    if name not in FAMILIES:
        raise ValueError(f"offline_task: name must be one of {sorted(FAMILIES)}, got {name!r}")
    random = np.random.default_rng([list(FAMILIES).index(name), seed])
    return FAMILIES[name](name, seed, random)


def ackley(z: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Ackley's function, lowest (0) at 0.

    Example:
        >>> bool(abs(ackley(np.zeros((1, 3)))[0]) < 1e-12)
        True
    """
    root = np.sqrt(np.square(z).mean(1))
    return -20 * np.exp(-0.2 * root) - np.exp(np.cos(2 * np.pi * z).mean(1)) + 20 + np.e


def styblinski_tang(z: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Styblinski and Tang's function, lowest (-39.16617 d) at -2.903534 in every coordinate.

    Example:
        >>> float(styblinski_tang(np.full((1, 2), -2.903534)).round(3)[0])
        -78.332
    """
    return 0.5 * (z**4 - 16 * z**2 + 5 * z).sum(1)


def rosenbrock(z: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Rosenbrock's function, lowest (0) at 1 in every coordinate.

    Example:
        >>> float(rosenbrock(np.ones((1, 4)))[0])
        0.0
    """
    return (100 * np.square(z[:, 1:] - np.square(z[:, :-1])) + np.square(1 - z[:, :-1])).sum(1)


def sequence_logits(sequences: Array) -> Array:
    """Sequences (n, 8) of letters 0 to 3 as (n, 24): `log(0.6 onehot + 0.1)` minus that of letter 0, which is left out.

    Example:
        >>> sequence_logits(np.array([[0] * 8])).shape
        (1, 24)
    """
    logits = np.log(0.6 * np.eye(LETTERS)[sequences] + 0.1)
    return (logits[..., 1:] - logits[..., :1]).reshape(len(sequences), -1)


def decode_sequences(logits: Array) -> Array:
    """The most likely letter at every position, (n, 8); the inverse of `sequence_logits`.

    Example:
        >>> decode_sequences(sequence_logits(np.array([[3, 0, 1, 2, 2, 1, 0, 3]])))[0].tolist()
        [3, 0, 1, 2, 2, 1, 0, 3]
    """
    shaped = logits.reshape(len(logits), -1, LETTERS - 1)
    return np.concatenate([np.zeros_like(shaped[..., :1]), shaped], -1).argmax(-1)


def all_sequences() -> Array:
    """All 4^8 = 65,536 sequences, (65536, 8)."""
    return np.stack(np.unravel_index(np.arange(LETTERS**POSITIONS), (LETTERS,) * POSITIONS), 1)


def _ackley(name: str, seed: int, random: np.random.Generator) -> OfflineTask:
    centre = random.uniform(-1, 1, 10)
    return _continuous(name, seed, random, 10, lambda x: -ackley(4 * x - centre), 0.0)


def _styblinski_tang(name: str, seed: int, random: np.random.Generator) -> OfflineTask:
    signs = random.choice([-1.0, 1.0], 10)
    return _continuous(name, seed, random, 10, lambda x: -styblinski_tang(5 * signs * x), 10 * STYBLINSKI_TANG_OPTIMUM)


def _rosenbrock(name: str, seed: int, random: np.random.Generator) -> OfflineTask:
    while True:
        factors, triangle = np.linalg.qr(random.standard_normal((8, 8)))
        rotation = factors * np.sign(np.diag(triangle))  # uniform over the orthogonal matrices
        if np.abs(rotation.T @ np.ones(8)).max() < 2:  # the optimum lies inside the box
            break
    return _continuous(name, seed, random, 8, lambda x: -np.log1p(rosenbrock(2 * x @ rotation.T)), 0.0)


def _continuous(
    name: str, seed: int, random: np.random.Generator, d: int, function: Function, optimum: float
) -> OfflineTask:
    points = random.uniform(-1, 1, (POINTS, d)).astype(np.float32)
    box = Bounds(-torch.ones(d), torch.ones(d))
    return _offered(name, seed, random, points, function, box, optimum)


def _nk(name: str, seed: int, random: np.random.Generator) -> OfflineTask:
    tables = random.uniform(size=(POSITIONS, *(LETTERS,) * 4))

    def fitness(sequences: Array) -> Array:
        neighbours = [np.roll(sequences, -shift, 1) for shift in range(4)]
        total: Array = np.mean([tables[(i, *(n[:, i] for n in neighbours))] for i in range(POSITIONS)], 0)
        return total

    sequences = all_sequences()
    values = fitness(sequences)
    points = sequence_logits(sequences[random.choice(len(sequences), POINTS, replace=False)]).astype(np.float32)
    box = Bounds(torch.from_numpy(points.min(0)), torch.from_numpy(points.max(0)))
    extremes = (float(values.min()), float(values.max()))
    return _offered(
        name, seed, random, points, lambda x: fitness(decode_sequences(x)), box, extremes[1], extremes, discrete=True
    )


def _diabetes(name: str, seed: int, random: np.random.Generator) -> OfflineTask:
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import RandomForestRegressor

    rows, target = load_diabetes(return_X_y=True)
    rows = (rows - rows.mean(0)) / rows.std(0)
    forest = RandomForestRegressor(100, random_state=seed, n_jobs=1).fit(rows, target)
    drawn = rows[random.integers(len(rows), size=POINTS)]
    points = (drawn + 0.3 * random.standard_normal(drawn.shape)).astype(np.float32)
    box = Bounds(torch.from_numpy(points.min(0)), torch.from_numpy(points.max(0)))
    return _offered(name, seed, random, points, lambda x: np.asarray(forest.predict(x)), box, None)


def _offered(
    name: str,
    seed: int,
    random: np.random.Generator,
    points: Array,
    function: Function,
    bounds: Bounds,
    optimum: float | None,
    extremes: tuple[float, float] | None = None,
    discrete: bool = False,
) -> OfflineTask:
    """The task whose data are drawn from the lower half of `points`."""
    values = function(points.astype(np.float64))
    low, high = extremes or (float(values.min()), float(values.max()))
    worse = np.argsort(values, kind="stable")[: len(values) // 2]
    chosen = random.choice(worse, OFFLINE, replace=False)
    x, y = torch.from_numpy(points[chosen]), torch.from_numpy(values[chosen].astype(np.float32))
    return OfflineTask(name, seed, x, y, bounds, low, high, optimum, function, discrete)


def _array(x: Tensor) -> Array:
    return x.detach().double().cpu().numpy()


FAMILIES: dict[str, Callable[[str, int, np.random.Generator], OfflineTask]] = {
    "ackley": _ackley,
    "styblinski_tang": _styblinski_tang,
    "rosenbrock": _rosenbrock,
    "nk": _nk,
    "diabetes": _diabetes,
}
TASKS = tuple(FAMILIES)
