"""The data of MAID's published problems, read from local folders: Kodak photographs and MNIST. Nothing is downloaded."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_MAGIC = {1: 2049, 3: 2051}


def data_folder(name: str, wanted: str) -> Path:
    """A folder inside the one that WELLPOSED_DATA names.

    Args:
        name: of the folder.
        wanted: what it should hold, for the message.

    Raises:
        DatasetNotInstalled: saying what is missing and where it was looked for.
    """
    base = os.environ.get(ENVIRONMENT)
    if not base:
        raise DatasetNotInstalled(
            f"{wanted}: the folder {name} in the folder that the environment variable {ENVIRONMENT} names, which is not "
            "set. Nothing is downloaded"
        )
    folder = Path(base) / name
    if not folder.is_dir():
        raise DatasetNotInstalled(f"{wanted}: there is no {folder}. Nothing is downloaded; put it there")
    return folder


def kodak_files(count: int) -> list[Path]:
    """The first `count` photographs of the folder `kodak`.

    Raises:
        DatasetNotInstalled: if there are fewer.
    """
    wanted = f"Kodak: {count} photographs (.png)"
    folder = data_folder("kodak", wanted)
    files = sorted(folder.glob("*.png"))
    if len(files) < count:
        raise DatasetNotInstalled(f"{wanted}: {folder} holds {len(files)}")
    return files[:count]


def kodak(count: int, size: int) -> Float[Tensor, "count size size"]:
    """Central squares in gray, values from 0 to 1, float64.

    Raises:
        DatasetNotInstalled: if there are fewer photographs.
        DatasetError: for one that is smaller than the square.
    """
    from PIL import Image

    squares = []
    for path in kodak_files(count):
        with Image.open(path) as image:
            gray = np.asarray(image.convert("L"), np.float64) / 255
        top, left = ((length - size) // 2 for length in gray.shape)
        if min(top, left) < 0:
            raise DatasetError(f"{path.name}: {gray.shape[0]} x {gray.shape[1]} is smaller than {size} x {size}")
        squares.append(gray[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(squares))


def mnist_files() -> list[Path]:
    """The four files of the folder `mnist`, plain or gzipped.

    Raises:
        DatasetNotInstalled: naming those that are missing.
    """
    wanted = f"MNIST: {', '.join(MNIST_FILES)} (or .gz)"
    folder = data_folder("mnist", wanted)
    found = {n: next((folder / f for f in (n, f"{n}.gz") if (folder / f).is_file()), None) for n in MNIST_FILES}
    if missing := [name for name, path in found.items() if path is None]:
        raise DatasetNotInstalled(f"{wanted}: {', '.join(missing)} not found in {folder}")
    return [path for path in found.values() if path is not None]


def mnist_at_twelve() -> tuple[
    Float[Tensor, "train 144"], Int[Tensor, " train"], Float[Tensor, "test 144"], Int[Tensor, " test"]
]:
    """MNIST at 12 x 12: a margin of two pixels is cut off, blocks of two by two are averaged; values from 0 to 1.

    Raises:
        DatasetNotInstalled: if files are missing.
        DatasetError: for a file of another format.
    """
    images, labels, test, test_labels = (_read_idx(path) for path in mnist_files())

    def small(x: np.ndarray) -> Tensor:
        inner = x[:, 2:-2, 2:-2].reshape(len(x), 12, 2, 12, 2).mean((2, 4)) / 255
        return torch.from_numpy(inner.reshape(len(x), 144))

    return (
        small(images),
        torch.from_numpy(labels.astype(np.int64)),
        small(test),
        torch.from_numpy(test_labels.astype(np.int64)),
    )


def _read_idx(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    dims = raw[3] if len(raw) > 3 else 0
    if dims not in _MAGIC or int.from_bytes(raw[:4], "big") != _MAGIC[dims]:
        raise DatasetError(f"{path.name} is no file of MNIST: wrong magic number")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if len(data) != np.prod(shape):
        raise DatasetError(f"{path.name} is cut off: {len(data)} values, {np.prod(shape)} announced")
    return data.reshape(shape)
