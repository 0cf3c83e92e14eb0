"""Lines of the figures of `wellposed tune`: curves of several seeds over one axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Line = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Places on the axis, and one list of values a seed."""

Lines = dict[str, Line]
"""Lines by their labels."""


def curve(curves: Mapping[str, list[list[float]]], place: str, name: str) -> Line:
    """A curve over the places of the seed that went farthest."""
    return places(curves, place), curves[name]


def places(curves: Mapping[str, list[list[float]]], place: str) -> Sequence[float]:
    """Places of the seed that went farthest; none where none were counted."""
    return max(curves.get(place, [[]]), key=len)


def so_far(
    seeds: Sequence[Sequence[float]], best: Callable[[Sequence[float]], float]
) -> tuple[list[float], list[list[float]]]:
    """The best value so far, as a line with steps: its places, and one list a seed.

    Example:
        >>> so_far([[3.0, 4.0, 1.0]], min)
        ([1.0, 2.0, 2.0, 3.0, 3.0], [[3.0, 3.0, 3.0, 3.0, 1.0]])
    """
    count = max(map(len, seeds))
    steps = [1.0, *(float(at) for number in range(2, count + 1) for at in (number, number))]
    lines = []
    for seed in seeds:
        found = [best(seed[: at + 1]) for at in range(len(seed))]
        lines.append([found[0], *(v for before, now in zip(found, found[1:], strict=False) for v in (before, now))])
    return steps, lines
