"""Reading the user's data: a bundled name, CSV or Parquet, .npz, or a folder of images by class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..datasets import DatasetError, DatasetNotInstalled, list_datasets, load_dataset
from . import tables
from .errors import UserError, suggestion

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
INPUT_KEYS = ("x", "inputs", "data", "images", "features")
TARGET_KEYS = ("y", "targets", "labels", "target", "label")
MAX_CLASSES = 50
MINIMUM_PER_CLASS = 5


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
    """
    if task not in (None, "classification", "regression"):
        raise UserError(f"--task must be classification or regression, got '{task}'")
    path = Path(data)
    if not path.exists():
        source = _registered(data)
    elif path.is_dir():
        source = read_folder(path, image_size)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        source = _table(path, target, drop_missing, task)
    elif path.suffix.lower() == ".npz":
        source = read_npz(path, task)
    else:
        raise UserError(
            f"{path.name}: cannot read '{path.suffix or 'no suffix'}'; allowed: CSV, Parquet, .npz, or a folder"
        )
    if target is not None and path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"--target applies to CSV and Parquet only; '{data}' has its own targets")
    if len(source.row_ids) == 0:
        source.row_ids = np.arange(len(source.targets))
    if source.inputs.ndim > 1 and path.suffix.lower() not in TABLE_SUFFIXES:
        source = _without_missing(source, drop_missing)
    check_targets(source)
    return source


def _registered(data: str) -> Source:
    names = [entry.name for entry in list_datasets()]
    try:
        arrays = load_dataset(data)
    except DatasetNotInstalled as error:
        raise UserError(str(error)) from error
    except DatasetError:
        path = Path(data)
        files = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = suggestion(path.name, [name for name in files if not name.startswith(".")])
        if path.suffix or "/" in data:
            raise UserError(f"no file '{data}'.{near}") from None
        raise UserError(
            f"no file and no data set '{data}'.{suggestion(data, names) or near} Data sets: wellposed data list"
        ) from None
    return Source(
        data, arrays.inputs, arrays.targets, arrays.task, arrays.classes, arrays.features,
        columns=arrays.inputs.shape[1] if arrays.inputs.ndim == 2 else 0,
    )  # fmt: skip


def _table(path: Path, target: str | None, drop_missing: bool, task: str | None) -> Source:
    frame = tables.read_table(path)
    table = tables.encode(frame, target, path.name, drop_missing)
    kind, targets, classes = as_targets(table.target.to_numpy(), task, path.name)
    return Source(
        path.name, table.inputs, targets, kind, classes, table.features, table.row_ids, table.columns, table.notes
    )  # fmt: skip


def read_npz(path: Path, task: str | None = None) -> Source:
    """Arrays from a .npz file: inputs under x, inputs, data, images or features; targets under y, targets or labels.

    Unsigned bytes become numbers in [0, 1]; images with their channels last get them first.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {key.lower(): content[key] for key in content.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path.name}: not a readable .npz file ({error})") from error
    x = next((arrays[key] for key in INPUT_KEYS if key in arrays), None)
    y = next((arrays[key] for key in TARGET_KEYS if key in arrays), None)
    if x is None or y is None:
        wanted, allowed = ("inputs", INPUT_KEYS) if x is None else ("targets", TARGET_KEYS)
        raise UserError(f"{path.name} has no {wanted}: keys are {sorted(arrays)}; allowed: {', '.join(allowed)}")
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or len(x) != len(y):
        raise UserError(f"{path.name}: inputs {x.shape} and targets {y.shape} must have one row an example")
    if x.ndim < 2 or x.ndim > 4:
        raise UserError(f"{path.name}: inputs must be (rows, features) or images, got shape {x.shape}")
    if x.dtype.kind not in "biuf":
        raise UserError(f"{path.name}: inputs must be numbers, got {x.dtype}")
    inputs = x.astype(np.float32) / (255.0 if x.dtype == np.uint8 and x.ndim > 2 else 1.0)
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    elif inputs.ndim == 4 and inputs.shape[-1] in (1, 3, 4) and inputs.shape[1] not in (1, 3, 4):
        inputs = inputs.transpose(0, 3, 1, 2)
    kind, targets, classes = as_targets(y, task, path.name)
    columns = inputs.shape[1] if inputs.ndim == 2 else 0
    features = tuple(f"feature {i}" for i in range(columns))
    return Source(path.name, inputs.astype(np.float32), targets, kind, classes, features, columns=columns)


def read_folder(path: Path, size: int) -> Source:
    """Images in one folder a class, resized to `size` pixels a side; grey if all of them are."""
    from PIL import Image, UnidentifiedImageError

    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(p, [f for f in sorted(p.rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES]) for p in folders]
    found = [(p, files) for p, files in found if files]
    if not found:
        raise UserError(f"{path}: no images in folders by class (expected {path}/CLASS/image.png)")
    if size < 4:
        raise UserError(f"--image-size must be at least 4, got {size}")
    images, targets, modes = [], [], set()
    for label, (_, files) in enumerate(found):
        for file in files:
            try:
                with Image.open(file) as image:
                    modes.add("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB")
                    images.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise UserError(f"cannot read the image {file}: {error or type(error).__name__}") from error
            targets.append(label)
    inputs = (np.stack(images).astype(np.float32) / 255).transpose(0, 3, 1, 2)
    if modes == {"L"}:
        inputs = inputs[:, :1]
    classes = tuple(p.name for p, _ in found)
    return Source(path.name, np.ascontiguousarray(inputs), np.array(targets, np.int64), "classification", classes)


def as_targets(values: np.ndarray, task: str | None, name: str) -> tuple[str, np.ndarray, tuple[str, ...]]:
    """Task, encoded targets and class names.

    Text and booleans are classes, and so are whole numbers with few different values (at most 20, or 50 where each
    occurs 10 times on average); other numbers are to be predicted as numbers.
    """
    numeric = values.dtype.kind in "iuf"
    distinct = np.unique(values[~_missing(values)]) if numeric else np.unique(values.astype(str))
    if task is None:
        whole = numeric and bool(np.all(np.mod(distinct, 1) == 0))
        few = len(distinct) <= 20 or (len(distinct) <= MAX_CLASSES and len(values) >= 10 * len(distinct))
        task = "classification" if not numeric or (whole and few) else "regression"
    if task == "regression":
        if not numeric:
            raise UserError(f"{name}: the target holds text such as '{distinct[0]}'; use --task classification")
        if not np.isfinite(values.astype(float)).all():
            raise UserError(f"{name}: the target holds missing or infinite values")
        return task, values.astype(np.float32), ()
    if not numeric and len(distinct) > max(MAX_CLASSES, len(values) // 10):
        raise UserError(
            f"{name}: the target has {len(distinct)} different texts in {len(values)} rows; is it an identifier?"
        )
    if numeric and _missing(values).any():
        raise UserError(f"{name}: the target holds missing or infinite values")
    classes, codes = np.unique(values if numeric else values.astype(str), return_inverse=True)
    labels = tuple(str(int(c)) if numeric and float(c).is_integer() else str(c) for c in classes)
    return task, codes.astype(np.int64), labels


def check_targets(source: Source) -> None:
    """Enough rows, and something to tell apart."""
    rows = len(source.targets)
    if source.kind == "regression":
        if rows < 20:
            raise UserError(f"{source.name}: {rows} rows are too few; at least 20 are needed")
        if float(np.std(source.targets)) == 0:
            raise UserError(f"{source.name}: all targets are {source.targets[0]:g}; there is nothing to predict")
        return
    counts = np.bincount(source.targets, minlength=len(source.classes))
    if (counts > 0).sum() < 2:
        only = source.classes[int(counts.argmax())] if source.classes else "?"
        raise UserError(f"{source.name}: only one class ('{only}'); at least two are needed")
    if rows < MINIMUM_PER_CLASS * len(counts) or counts.min() < MINIMUM_PER_CLASS:
        few = [f"'{source.classes[i]}' ({counts[i]})" for i in np.argsort(counts)[:5] if counts[i] < MINIMUM_PER_CLASS]
        rare = f"; too rare: {', '.join(few)}" if few else ""
        raise UserError(
            f"{source.name}: {rows} rows for {len(counts)} classes; each class needs at least {MINIMUM_PER_CLASS}{rare}"
        )


def _without_missing(source: Source, drop: bool) -> Source:
    bad = ~np.isfinite(source.inputs.reshape(len(source.inputs), -1)).all(1)
    if not bad.any():
        return source
    if not drop:
        first = int(np.flatnonzero(bad)[0]) + 1
        raise UserError(
            f"{source.name}: missing or infinite values in {bad.sum():,} rows (first in row {first}). Clean them, or pass "
            f"--drop-missing to leave out {bad.sum():,} of {len(bad):,} rows"
        )
    keep = ~bad
    source.inputs, source.targets, source.row_ids = source.inputs[keep], source.targets[keep], source.row_ids[keep]
    source.notes.append(f"left out {bad.sum():,} rows with missing values")
    if source.kind == "classification":
        kept = np.unique(source.targets)
        source.classes = tuple(source.classes[i] for i in kept)
        source.targets = np.searchsorted(kept, source.targets)
    return source


def _missing(values: np.ndarray) -> np.ndarray:
    return ~np.isfinite(values.astype(float)) if values.dtype.kind == "f" else np.zeros(len(values), bool)
