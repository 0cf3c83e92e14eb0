"""Missing and infinite values: told by column, or left out by row on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import UserError

SHOWN = 3


def report(
    wrong: Mapping[str, np.ndarray],
    name: str,
    drop_missing: bool,
    notes: list[str],
    original: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Which rows to leave out, after saying so in `notes`.

    Args:
        wrong: for each column, booleans (rows,) that are true where the value cannot be used.
        name: of the data.
        drop_missing: leave out rows instead of refusing them.
        notes: gets a line if rows are left out.
        original: columns as they were, to quote a text that stands among numbers.

    Returns:
        Booleans (rows,).

    Raises:
        UserError: naming the columns, how often and where first; or if no row would be left.
    """
    bad = np.logical_or.reduce(list(wrong.values())).astype(bool)
    if not bad.any():
        return np.asarray(bad)
    told = _told(wrong, original or {})
    if bad.all():
        reason = "--drop-missing would leave nothing" if drop_missing else "clean them"
        raise UserError(f"{name}: every row has a missing or infinite value, {told}; {reason}")
    if not drop_missing:
        raise UserError(
            f"{name}: missing or infinite values: {told}. Clean them, or pass --drop-missing to leave out "
            f"{bad.sum():,} of {len(bad):,} rows"
        )
    notes.append(f"left out {bad.sum():,} of {len(bad):,} rows with missing values")
    return np.asarray(bad)


def _told(wrong: Mapping[str, np.ndarray], original: Mapping[str, Any]) -> str:
    counts = {column: int(cells.sum()) for column, cells in wrong.items() if cells.any()}
    worst = sorted(counts, key=lambda column: -counts[column])
    told = []
    for column in worst[:SHOWN]:
        row = int(wrong[column].argmax())
        value = original[column][row] if column in original else None
        quoted = f": {value[:20]!r}" if isinstance(value, str) else ""
        told.append(f"{counts[column]:,} in '{column}' (first in row {row + 1:,}{quoted})")
    more = len(worst) - SHOWN
    return ", ".join(told) + (f" and {more} more column{'s' if more > 1 else ''}" if more > 0 else "")
