"""What all pages have in common: where they are written, and how they begin."""

from __future__ import annotations

from pathlib import Path

from ..lab.files import write_atomically

KINDS = {1: "better", 0: "within-noise", -1: "worse"}
"""Style of a line by its verdict."""


def write_page(page: str, folder: str | Path) -> Path:
    """Write index.html.

    Returns:
        Its path.

    Raises:
        WriteError: if it cannot be written; an older page is intact.
    """
    return write_atomically(Path(folder) / "index.html", page)


def split_answer(text: str) -> tuple[str, str]:
    """The first sentence, which stands large, and those after it.

    Example:
        >>> split_answer("It helps. It costs nothing."), split_answer("It helps.")
        (('It helps.', 'It costs nothing.'), ('It helps.', ''))
    """
    first, _, more = text.partition(". ")
    return first if not more else f"{first}.", more
