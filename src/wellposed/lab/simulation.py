"""How often the verdict rule errs: seeds drawn from known distributions, and the rule applied to all of them at once.

`scripts/simulate_verdicts.py` makes the tables of `docs/verdicts.md` from this. Everything is measured in standard
deviations over seeds: a truth of 1 is an effect as large as the spread of one seed's value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from .statistics import simultaneous_level

Array = NDArray[np.float64]
Words = NDArray[np.str_]

EXACT_LIMIT = 20
_BLOCK = 2**23
_IMAGES, _RIGHT = 600, 0.98
_DIVERGE, _LOSS = 0.1, 10.0


@dataclass(frozen=True)
class Distribution:
    """A distribution of one seed's value, with mean 0 and standard deviation 1.

    Attributes:
        name: for the command and the tests.
        words: for the tables.
        quantiles: standard normal numbers to numbers of this distribution, by way of their probabilities.
    """

    name: str
    words: str
    quantiles: Callable[[Array], Array]


def _skewed(z: Array) -> Array:
    return -special.log_ndtr(-z) - 1


def _heavy(z: Array) -> Array:
    return special.stdtrit(3, special.ndtr(z)) / np.sqrt(3)


@lru_cache(maxsize=1)
def _differences() -> tuple[Array, Array]:
    """Differences of two accuracies on 600 test images, 98 % right, with their cumulative probabilities."""
    one = stats.binom.pmf(np.arange(_IMAGES + 1), _IMAGES, _RIGHT)
    both = np.convolve(one, one[::-1])
    values = np.arange(-_IMAGES, _IMAGES + 1) / np.sqrt(2 * _IMAGES * _RIGHT * (1 - _RIGHT))
    return values, np.cumsum(both)


def _discrete(z: Array) -> Array:
    values, cumulative = _differences()
    return values[np.minimum(np.searchsorted(cumulative, special.ndtr(z)), len(values) - 1)]


def _diverging(z: Array) -> Array:
    # One seed in ten counts as the worst value that the card names, 10 standard deviations of the other seeds below.
    u = special.ndtr(z)
    ordinary = special.ndtri(np.clip((u - _DIVERGE) / (1 - _DIVERGE), 1e-16, None))
    mean = -_DIVERGE * _LOSS
    variance = (1 - _DIVERGE) + _DIVERGE * _LOSS**2 - mean**2
    return (np.where(u < _DIVERGE, -_LOSS, ordinary) - mean) / np.sqrt(variance)


DISTRIBUTIONS = {
    d.name: d
    for d in (
        Distribution("normal", "normal", lambda z: z),
        Distribution("discrete", "accuracy on 600 images", _discrete),
        Distribution("heavy", "heavy tails (t, 3 degrees)", _heavy),
        Distribution("skewed", "skewed (exponential)", _skewed),
        Distribution("diverging", "one seed in ten diverges", _diverging),
    )
}


def draw(
    distribution: Distribution,
    generator: np.random.Generator,
    repetitions: int,
    seeds: int,
    contrasts: int = 1,
    correlation: float = 0.5,
) -> Array:
    """Values of a claim, over and over: (repetitions, contrasts, seeds), each with mean 0 and standard deviation 1.

    Contrasts share the method's value, so that they hang together: `correlation` is that of the normal numbers which
    are turned into the distribution; where all arms vary alike, it is a half.

    Example:
        >>> draw(DISTRIBUTIONS["skewed"], np.random.default_rng(0), 5, 12, contrasts=3).shape
        (5, 3, 12)
    """
    own = generator.standard_normal((repetitions, contrasts, seeds))
    if contrasts > 1:
        common = generator.standard_normal((repetitions, 1, seeds))
        own = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common
    return distribution.quantiles(own)


def half_widths(values: Array, level: float) -> Array:
    """Half the length of the Student interval of each row: (..., seeds) to (...)."""
    seeds = values.shape[-1]
    half: Array = stats.t.ppf((1 + level) / 2, seeds - 1) * np.asarray(values.std(axis=-1, ddof=1)) / np.sqrt(seeds)
    return half


def sign_flip_ps(values: Array, draws: int = 2_000, seed: int = 0) -> Array:
    """Sign-flip p value of each row, (rows, seeds) to (rows,): the same numbers as `statistics.sign_flip_p` gives.

    Args:
        values: finite.
        draws, seed: as `sign_flip_p`, for more than 20 seeds; `draws` at most 10,000.
    """
    rows, seeds = values.shape
    exact = seeds <= EXACT_LIMIT
    signs = _all_signs(seeds) if exact else _drawn_signs(seeds, draws, seed)
    least = np.abs(values.sum(axis=1)) - 1e-12 * np.abs(values).sum(axis=1)
    count = np.empty(rows)
    block = max(1, _BLOCK // len(signs))
    for start in range(0, rows, block):
        part = slice(start, start + block)
        count[part] = (np.abs(values[part] @ signs.T) >= least[part, None]).sum(axis=1)
    p: Array = count / len(signs) if exact else (count + 1) / (draws + 1)
    return p


@lru_cache(maxsize=4)
def _all_signs(seeds: int) -> Array:
    """Half of all patterns: the other half has the same absolute sums."""
    rest = np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds - 1)[None, :] & 1
    return np.hstack([np.ones((len(rest), 1)), 1.0 - 2.0 * rest]).astype(np.float64)


@lru_cache(maxsize=4)
def _drawn_signs(seeds: int, draws: int, seed: int) -> Array:
    signs = np.random.default_rng(seed).integers(0, 2, (draws, seeds), dtype=np.int8)
    return (signs * 2.0 - 1.0).astype(np.float64)


def above(values: Array, bound: float, level: float, together: bool = False) -> NDArray[np.bool_]:
    """Whether interval and sign-flip test agree that a row lies above a bound: (..., seeds) to (...).

    Args:
        values: one row a claim or contrast.
        bound, level: as the rule uses them.
        together: the caller asks only where all contrasts lie above; others may be called False unseen.
    """
    found = values.mean(axis=-1) - half_widths(values, level) > bound
    if together:
        found &= found.all(axis=1, keepdims=True)
    # The sign-flip test is costly, and only matters where the interval lies above.
    where = np.nonzero(found)
    if len(where[0]):
        found[where] = sign_flip_ps(values[where] - bound) <= (1 - level) * (1 + 1e-9)
    return found


def below(values: Array, bound: float, level: float) -> NDArray[np.bool_]:
    """As `above`, on the other side."""
    return above(-values, -bound, level)


def effect_words(values: Array, margin: float, level: float = 0.95) -> Words:
    """Verdicts of `judge_effect`, with the regime reached: (repetitions, contrasts, seeds) to (repetitions,).

    "supported", "inconclusive", or "refuted: " with its word of scale.
    """
    refuting = simultaneous_level(values.shape[1], level)
    words: Words = np.full(len(values), "inconclusive", dtype="<U32")
    words[above(values, margin, level, together=True).all(axis=1)] = "supported"
    under = below(values, margin, refuting)
    refuted = np.flatnonzero(under.any(axis=1))
    if len(refuted):
        upper = values[refuted].mean(axis=-1) + half_widths(values[refuted], refuting)
        lowest = values[refuted, np.where(under[refuted], upper, np.inf).argmin(axis=1)]
        size = np.where(above(lowest, 0.0, refuting), "smaller than claimed", "absent")
        size = np.where(below(lowest, 0.0, refuting), "reversed", size)
        words[refuted] = np.char.add("refuted: ", size)
    return words


def equivalence_words(values: Array, margin: float, level: float = 0.95) -> Words:
    """Verdicts of the two-sided `judge_equivalence`, with the regime reached; words as `effect_words`."""
    refuting = simultaneous_level(values.shape[1], level)
    words: Words = np.full(len(values), "inconclusive", dtype="<U32")
    words[above(values, margin, refuting).any(axis=1)] = "refuted: above the margin"
    words[below(values, -margin, refuting).any(axis=1)] = "refuted: below the margin"
    words[(above(values, -margin, level) & below(values, margin, level)).all(axis=1)] = "supported"
    return words


def shares(words: Words) -> dict[str, float]:
    """Share of each verdict; "refuted" sums up its words of scale.

    Example:
        >>> shares(np.array(["supported", "inconclusive", "refuted: absent", "refuted: reversed"]))["refuted"]
        0.5
    """
    found = dict.fromkeys(("supported", "refuted", "inconclusive"), 0.0)
    for word in words.tolist():
        found[word.partition(":")[0]] += 1 / len(words)
        if ":" in word:
            found[word] = found.get(word, 0.0) + 1 / len(words)
    return found


def effect_shares(
    distribution: Distribution,
    generator: np.random.Generator,
    repetitions: int,
    seeds: int,
    truths: Sequence[float] = (0.0,),
    margin: float = 0.0,
    level: float = 0.95,
    luck: float = 0.0,
) -> dict[str, float]:
    """Shares of the verdicts on a claim whose truth is known.

    Args:
        truths: one a contrast, in standard deviations over seeds.
        margin, level: of the claim.
        luck: standard deviation of what all seeds of a study share, and no interval over seeds can show: the luck of
            tuning, or of the data set.

    Example:
        >>> found = effect_shares(DISTRIBUTIONS["normal"], np.random.default_rng(0), 500, 12, truths=[2.0])
        >>> found["supported"] > 0.99
        True
    """
    values = draw(distribution, generator, repetitions, seeds, len(truths)) + np.asarray(truths)[None, :, None]
    values += luck * generator.standard_normal((repetitions, 1, 1))
    return shares(effect_words(values, margin, level))
