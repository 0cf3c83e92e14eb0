"""Reading the user's data: a bundled name, CSV or Parquet, .npz, or a folder of images by class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..datasets import DatasetError, find_dataset, list_datasets, load_dataset
from .arrays import read_arrays
from .errors import UserError, suggestion
from .images import read_images
from .missing import report
from .targets import as_targets, check_targets

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
TASKS = ("classification", "regression")


@dataclass
class Source:
    """Data as read, before they are split.

    Attributes:
        name: shown to the user.
        inputs: float32 (rows, features) or images (rows, channels, height, width) in [0, 1].
        targets: int64 classes from 0, or float32 values.
        kind: "classification" or "regression".
        classes: names of the classes.
        features: names of the features after encoding, empty for images.
        row_ids: number of each row in the original data.
        columns: number of features before encoding.
        notes: what was left out or converted.
    """

    name: str
    inputs: np.ndarray
    targets: np.ndarray
    kind: str
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    row_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    columns: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of the content (16 digits)."""
        digest = hashlib.sha256()
        for array in (self.inputs, self.targets):
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def read_source(
    data: str, target: str | None = None, *, drop_missing: bool = False, image_size: int = 32, task: str | None = None
) -> Source:
    """Read and check data; every problem is reported here, before any training.

    Args:
        data: name of a data set, or path.
        target: column to predict, for tables.
        drop_missing: leave out rows with missing or infinite values.
        image_size: side to which images of a folder are resized.
        task: "classification" or "regression"; found from the targets if None.

    Raises:
        UserError: one line that names what is wrong and how to mend it.

    Example:
        >>> source = read_source("iris")
        >>> source.inputs.shape, source.kind, source.classes
        ((150, 4), 'classification', ('setosa', 'versicolor', 'virginica'))
    """
    if task not in (None, *TASKS):
        raise UserError(f"--task must be classification or regression, got '{task}'")
    path = Path(data)
    is_table = path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()
    if not data or not path.exists():
        source = _registered(data)
    elif path.is_dir():
        inputs, targets, classes = read_images(path, image_size)
        source = Source(path.name or path.resolve().name, inputs, targets, "classification", classes)
    elif is_table:
        source = _table(path, target, drop_missing, task)
    elif path.suffix.lower() == ".npz":
        source = _archive(path, drop_missing, task)
    else:
        raise UserError(
            f"{path.name}: cannot read '{path.suffix or 'no suffix'}'; allowed: CSV, Parquet, .npz, or a folder"
        )
    if target is not None and not is_table:
        raise UserError(f"--target applies to CSV and Parquet only; '{data}' has its own targets")
    if task is not None and source.kind != task:
        raise UserError(f"--task {task} does not fit {source.name}: its targets are for {source.kind}")
    if len(source.row_ids) == 0:
        source.row_ids = np.arange(len(source.targets))
    check_targets(source.targets, source.kind, source.classes, source.name)
    if source.inputs.ndim == 2 and not np.ptp(source.inputs, axis=0).any():
        raise UserError(f"{source.name}: every feature is constant; there is nothing to learn from")
    return source


def _registered(data: str) -> Source:
    try:
        entry = find_dataset(data)
    except DatasetError:
        raise UserError(_unknown(data)) from None
    try:
        arrays = load_dataset(data)
    except DatasetError as error:
        raise UserError(str(error)) from error
    return Source(
        entry.name, arrays.inputs, arrays.targets, arrays.task, arrays.classes, arrays.features,
        columns=arrays.inputs.shape[1] if arrays.inputs.ndim == 2 else 0,
    )  # fmt: skip


def _unknown(data: str) -> str:
    path = Path(data)
    files = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = suggestion(path.name, [name for name in files if not name.startswith(".")])
    if path.suffix or "/" in data:
        return f"no file '{data}'.{near}"
    names = [entry.name for entry in list_datasets()]
    return f"no file and no data set '{data}'.{suggestion(data, names) or near} Data sets: wellposed data list"


def _table(path: Path, target: str | None, drop_missing: bool, task: str | None) -> Source:
    from . import tables  # pandas takes a while to import: only where there is a table

    table = tables.encode(tables.read_table(path), target, path.name, drop_missing)
    kind, targets, classes = as_targets(table.target.to_numpy(), task, path.name)
    return Source(
        path.name, table.inputs, targets, kind, classes, table.features, table.row_ids, table.columns, table.notes
    )  # fmt: skip


def _archive(path: Path, drop_missing: bool, task: str | None) -> Source:
    inputs, values, notes = read_arrays(path)
    names = tuple(f"feature {i}" for i in range(inputs.shape[1])) if inputs.ndim == 2 else ()
    cells = ~np.isfinite(inputs.reshape(len(inputs), -1))
    wrong = {name: cells[:, i] for i, name in enumerate(names)} if names else {"images": cells.any(1)}
    if values.dtype.kind == "f":
        wrong["targets"] = ~np.isfinite(values)
    keep = ~report(wrong, path.name, drop_missing, notes)
    kind, targets, classes = as_targets(values[keep], task, path.name)
    return Source(
        path.name, inputs[keep], targets, kind, classes, names, np.flatnonzero(keep), len(names), notes
    )  # fmt: skip
