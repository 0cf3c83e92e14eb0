"""Greedy facility location that computes again only the candidates that may win."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Shaped

WORKING_SET = 24
"""Candidates that are computed again in every round: 16 to 32 are about as fast, for 64 to 512 candidates."""


def lazy_greedy(similarity: Shaped[np.ndarray, "n n"], budget: int) -> tuple[list[int], list[float]]:
    """Greedy facility location for one group, where only candidates that may win are computed again.

    What a candidate adds never grows as picks are made, and rounding keeps that order; so what it once added bounds it
    from above (Minoux 1978), and the few candidates with the largest bounds are a working set that holds the winner
    until its best falls to a bound outside. The picks are those of the plain loop, bit for bit.

    NumPy, also for what lies on an accelerator: a round is a handful of operations on a few thousand numbers, and
    their launch is all that it costs.

    Args:
        similarity: (n, n).
        budget: number of picks, at most n.

    Returns:
        The picks in their order, and what each added.

    Raises:
        ValueError: if the matrix is not finite.

    Example:
        >>> lazy_greedy(np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]]), 2)
        ([0, 1], [1.9, 1.0])
    """
    rows = np.ascontiguousarray(similarity.T)  # a candidate's similarities side by side
    ones, everyone = np.ones(len(rows), rows.dtype), np.arange(len(rows))
    bounds = _row_sums(rows, ones)
    if not math.isfinite(bounds.dot(ones)):
        raise ValueError("facility_location: similarity must be finite")
    if not budget:
        return [], []
    # The first pick counts from nothing, not from 0: a constant added to the matrix changes no choice.
    best = int(bounds.argmax())
    picks, gains, covered = [best], [float(bounds[best])], rows[best].copy()
    few = len(rows) <= 2 * WORKING_SET
    if not few:
        bounds = _added(rows, covered, ones, np.empty_like(rows))
    while len(picks) < budget:
        members, outside = (everyone, 0.0) if few else _working_set(bounds)
        if not len(members):
            break
        own = rows if few else rows[members]
        buffer = np.empty_like(own)
        while True:
            found = _added(own, covered, ones, buffer)
            best = int(found.argmax())  # the first of equal ones; what was picked adds nothing
            if found[best] <= outside:
                break
            picks.append(int(members[best]))
            gains.append(float(found[best]))
            if len(picks) == budget:
                return picks, gains
            np.maximum(covered, own[best], out=covered)
        if few:
            break
        bounds[members] = found
    # Nothing adds any more: the lowest positions that are left.
    left = np.delete(everyone, picks)[: budget - len(picks)].tolist()
    return picks + left, gains + [0.0] * len(left)


def _added(rows: np.ndarray, covered: np.ndarray, ones: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """What each candidate would add: the sum of `max(S_ij - covered_i, 0)`."""
    np.subtract(rows, covered, out=buffer)
    np.maximum(buffer, 0.0, out=buffer)
    return _row_sums(buffer, ones)


def _row_sums(rows: np.ndarray, ones: np.ndarray) -> np.ndarray:
    """Sums of all rows in one order of summation, so that equal rows tie exactly; a product with a matrix has several."""
    if hasattr(np, "vecdot"):  # of NumPy 2, twice as fast on short rows
        return np.vecdot(rows, ones)
    return np.add.reduce(rows, 1)


def _working_set(bounds: np.ndarray) -> tuple[np.ndarray, float]:
    """Candidates with the largest bounds, equal ones together, in ascending order; and the largest bound outside."""
    least = np.partition(bounds, -WORKING_SET)[-WORKING_SET]
    members = (bounds >= least if least > 0 else bounds > 0).nonzero()[0]
    others = bounds.copy()
    others[members] = 0.0
    return members, float(others.max())
