"""Tables: reading CSV and Parquet, and turning columns into numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import UserError, suggestion

MAX_CATEGORIES = 30


@dataclass
class Table:
    """An encoded table.

    Attributes:
        inputs: float32 (rows, features).
        target: the target column as it was.
        features: names after encoding.
        row_ids: number of each row in the file, from 0.
        columns: number of feature columns used, before encoding.
        notes: what was left out or converted.
    """

    inputs: np.ndarray
    target: pd.Series
    features: tuple[str, ...]
    row_ids: np.ndarray
    columns: int
    notes: list[str] = field(default_factory=list)


def read_table(path: Path) -> pd.DataFrame:
    """Read CSV, TSV or Parquet.

    Raises:
        UserError: if the file is empty or unreadable.
    """
    try:
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    except pd.errors.EmptyDataError:
        raise UserError(f"{path.name} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path.name} cannot be read: {reason}") from error
    if len(frame) == 0:
        raise UserError(f"{path.name} has no rows")
    frame.columns = [str(name) for name in frame.columns]
    return frame


def encode(frame: pd.DataFrame, target: str | None, name: str, drop_missing: bool) -> Table:
    """Separate the target, refuse or drop missing values, and encode the other columns.

    Numbers stay; booleans become 0 and 1; text with few values becomes one column a value; dates, free text,
    identifiers and constants are left out with a note.

    Raises:
        UserError: naming the columns concerned.
    """
    columns = list(frame.columns)
    if target is None:
        raise UserError(f"{name}: say which column to predict with --target. {_listed(columns)}")
    if target not in columns:
        raise UserError(f"{name} has no column '{target}'.{suggestion(target, columns)} {_listed(columns)}")
    notes: list[str] = []
    used = _usable(frame.drop(columns=target), notes)
    if used.shape[1] == 0:
        raise UserError(f"{name}: no column beside '{target}' can be used ({'; '.join(notes)})")
    used = used.assign(**{target: frame[target]})
    used, row_ids = _without_missing(used, name, drop_missing, notes)
    parts: list[pd.DataFrame] = []
    for column in used.columns.drop(target):
        values = used[column]
        if values.dtype.kind in "biuf":
            parts.append(values.astype(np.float32).to_frame())
        else:
            parts.append(pd.get_dummies(values.astype(str), prefix=column, prefix_sep="=", dtype=np.float32))
    encoded = pd.concat(parts, axis=1)
    inputs = encoded.to_numpy(np.float32)
    return Table(inputs, used[target], tuple(encoded.columns), row_ids, used.shape[1] - 1, notes)


def _usable(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    keep = []
    for name in frame.columns:
        values = frame[name]
        distinct = values.nunique(dropna=True)
        if distinct <= 1:
            notes.append(f"left out '{name}': constant")
        elif pd.api.types.is_datetime64_any_dtype(values):
            notes.append(f"left out '{name}': a date")
        elif values.dtype.kind not in "biuf" and distinct > MAX_CATEGORIES:
            notes.append(f"left out '{name}': text with {distinct:,} different values")
        else:
            keep.append(name)
    return frame[keep]


def _without_missing(
    frame: pd.DataFrame, name: str, drop_missing: bool, notes: list[str]
) -> tuple[pd.DataFrame, np.ndarray]:
    missing = frame.isna()
    for column in frame.columns:
        if frame[column].dtype.kind == "f":
            missing[column] |= np.isinf(frame[column])
    bad = missing.any(axis=1).to_numpy()
    if not bad.any():
        return frame, np.arange(len(frame))
    if not drop_missing:
        counts = missing.sum()
        worst = counts[counts > 0].sort_values(ascending=False)
        told = [
            f"{n:,} in '{c}' (first in row {int(np.flatnonzero(missing[c])[0]) + 1:,})"
            for c, n in worst.head(3).items()
        ]
        more = f" and {len(worst) - 3} more columns" if len(worst) > 3 else ""
        raise UserError(
            f"{name}: missing or infinite values: {', '.join(told)}{more}. Clean them, or pass --drop-missing to leave "
            f"out {bad.sum():,} of {len(bad):,} rows"
        )
    if bad.all():
        raise UserError(f"{name}: every row has a missing value; --drop-missing would leave nothing")
    notes.append(f"left out {bad.sum():,} of {len(bad):,} rows with missing values")
    return frame.loc[~bad], np.flatnonzero(~bad)


def _listed(columns: list[str]) -> str:
    shown = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
    return f"Columns: {shown} ({len(columns)})"
