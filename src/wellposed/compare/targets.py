"""Targets: which task they set, how they are encoded, and whether there is something to learn."""

from __future__ import annotations

import numpy as np

from .errors import UserError

FEW = 20
MAX_CLASSES = 50
MINIMUM_PER_CLASS = 5
MINIMUM_ROWS = 20


def as_targets(values: np.ndarray, task: str | None, name: str) -> tuple[str, np.ndarray, tuple[str, ...]]:
    """Task, encoded targets and class names.

    Text and booleans are classes, and so are whole numbers with few different values (at most 20, or 50 where each
    occurs 10 times on average); other numbers are to be predicted as numbers.

    Raises:
        UserError: for text as numbers, missing numbers, or text that looks like an identifier.

    Example:
        >>> as_targets(np.array(["no", "yes", "no"]), None, "data")
        ('classification', array([0, 1, 0]), ('no', 'yes'))
    """
    numeric = values.dtype.kind in "iuf"
    if numeric and not np.isfinite(values).all():
        raise UserError(f"{name}: the target holds missing or infinite values")
    known = values if numeric else values.astype(str)
    distinct, codes = np.unique(known, return_inverse=True)
    if task is None:
        whole = numeric and not np.mod(distinct, 1).any()
        few = len(distinct) <= FEW or (len(distinct) <= MAX_CLASSES and len(values) >= 10 * len(distinct))
        task = "classification" if not numeric or (whole and few) else "regression"
    if task == "regression":
        if not numeric:
            raise UserError(f"{name}: the target holds text such as '{distinct[0]}'; use --task classification")
        return task, values.astype(np.float32), ()
    if not numeric and len(distinct) > max(MAX_CLASSES, len(values) // 10):
        raise UserError(
            f"{name}: the target has {len(distinct)} different texts in {len(values)} rows; is it an identifier?"
        )
    labels = tuple(str(int(c)) if numeric and float(c).is_integer() else str(c) for c in distinct)
    return task, codes.astype(np.int64), labels


def check_targets(targets: np.ndarray, kind: str, classes: tuple[str, ...], name: str) -> None:
    """Enough rows, and something to tell apart.

    Raises:
        UserError: naming what there is too little of.
    """
    rows = len(targets)
    if kind == "regression":
        if rows < MINIMUM_ROWS:
            raise UserError(f"{name}: {rows} rows are too few; at least {MINIMUM_ROWS} are needed")
        if not np.isfinite(targets).all():
            raise UserError(f"{name}: some targets are too large; give them in another unit")
        if np.ptp(targets) == 0:
            raise UserError(f"{name}: all targets are {targets[0]:g}; there is nothing to predict")
        return
    counts = np.bincount(targets, minlength=len(classes))
    if (counts > 0).sum() < 2:
        raise UserError(f"{name}: only one class ('{classes[int(counts.argmax())]}'); at least two are needed")
    if counts.min() < MINIMUM_PER_CLASS:
        rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < MINIMUM_PER_CLASS]
        told = ", ".join(f"'{classes[i]}' ({counts[i]})" for i in rare[:5]) + (", ..." if len(rare) > 5 else "")
        raise UserError(
            f"{name}: {rows:,} rows for {len(counts)} classes; each class needs at least {MINIMUM_PER_CLASS}; "
            f"too rare: {told}"
        )
