"""Fingerprints change with the code that a result depends on, and with nothing else."""

import subprocess
import sys
from functools import partial

import pytest

from wellposed.lab import fingerprint as module
from wellposed.lab.fingerprint import commit_of, fingerprint, machine, reachable

LAZY = """
import lazy_loader as lazy
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .first import First as First
    from .second import Second as Second
__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={"first": ["First"], "second": ["Second"]})
"""
FILES = {
    "__init__.py": "",
    "study.py": 'def run():\n    """Doc."""\n    from houselike.room import First\n    return First\n',
    "room/__init__.py": LAZY,
    "room/first.py": "from ..floor import base\nclass First:\n    size = 1  # small\n",
    "room/second.py": "class Second: ...\n",
    "floor.py": "base = 1\n",
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / "houselike" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "houselike"


def taken():
    for function in (module._source, module._tree, module._lazy, module._code):
        function.cache_clear()
    return fingerprint("houselike.study")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("study.py", '"""Doc."""', '"""A better\n\n    explanation."""'),
        ("room/first.py", "# small", "# as small as can be"),
        ("room/second.py", "...", "size = 2"),
        ("room/__init__.py", "import lazy_loader", "# a method that is new\nimport lazy_loader"),
    ],
)
def test_words_and_unrelated_methods_orphan_nothing(house, file, old, new):
    before = taken()
    path = house / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert taken() == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("study.py", "return First", "return First()"),
        ("room/first.py", "size = 1", "size = 2"),
        ("floor.py", "base = 1", "base = 2"),
        ("__init__.py", "", "import os\n"),
    ],
)
def test_code_that_the_study_reaches_counts(house, file, old, new):
    before = taken()
    path = house / file
    path.write_text(path.read_text().replace(old, new) if old else new)
    assert taken() != before


def test_versions_of_torch_and_numpy_count(house, monkeypatch):
    before = taken()
    monkeypatch.setattr(module, "_version", lambda name: "9.9")
    assert taken() != before


def test_nothing_is_imported():
    code = (
        "import sys; from wellposed.lab.fingerprint import fingerprint; fingerprint('wellposed.compare.training'); "
        "assert 'torch' not in sys.modules and 'wellposed.fit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_method_is_followed_to_the_contract_but_not_to_its_neighbours():
    found = reachable(["wellposed.losses.early_learning"])
    assert {"wellposed.losses.early_learning", "wellposed.regularizer", "wellposed.step"} <= found
    assert not found & {"wellposed.losses.mixup", "wellposed.losses.robust", "wellposed.losses"}


def test_objects_stand_for_the_module_that_defines_them():
    expected = fingerprint("wellposed.lab.fingerprint")
    assert fingerprint(machine) == fingerprint(partial(machine)) == fingerprint(module) == expected
    with pytest.raises(ValueError, match=r"'wellposed.nowhere' is no module with a Python source file"):
        fingerprint("wellposed.nowhere")


def test_the_commit_is_recorded_where_there_is_one(tmp_path):
    assert commit_of(tmp_path) is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(tmp_path)]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    clean = commit_of(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("new")
    assert commit_of(tmp_path / "file") == clean + "+"


def test_the_machine_is_described_without_naming_it():
    found = machine()
    assert set(found) == {"cores", "memory_gib", "platform", "python", "torch", "numpy", "wellposed"}
    assert found["cores"] >= 1
