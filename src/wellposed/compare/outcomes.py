"""What the outcomes of an arm's seeds say: which failed, and why; which did best; and what all of them measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ..lab.trial import Outcome

Value = TypeVar("Value")


def good_seeds(by_seed: Mapping[int, Outcome]) -> dict[int, Outcome]:
    """The seeds that neither diverged nor failed."""
    return {seed: outcome for seed, outcome in by_seed.items() if outcome.status == "finished"}


def first_error(by_seed: Mapping[int, Outcome]) -> str | None:
    """The last line of the first error, or None where there was none."""
    errors = [outcome.error for outcome in by_seed.values() if outcome.error]
    return errors[0].strip().splitlines()[-1] if errors else None


def failure_note(label: str, failures: Sequence[int], seeds: Sequence[int], worst: str, error: str | None) -> list[str]:
    """The sentence on an arm's seeds that failed; none where all are well.

    Args:
        label: of the arm.
        failures: its seeds that failed.
        seeds: all seeds.
        worst: what a failed seed counts as, in words.
        error: of the first of them.

    Example:
        >>> failure_note("ELR", [1001], [1000, 1001], "10 points", "ValueError: nan")
        ['ELR: 1 of 2 seeds diverged or failed and count as 10 points (ValueError: nan)']
    """
    if not failures:
        return []
    return [f"{label}: {len(failures)} of {len(seeds)} seeds diverged or failed and count as {worst} ({error})"]


def best_seed(by_seed: Mapping[int, Outcome], seeds: Sequence[int]) -> int | None:
    """The seed with the lowest validation loss: chosen without a look at the test set."""
    good = [seed for seed in seeds if by_seed[seed].status == "finished"]
    return min(good, key=lambda seed: by_seed[seed].metrics["validation_loss"], default=None)


def by_name(found: Iterable[Mapping[str, Value]]) -> dict[str, list[Value]]:
    """Lists by name from mappings of one seed each.

    Example:
        >>> by_name([{"a": 1.0}, {"a": 2.0, "b": 3.0}])
        {'a': [1.0, 2.0], 'b': [3.0]}
    """
    gathered: dict[str, list[Value]] = {}
    for one in found:
        for name, value in one.items():
            gathered.setdefault(name, []).append(value)
    return gathered
