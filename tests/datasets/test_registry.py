"""Data sets: bundled ones load, others say how to get them, damaged ones are refused."""

import gzip

import numpy as np
import pytest

from wellposed.datasets import DatasetError, DatasetNotInstalled, find_dataset, list_datasets, load_dataset
from wellposed.datasets.fetching import check, get_dataset
from wellposed.datasets.readers import read_idx
from wellposed.datasets.registry import is_installed, locate


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1797, 1, 8, 8), 10),
        ("breast-cancer", (569, 30), 2),
        ("wine", (178, 13), 3),
        ("iris", (150, 4), 3),
        ("diabetes", (442, 10), 0),
    ],
)
def test_bundled_sets_load(name, shape, classes):
    data = load_dataset(name)
    assert data.inputs.shape == shape
    assert data.inputs.dtype == np.float32
    assert len(data.classes) == classes


def test_the_others_load_where_they_are_installed():
    for entry in list_datasets():
        if entry.client != "bundled" and is_installed(entry):
            data = load_dataset(entry.name)
            assert len(data.inputs) == len(data.targets)
            assert np.isfinite(data.inputs).all()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def test_a_folder_of_ones_own_is_looked_in_first(tmp_path, monkeypatch):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([1, 0, 2], np.uint8))))
    data = load_dataset("fashion-mnist", root=tmp_path)
    assert data.inputs.shape == (6, 1, 4, 4)
    assert data.targets.tolist() == [1, 0, 2, 1, 0, 2]
    monkeypatch.setenv("WELLPOSED_DATA", str(tmp_path))
    assert locate(find_dataset("fashion-mnist")) == tmp_path


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x-idx3-ubyte"
    path.write_bytes(idx(np.zeros((2, 2), np.uint8))[:-1])
    with pytest.raises(DatasetError, match="its length does not fit its header"):
        read_idx(path)


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("wellposed.datasets.registry.locate", lambda *_: None)
    with pytest.raises(DatasetNotInstalled, match="get it with: wellposed data get mnist"):
        load_dataset("mnist")
    with pytest.raises(DatasetError, match="no data set 'minst'. Did you mean 'mnist'"):
        load_dataset("minst")


def test_getting_needs_rights_only_where_the_system_does(monkeypatch):
    assert get_dataset("digits") == "digits ships with scikit-learn; nothing to get"
    monkeypatch.setattr("wellposed.datasets.fetching.locate", lambda *_: None)
    assert get_dataset("fashion-mnist") == "run as administrator: apt-get install dataset-fashion-mnist"


def test_a_wrong_checksum_is_refused(tmp_path):
    import dataclasses

    entry = dataclasses.replace(find_dataset("mnist"), files=("a",), sha256="0" * 64)
    (tmp_path / "a").write_text("x")
    with pytest.raises(DatasetError, match="has sha256 .*, expected 0000"):
        check(entry, tmp_path)
