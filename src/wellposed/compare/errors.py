"""Errors that a user can mend: one line each, before any training."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command prints it in one line and exits with 2."""


def suggestion(wanted: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", or nothing where no name is near.

    Example:
        >>> suggestion("churn", ["churned", "age"])
        " Did you mean 'churned'?"
    """
    near = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
