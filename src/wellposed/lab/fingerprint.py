"""Fingerprints: results belong to the code and the versions that made them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import platform
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VERSIONS = ("torch", "numpy")


def fingerprint(*modules: str | object, package: str = "wellposed", without: Sequence[str] = ()) -> str:
    """Hash of the modules named, of all that they import from the package and from their own packages, and of torch
    and numpy's versions.

    Modules are found by their files: nothing is imported. Comments, docstrings and blank lines do not count, nor do
    the `__init__` files that only load names lazily: a better explanation, a page of documentation or a method that
    is new beside the others orphans no result.

    Args:
        modules: importable names, e.g. "wellposed.compare.training", or objects (functions, classes, modules), which
            stand for the module that defines them.
        package: whose modules are followed, beside the packages of `modules`.
        without: packages that no result depends on, although they are imported: they do not count.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: for a name without a Python source file.

    Example:
        >>> from wellposed.lab.trial import Trial
        >>> fingerprint(Trial) == fingerprint("wellposed.lab.trial")
        True
    """
    names = [_module_name(module) for module in modules]
    for name in names:
        if _source(name) is None:
            raise ValueError(f"fingerprint: {name!r} is no module with a Python source file")
    digest = hashlib.sha256()
    for name in sorted(reachable(names, package, without)):
        path = _source(name)
        if path is not None and not _lazy(path):
            digest.update(name.encode() + b"\0" + _code(path).encode() + b"\0")
    for name in _VERSIONS:
        digest.update(f"{name}={_version(name)}\n".encode())
    return digest.hexdigest()[:16]


def reachable(modules: list[str], package: str = "wellposed", without: Sequence[str] = ()) -> set[str]:
    """Names of the modules that `modules` import, directly or not, within the package and their own packages.

    Example:
        >>> sorted(reachable(["wellposed.lab.worker"]))
        ['wellposed.lab.memory', 'wellposed.lab.trial', 'wellposed.lab.worker']
    """
    followed = {package, *(name.split(".")[0] for name in modules)}
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        left_out = any(name == part or name.startswith(f"{part}.") for part in without)
        if name not in found and not left_out and _source(name) is not None:
            found.add(name)
            waiting.append(name.rpartition(".")[0] or name)  # its package's __init__ runs, too
            waiting.extend(n for n in _imports(name) if n.split(".")[0] in followed)
    return {name for name in found if not _lazy(_source(name))}


def _module_name(module: str | object) -> str:
    if isinstance(module, str):
        return module
    while hasattr(module, "func"):  # functools.partial
        module = module.func
    # A function is described by where it is defined, a module by itself.
    return str(getattr(module, "__module__", None) or getattr(module, "__name__", module))


@cache
def _source(name: str) -> Path | None:
    """The file of a module. Only the top package is looked up by Python: to look up "a.b.c" would import "a.b"."""
    top, *rest = name.split(".")
    module = sys.modules.get(top)
    origin = getattr(module, "__file__", None)
    if origin is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        origin = spec.origin if spec is not None else None
    if origin is None or not origin.endswith(".py"):
        return None
    if not rest:
        return Path(origin)
    if Path(origin).name != "__init__.py":
        return None
    base = Path(origin).parent.joinpath(*rest)
    candidates = (base / "__init__.py", base.with_name(base.name + ".py"))
    return next((path for path in candidates if path.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _imports(name: str) -> set[str]:
    """Modules that the source of `name` imports, wherever in the file, and not only for a type checker."""
    path = _source(name)
    assert path is not None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    lazy = _lazy(path)
    found: set[str] = set()
    for node in _executed(_tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not lazy:
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                found.update(_providers(base, alias.name))
    return found


def _providers(base: str, name: str) -> set[str]:
    """Modules that `from base import name` runs: a submodule, a lazy package's module for that name, or base."""
    path = _source(base)
    if path is None:
        return set()
    if _source(f"{base}.{name}") is not None:
        return {base, f"{base}.{name}"}
    if _lazy(path):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                if any(name in (alias.name, alias.asname) for alias in node.names):
                    return {f"{base}.{node.module}"}
    return {base}


@cache
def _lazy(path: Path | None) -> bool:
    """Whether a package only loads names lazily: what runs then is the module that holds the name."""
    return path is not None and path.name == "__init__.py" and "lazy.attach(" in path.read_text("utf-8")


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _executed(node)


@cache
def _code(path: Path) -> str:
    """Source without comments, docstrings and blank lines, the same for every version of Python."""
    lines = path.read_text("utf-8").splitlines()
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node) and first and first.end_lineno and first.lineno > getattr(node, "lineno", 0):
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


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
