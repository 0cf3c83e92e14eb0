"""CIFAR-10 and CIFAR-100 from local folders, with a held-out part and wrong labels.

Nothing is downloaded: the folders of the data sets' "python version" must lie in the folder that the environment
variable WELLPOSED_DATA names.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ...datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled

SIDE = 32
ASYMMETRIC_PAIRS = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
"""CIFAR-10: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse."""

Noise = Literal["none", "uniform", "other", "asymmetric"]


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", b"labels", 10
    ),
    "cifar100": _Layout("cifar-100-python", ("train",), "test", b"fine_labels", 100),
}


@dataclass(frozen=True)
class Images:
    """A data set as it is: images uint8 (examples, 3, 32, 32), labels int64."""

    train: UInt8[Tensor, "train 3 32 32"]
    labels: Int[Tensor, " train"]
    test: UInt8[Tensor, "test 3 32 32"]
    test_labels: Int[Tensor, " test"]
    classes: int


@dataclass(frozen=True)
class NoisyImages:
    """One draw of the problem: images uint8, labels int64.

    Attributes:
        train, validation, test: images; `validation` may be empty.
        labels, validation_labels: given labels, perhaps partly wrong.
        truth: true labels of the training examples.
        test_labels: true labels.
        classes: number of classes.
    """

    train: UInt8[Tensor, "train 3 32 32"]
    labels: Int[Tensor, " train"]
    truth: Int[Tensor, " train"]
    validation: UInt8[Tensor, "validation 3 32 32"]
    validation_labels: Int[Tensor, " validation"]
    test: UInt8[Tensor, "test 3 32 32"]
    test_labels: Int[Tensor, " test"]
    classes: int

    @property
    def wrong(self) -> Bool[Tensor, " train"]:
        """Which training labels are wrong."""
        return self.labels != self.truth


def cifar_folder(name: str, root: str | Path | None = None) -> Path:
    """The folder of a data set's files: in `root`, else in the folder that WELLPOSED_DATA names, or that folder itself.

    Raises:
        ValueError: for an unknown name.
        DatasetNotInstalled: saying what is missing and where it was looked for.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"cifar: name must be one of {list(_LAYOUTS)}, got {name!r}")
    layout = _LAYOUTS[name]
    base = root if root is not None else os.environ.get(ENVIRONMENT)
    wanted = f"{name} needs the folder {layout.folder} (its python version: {', '.join(layout.files)})"
    if not base:
        raise DatasetNotInstalled(
            f"{wanted} in the folder that the environment variable {ENVIRONMENT} names, which is not set. "
            "Nothing is downloaded"
        )
    looked = [Path(base) / layout.folder, *([Path(base)] if Path(base).name == layout.folder else [])]
    for folder in looked:
        if all((folder / file).is_file() for file in layout.files):
            return folder
    missing = next(
        (str(f / file) for f in looked if f.is_dir() for file in layout.files if not (f / file).is_file()), ""
    )
    reason = f"{missing} is missing" if missing else f"there is no {' and no '.join(map(str, looked))}"
    raise DatasetNotInstalled(f"{wanted}: {reason}. Nothing is downloaded; put it there, or set {ENVIRONMENT}")


def read_cifar(name: str, root: str | Path | None = None) -> Images:
    """Read a data set.

    Args:
        name: "cifar10" or "cifar100".
        root: folder that holds the data set's folder; by default the one that WELLPOSED_DATA names.

    Raises:
        DatasetNotInstalled: if files are missing.
        DatasetError: for a damaged file, naming it.
    """
    folder = cifar_folder(name, root)
    layout = _LAYOUTS[name]
    parts = [_read_part(folder / file, layout) for file in layout.train]
    test, test_labels = _read_part(folder / layout.test, layout)
    train = torch.cat([images for images, _ in parts])
    return Images(train, torch.cat([labels for _, labels in parts]), test, test_labels, layout.classes)


def noisy_images(
    name: str,
    seed: int,
    *,
    rate: float = 0.0,
    noise: Noise = "none",
    held_out: float = 0.1,
    noisy_validation: bool = True,
    root: str | Path | None = None,
) -> NoisyImages:
    """Hold out a part of each class of the training images, and make labels wrong.

    Args:
        name: "cifar10" or "cifar100".
        seed: re-draws the split and the noise.
        rate: share of labels that are drawn anew.
        noise: see `corrupted_labels`.
        held_out: share of each class that is kept for validation, in [0, 1).
        noisy_validation: make the validation labels wrong, too.
        root: see `read_cifar`.

    Raises:
        ValueError: for an argument out of range.
        DatasetNotInstalled: if files are missing.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"noisy_images: held_out must lie in [0, 1), got {held_out}")
    data = read_cifar(name, root)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels), generator=generator)
    # Position of each example among those of its class, in the drawn order.
    rank = torch.empty_like(order)
    counts = torch.bincount(data.labels, minlength=data.classes)
    rank[order[data.labels[order].argsort(stable=True)]] = torch.cat([torch.arange(int(n)) for n in counts])
    kept_out = rank < (held_out * counts).round().long()[data.labels]
    train, validation = order[~kept_out[order]], order[kept_out[order]]
    truth, validation_labels = data.labels[train], data.labels[validation]
    labels = corrupted_labels(truth, rate, noise, data.classes, generator)
    if noisy_validation:
        validation_labels = corrupted_labels(validation_labels, rate, noise, data.classes, generator)
    return NoisyImages(
        data.train[train], labels, truth, data.train[validation], validation_labels, data.test, data.test_labels,
        data.classes,
    )  # fmt: skip


def corrupted_labels(
    labels: Int[Tensor, " examples"], rate: float, noise: Noise, classes: int, generator: torch.Generator
) -> Int[Tensor, " examples"]:
    """Labels, partly drawn anew, from their true values alone.

    Args:
        labels: true labels.
        rate: share of labels that are drawn anew, in [0, 1].
        noise: "none"; "uniform" over all classes (so that 1/classes of the drawn labels stay right); "other": another
            class, for the same share of each class; "asymmetric": CIFAR-10's similar classes, for the same share of
            each class that can be mistaken. The last is drawn from the TRUE labels: code that changes one class after
            the other in place turns cats into dogs and some of these back again, so that at rate 0.4 only 24 % of the
            cats end up wrong.
        classes: number of classes.
        generator: source of randomness.

    Raises:
        ValueError: for a rate out of range, an unknown noise, or "asymmetric" with other than 10 classes.

    Example:
        >>> labels = torch.arange(10).repeat(1000)
        >>> given = corrupted_labels(labels, 0.4, "asymmetric", 10, torch.Generator().manual_seed(0))
        >>> round(float((given != labels)[labels == 3].float().mean()), 3), float((given != labels).float().mean())
        (0.4, 0.2...)
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"corrupted_labels: rate must lie in [0, 1], got {rate}")
    if noise not in ("none", "uniform", "other", "asymmetric"):
        raise ValueError(f"corrupted_labels: noise must be 'none', 'uniform', 'other' or 'asymmetric', got {noise!r}")
    if noise == "asymmetric" and classes != 10:
        raise ValueError(f"corrupted_labels: 'asymmetric' names classes of CIFAR-10, got classes={classes}")
    given = labels.clone()
    if noise == "uniform":
        chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
        given[chosen] = torch.randint(0, classes, (len(chosen),), generator=generator)
    elif noise != "none":
        for source in range(classes) if noise == "other" else ASYMMETRIC_PAIRS:
            rows = (labels == source).nonzero()[:, 0]
            chosen = rows[torch.randperm(len(rows), generator=generator)[: round(rate * len(rows))]]
            shift = torch.randint(1, classes, (len(chosen),), generator=generator)
            given[chosen] = (source + shift) % classes if noise == "other" else ASYMMETRIC_PAIRS[source]
    return given


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"), ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of arrays, lists and texts. A pickle may name any function to call: these here, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table of images does not need")
        return super().find_class(module, name)


def _read_part(path: Path, layout: _Layout) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            table = _ArraysOnly(file, encoding="bytes").load()
        pixels = np.ascontiguousarray(table[b"data"], dtype=np.uint8)
        images = torch.from_numpy(pixels.reshape(-1, 3, SIDE, SIDE))
        labels = torch.tensor(table[layout.labels], dtype=torch.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise DatasetError(f"{path} is no file of {layout.folder}, or it is damaged: {error}") from error
    if len(images) != len(labels) or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < layout.classes):
        raise DatasetError(
            f"{path} is damaged: {len(images)} images, {len(labels)} labels, which must lie in [0, {layout.classes})"
        )
    return images, labels
