"""Tables: reading CSV and Parquet, and turning columns into numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import UserError, suggestion
from .missing import report

MAX_CATEGORIES = 30
MOSTLY_NUMBERS = 0.9
"""From this share of numbers on, other texts in a column ("?", "n/a") are missing numbers rather than categories."""
IDENTIFIER = re.compile(r"(^|[ _.-])(id|uuid|index|idx|row|number|no|nr)$|^unnamed", re.IGNORECASE)
NESTED = (list, tuple, dict, set, bytes, np.ndarray)
LARGEST = float(np.finfo(np.float32).max)


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
    """Read CSV (separated by commas, or by semicolons with decimal commas), TSV or Parquet.

    Raises:
        UserError: if the file is empty or unreadable.
    """
    try:
        frame = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path.name} is empty") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} cannot be read: it is not UTF-8 ({error.reason}); save it as UTF-8") from error
    # The readers of Parquet raise errors of their own beside these.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{path.name} cannot be read: {reason[0] if reason else type(error).__name__}") from error
    if len(frame) == 0:
        raise UserError(f"{path.name} has no rows")
    # An index with a name was a column once.
    frame = frame.reset_index(drop=all(name is None for name in frame.index.names))
    frame.columns = pd.Index([str(name) for name in frame.columns])
    return frame


def _read_text(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", low_memory=False)
    if frame.shape[1] > 1 or ";" not in str(frame.columns[0]):
        return frame
    point, comma = (pd.read_csv(path, sep=";", decimal=mark, low_memory=False) for mark in (".", ","))
    numbers = [len(found.select_dtypes("number").columns) for found in (point, comma)]
    return comma if numbers[1] > numbers[0] else point


def encode(frame: pd.DataFrame, target: str | None, name: str, drop_missing: bool) -> Table:
    """Separate the target, refuse or drop missing values, and encode the other columns.

    Numbers stay; booleans become 0 and 1; text with few values becomes one column a value; dates, durations, free
    text, identifiers and constants are left out with a note. Row numbers count from 1.

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
        reason = f" ({'; '.join(notes)})" if notes else ": it is the only one"
        raise UserError(f"{name}: no column beside '{target}' can be used{reason}")
    used = used.assign(**{target: _numbers(frame[target], least=1.0)})
    keep = ~report(
        {column: _wrong(used[column]) for column in used.columns},
        name,
        drop_missing,
        notes,
        {str(c): v for c, v in frame.items()},
    )
    used, row_ids = used.loc[keep], np.flatnonzero(keep)
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
    keep = {}
    for name in frame.columns:
        values = _numbers(frame[name], MOSTLY_NUMBERS)
        reason = _unusable(name, values)
        if reason is None:
            keep[name] = values
        else:
            notes.append(f"left out '{name}': {reason}")
    return pd.DataFrame(keep, index=frame.index)


def _unusable(name: str, values: pd.Series) -> str | None:
    kind = values.dtype.kind
    if kind in "mM" or isinstance(values.dtype, pd.DatetimeTZDtype):
        return "a duration" if kind == "m" else "a date"
    if kind in "cV" or (kind == "O" and any(isinstance(value, NESTED) for value in values)):
        return "neither number nor text"
    distinct = values.nunique(dropna=True)
    if distinct <= 1:
        return "constant"
    if kind not in "biuf" and distinct > MAX_CATEGORIES:
        return f"text with {distinct:,} different values"
    # An identifier tells apart the rows it has seen and says nothing of others; in a sorted table it gives the class.
    if kind in "iu" and distinct == len(values) and IDENTIFIER.search(name):
        return "an identifier"
    return None


def _numbers(values: pd.Series, least: float) -> pd.Series:
    """Texts as numbers where at least this share of those present are; the others become missing."""
    if isinstance(values.dtype, pd.CategoricalDtype) or values.dtype.kind not in "OSU":
        return values
    present = values.dropna()
    if len(present) == 0 or any(isinstance(value, (bool, *NESTED)) for value in present):
        return values
    numbers = pd.to_numeric(present, errors="coerce")
    return numbers.reindex(values.index) if numbers.notna().mean() >= least else values


def _wrong(values: pd.Series) -> np.ndarray:
    """Missing, infinite, or beyond the range of float32."""
    missing = values.isna().to_numpy(bool)
    if values.dtype.kind != "f":
        return missing
    return np.asarray(missing | (np.abs(values.to_numpy(np.float64, na_value=np.nan)) > LARGEST))


def _listed(columns: list[str]) -> str:
    shown = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
    return f"Columns: {shown} ({len(columns)})"
