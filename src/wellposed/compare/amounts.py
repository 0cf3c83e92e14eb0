"""Checks of numbers that every command takes: how many, and for how long."""

from __future__ import annotations

from .errors import UserError


def check_amounts(*amounts: tuple[str, int | None, int]) -> None:
    """Check options that are whole numbers.

    Args:
        amounts: name of the option, its value (None where it was not given), and the least allowed.

    Raises:
        UserError: naming the first that is too small.

    Example:
        >>> check_amounts(("--seeds", 6, 2), ("--epochs", None, 1), ("--workers", 0, 1))
        Traceback (most recent call last):
        wellposed.compare.errors.UserError: --workers must be at least 1, got 0
    """
    for name, value, least in amounts:
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")


def check_budget(seconds: float | None) -> None:
    """Check a wall-clock limit.

    Raises:
        UserError: if it is not positive.

    Example:
        >>> check_budget(-1.0)
        Traceback (most recent call last):
        wellposed.compare.errors.UserError: --budget must be positive, got -1 s
    """
    if seconds is not None and seconds <= 0:
        raise UserError(f"--budget must be positive, got {seconds:g} s")
