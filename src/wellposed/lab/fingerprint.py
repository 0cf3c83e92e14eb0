"""Fingerprints: results belong to the code and the versions that made them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VERSIONS = ("torch", "numpy")


def fingerprint(*modules: str, package: str = "wellposed") -> str:
    """Hash of the modules named, of the package's modules that they import (found without importing), and of torch
    and numpy's versions. A change in documentation, tests or an unrelated method orphans no result.

    Args:
        modules: importable names, e.g. "wellposed.compare.training".
        package: whose modules are followed.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> fingerprint("wellposed.lab.trial") == fingerprint("wellposed.lab.trial")
        True
    """
    digest = hashlib.sha256()
    for name in sorted(_reachable(modules, package)):
        path = _source(name)
        if path is not None:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    for name in _VERSIONS:
        digest.update(f"{name}={_version(name)}\n".encode())
    return digest.hexdigest()[:16]


def _reachable(modules: tuple[str, ...], package: str) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or _source(name) is None:
            continue
        found.add(name)
        waiting.extend(n for n in _imports(name) if n.split(".")[0] == package)
    return found


@cache
def _source(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _imports(name: str) -> set[str]:
    path = _source(name)
    assert path is not None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found.add(base)
            # `from . import losses` names a module, `from .losses import EarlyLearning` does not.
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def commit_of(path: str | Path) -> str | None:
    """The git commit of the tree that holds `path`, marked "+" if the tree has changes; None without git."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        run = ["git", "-C", str(folder)]
        commit = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """What a result ran on: cores, memory, platform and versions; nothing that names the machine or its user."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = None
    return {
        "cores": os.cpu_count(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_VERSIONS, "wellposed")},
    }
