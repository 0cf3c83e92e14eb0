"""Reading the catalogue's TOML files into dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def card_files() -> list[Path]:
    """All TOML files of the catalogue."""
    folder = Path(str(files(__package__)))
    return sorted(folder.glob("*.toml"))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ValueError: naming the file, if it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error


def build(kind: type[T], entry: dict[str, Any], where: str) -> T:
    """A dataclass from a table; lists become tuples.

    Raises:
        ValueError: naming `where`, for a key that is unknown or missing.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(entry) - set(fields)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(fields)}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in entry]:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
