"""Arrays from .npz files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .errors import UserError

INPUT_KEYS = ("x", "inputs", "data", "images", "features")
TARGET_KEYS = ("y", "targets", "labels", "target", "label")


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Inputs under x, inputs, data, images or features; targets under y, targets, labels, target or label.

    Images of whole numbers become numbers in [0, 1]; images with their channels last get them first.

    Returns:
        float32 (rows, features) or (rows, channels, height, width); targets (rows,) as they are; notes.

    Raises:
        UserError: for unreadable files, wrong keys, shapes or types.
    """
    arrays = _load(path)
    x = next((arrays[key] for key in INPUT_KEYS if key in arrays), None)
    y = next((arrays[key] for key in TARGET_KEYS if key in arrays), None)
    if x is None or y is None:
        wanted, allowed = ("inputs", INPUT_KEYS) if x is None else ("targets", TARGET_KEYS)
        raise UserError(f"{path.name} has no {wanted}: keys are {sorted(arrays)}; allowed: {', '.join(allowed)}")
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
        raise UserError(f"{path.name}: inputs {x.shape} and targets {y.shape} must have one row an example")
    if x.ndim not in (2, 3, 4):
        raise UserError(f"{path.name}: inputs must be (rows, features) or images, got shape {x.shape}")
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biufUS":
        wrong = ("inputs", x) if x.dtype.kind not in "biuf" else ("targets", y)
        raise UserError(f"{path.name}: {wrong[0]} must be numbers, got {wrong[1].dtype}")
    if x.size == 0:
        raise UserError(f"{path.name} is empty: inputs have shape {x.shape}")
    if x.ndim == 2:
        return _single_precision(x), y, []
    images, notes = _scaled(x)
    return _channels_first(images), y, notes


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("it holds one array without a name")
        with content:
            return {key.lower(): content[key] for key in content.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path.name}: not a readable .npz file ({error})") from error


def _scaled(x: np.ndarray) -> tuple[np.ndarray, list[str]]:
    top = 1.0
    if x.dtype == np.uint8:
        top = 255.0
    elif x.dtype == np.uint16:
        top = 65535.0 if x.max() > 255 else 255.0
    elif x.dtype.kind != "b" and np.isfinite(x).all() and x.min() >= 0 and 1 < x.max() <= 255 and not (x % 1).any():
        top = 255.0
    notes = [f"images divided by {top:.0f}"] if top > 1 and x.dtype != np.uint8 else []
    return _single_precision(x) / np.float32(top), notes


def _channels_first(images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    channels = (1, 3, 4)
    if images.shape[-1] in channels and images.shape[1] not in channels:
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _single_precision(x: np.ndarray) -> np.ndarray:
    """Float32; numbers beyond its range become infinite and are reported as such."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32)
