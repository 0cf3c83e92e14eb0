"""Search spaces, as cards and arms write them in TOML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .trial import Setting


@dataclass(frozen=True)
class Range:
    """Numbers between `low` and `high`, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    default: Setting | None = None

    def middle(self) -> Setting:
        """The default, or the middle of the range on its scale."""
        if self.default is not None:
            return self.default
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(value) if self.integer else value


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    choices: tuple[Setting, ...]
    default: Setting | None = None

    def middle(self) -> Setting:
        """The default, or the first choice."""
        return self.choices[0] if self.default is None else self.default


Space = Mapping[str, Range | Choice]


def parse_space(table: Mapping[str, Any], owner: str = "search") -> dict[str, Range | Choice]:
    """Read a search space as cards write it.

    Args:
        table: `{"strength": {"low": 0.5, "high": 10, "log": True}, "momentum": {"choices": [0.7, 0.9]}}`, each
            optionally with `default`, ranges with `integer`.
        owner: named in errors.

    Raises:
        ValueError: naming the entry that is wrong, and what is allowed.

    Example:
        >>> parse_space({"q": {"low": 0.3, "high": 0.9}})["q"]
        Range(low=0.3, high=0.9, log=False, integer=False, default=None)
        >>> parse_space({"q": {"low": 0.9, "high": 0.3}}, "gce")
        Traceback (most recent call last):
        ValueError: gce: q: needs choices, or low < high; got {'low': 0.9, 'high': 0.3}
    """
    return {name: _parse(entry, f"{owner}: {name}") for name, entry in table.items()}


def _parse(entry: Any, where: str) -> Range | Choice:
    allowed = {"choices", "default"} if isinstance(entry, Mapping) and "choices" in entry else _RANGE
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where}: must be a table like {{low = 0.1, high = 1.0}} or {{choices = [1, 2]}}, got {entry!r}"
        )
    if set(entry) - allowed:
        raise ValueError(f"{where}: unknown {sorted(set(entry) - allowed)}; allowed keys: {sorted(allowed)}")
    return _choice(entry, where) if "choices" in entry else _range(entry, where)


def _choice(entry: Mapping[str, Any], where: str) -> Choice:
    choices = entry["choices"]
    if (
        not isinstance(choices, (list, tuple))
        or not choices
        or ("default" in entry and entry["default"] not in choices)
    ):
        raise ValueError(f"{where}: choices must hold at least one value, and the default; got {entry}")
    if not all(isinstance(choice, (str, bool, int, float)) for choice in choices):
        raise ValueError(f"{where}: choices must be texts, numbers or truth values; got {choices}")
    return Choice(tuple(choices), entry.get("default"))


def _range(entry: Mapping[str, Any], where: str) -> Range:
    for name in ("log", "integer"):
        if not isinstance(entry.get(name, False), bool):
            raise ValueError(f"{where}: {name} must be true or false, got {entry[name]!r}")
    for name in ("low", "high", "default"):
        if name in entry and not _is_number(entry[name]):
            raise ValueError(f"{where}: {name} must be a finite number, got {entry[name]!r}")
        if entry.get("integer") and name in entry and entry[name] != int(entry[name]):
            raise ValueError(f"{where}: {name} must be an integer, got {entry[name]!r}")
    if "low" not in entry or "high" not in entry or not entry["low"] < entry["high"]:
        raise ValueError(f"{where}: needs choices, or low < high; got {dict(entry)}")
    if entry.get("log") and entry["low"] <= 0:
        raise ValueError(f"{where}: low must be > 0 on a logarithmic scale, got {entry['low']}")
    default = entry.get("default")
    if default is not None and not entry["low"] <= default <= entry["high"]:
        raise ValueError(f"{where}: default must lie in [{entry['low']}, {entry['high']}], got {default}")
    return Range(**entry)


_RANGE = {"low", "high", "log", "integer", "default"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
