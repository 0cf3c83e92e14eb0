"""Whether the first word of `wellposed tune` names data or a paper's study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...datasets.registry import DatasetError, find_dataset, list_datasets
from ...papers.catalogue import UnknownPaper, find_card, load_cards
from ..errors import UserError, suggestion


def study_slug(word: str) -> str | None:
    """The slug of the paper that a word names, or None where it names data: a file, a folder, or a data set.

    Raises:
        UserError: for a word that is neither, with what is near in both.

    Example:
        >>> study_slug("digits"), study_slug("ELR"), study_slug("absent.csv")
        (None, 'elr', None)
        >>> study_slug("digitz")
        Traceback (most recent call last):
        wellposed.compare.errors.UserError: no file, no data set and no study 'digitz'. Did you mean 'digits'? ...
    """
    path = Path(word)
    if not word or path.exists() or path.suffix or "/" in word:
        return None
    try:
        find_dataset(word)
        return None
    except DatasetError:
        pass
    try:
        return find_card(word).slug
    except UnknownPaper:
        studies = {alias.lower(): card.slug for card in load_cards().values() if card.protocol
                   for alias in (*card.acronyms, card.slug)}  # fmt: skip
        here = [entry.name for entry in Path().iterdir() if not entry.name.startswith(".")]
        raise UserError(
            f"no file, no data set and no study '{word}'.{_near(word, here, studies)} Data sets: wellposed data list. "
            "Studies: wellposed papers"
        ) from None


def _near(word: str, here: list[str], studies: Mapping[str, str]) -> str:
    """What resembles a word among data and among studies."""
    data = suggestion(word, [*(entry.name for entry in list_datasets()), *here])
    study = suggestion(word.lower(), studies)
    if study:
        alias = study.split("'")[1]
        study = study.replace(f"'{alias}'", f"'{studies[alias]}'")
    if data and study:
        return f"{data[:-1]}, or the study {study.split()[-1]}"
    return data or study.replace("mean '", "mean the study '")


def refuse_options(word: str, given: Mapping[str, Any], kind: str, instead: Mapping[str, str]) -> None:
    """Refuse options that do not apply.

    Args:
        word: what is tuned.
        given: values by option, None or False where it was not given.
        kind: "data" or "a study": what the options are for.
        instead: what to take in the place of some.

    Raises:
        UserError: naming the first of them.

    Example:
        >>> refuse_options("elr", {"--trials": 4}, "data", {"--trials": "--rounds"})
        Traceback (most recent call last):
        wellposed.compare.errors.UserError: --trials is for data, and 'elr' is a study: take --rounds
    """
    for name, value in given.items():
        if value not in (None, False, [], 0.0):
            other = "a study" if kind == "data" else "data"
            hint = f": take {instead[name]}" if name in instead else ""
            raise UserError(f"{name} is for {kind}, and '{word}' is {other}{hint}")
