"""What the commands `compare` and `tune` share: words that they read alike, and the command line for the report."""

from __future__ import annotations

import os
import shlex
import sys
from enum import StrEnum

import typer


class Engine(StrEnum):
    """How trainings run."""

    loky = "loky"
    serial = "serial"


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "1.5h".

    Raises:
        typer.BadParameter: for anything else.

    Example:
        >>> parse_duration("10m"), parse_duration("90s")
        (600.0, 90.0)
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(text[-1:].lower())
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise typer.BadParameter(f"--budget must read like 90s, 10m or 1h, got '{text}'") from None
    if not 0 < seconds < float("inf"):
        raise typer.BadParameter(f"--budget must be positive, got '{text}'")
    return seconds


def parse_names(text: str | None) -> list[str] | None:
    """Names between commas; None where nothing was given.

    Example:
        >>> parse_names("elr, mixup,"), parse_names(None)
        (['elr', 'mixup'], None)
    """
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line() -> str:
    """The command as it was typed, for the report."""
    return shlex.join(["wellposed", *sys.argv[1:]])
