"""The project itself: light imports, documented names, one version."""

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import wellposed

ROOT = Path(__file__).parents[1]
ROOMS = ["losses", "weights", "features", "gradients", "numerics", "lab", "compare", "papers", "datasets"]


def test_importing_the_package_and_asking_for_help_does_not_import_torch():
    for code in ("import wellposed", "import wellposed.losses, wellposed.lab"):
        done = subprocess.run([sys.executable, "-c", f"import sys; {code}; assert 'torch' not in sys.modules"])
        assert done.returncode == 0
    script = "import sys, runpy; sys.argv = ['wellposed', '--help']\ntry: runpy.run_module('wellposed.cli', run_name='__main__')\nexcept SystemExit as s: assert s.code == 0\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_every_public_name_loads_and_is_documented():
    for name in wellposed.__all__:
        assert getattr(wellposed, name).__doc__, name
    for room in ROOMS:
        module = importlib.import_module(f"wellposed.{room}")
        assert module.__doc__
        for name in module.__all__:
            found = getattr(module, name)
            assert found.__doc__, f"{room}.{name}"


def test_every_module_has_a_docstring():
    for info in pkgutil.walk_packages(wellposed.__path__, "wellposed."):
        if info.name != "wellposed.cli":
            assert importlib.import_module(info.name).__doc__, info.name


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == wellposed.__version__
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_make_help_lists_all_targets():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in phony:
        assert f"make {target}" in out, target


def test_an_old_python_is_refused_in_one_sentence(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *) echo 3.9.1;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["scripts/setup.sh", "lab"], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHON": str(old), "VENV": str(tmp_path / "venv"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: wellposed needs Python 3.11 or newer, but")
    assert "3.9.1" in done.stderr
    assert not (tmp_path / "venv").exists()
