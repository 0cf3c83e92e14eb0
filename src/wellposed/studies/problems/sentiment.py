"""Sentiment140, tweets marked by their emoticons, as sequences of GloVe vectors; read from the user's own files."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...datasets.mails import words
from ...datasets.registry import ENVIRONMENT, DatasetError, DatasetNotInstalled

TRAIN_FILE, TEST_FILE = "training.1600000.processed.noemoticon.csv", "testdata.manual.2009.06.14.csv"
GLOVE_FILE, GLOVE_WIDTH = "glove.840B.300d.txt", 300


@dataclass(frozen=True)
class Tweets:
    """One draw of the problem: word numbers (tweets, length), 0 behind the end; labels 0 or 1.

    Attributes:
        vectors: one row a word number; row 0 is zero.
        train, labels: with wrong labels.
        wrong: which of them were flipped.
        validation, validation_labels: clean.
        test, test_labels: clean; the file of tweets that were read by people.
    """

    vectors: Float[Tensor, "words width"]
    train: Int[Tensor, "train length"]
    labels: Int[Tensor, " train"]
    wrong: Bool[Tensor, " train"]
    validation: Int[Tensor, "validation length"]
    validation_labels: Int[Tensor, " validation"]
    test: Int[Tensor, "test length"]
    test_labels: Int[Tensor, " test"]


def sentiment_files() -> list[Path]:
    """The three files, in the folder that WELLPOSED_DATA names.

    Raises:
        DatasetNotInstalled: naming what is missing and where it was looked for.
    """
    base = os.environ.get(ENVIRONMENT)
    wanted = [TRAIN_FILE, TEST_FILE, GLOVE_FILE]
    where = f"the folder that the environment variable {ENVIRONMENT} names"
    if not base:
        raise DatasetNotInstalled(
            f"Sentiment140 and GloVe need {', '.join(wanted)} in {where}, which is not set. Nothing is downloaded"
        )
    missing = [name for name in wanted if not (Path(base) / name).is_file()]
    if missing:
        raise DatasetNotInstalled(
            f"Sentiment140 and GloVe: {', '.join(missing)} not found in {base}, {where}. Nothing is downloaded"
        )
    return [Path(base) / name for name in wanted]


def read_tweets(path: Path) -> tuple[list[str], np.ndarray]:
    """Texts and labels of a file of Sentiment140: polarity 0 or 4 in the first column, the text in the last.

    Raises:
        DatasetError: for a row of another form, naming it.
    """
    texts, labels = [], []
    with path.open(encoding="latin-1", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) != 6 or row[0] not in ("0", "2", "4"):
                raise DatasetError(f"{path.name}: row {number} is no tweet of Sentiment140")
            if row[0] != "2":  # neutral ones, in the test file alone
                texts.append(row[5])
                labels.append(int(row[0] == "4"))
    return texts, np.array(labels, np.int64)


def read_vectors(path: Path, wanted: set[str]) -> tuple[dict[str, int], Tensor]:
    """GloVe's vectors of the words that occur; numbers from 1, row 0 is zero.

    Raises:
        DatasetError: if no word was found.
    """
    numbers: dict[str, int] = {}
    rows = [np.zeros(GLOVE_WIDTH, np.float32)]
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            word, _, rest = line.partition(" ")
            if word in wanted and word not in numbers:
                vector = np.array(rest.split(), np.float32)
                if len(vector) == GLOVE_WIDTH:  # some words of this file hold spaces
                    numbers[word] = len(rows)
                    rows.append(vector)
    if not numbers:
        raise DatasetError(f"{path.name}: none of the tweets' words was found")
    return numbers, torch.from_numpy(np.stack(rows))


def noisy_tweets(seed: int, rate: float, validation: int, length: int) -> Tweets:
    """Read, split and corrupt.

    Args:
        seed: re-draws the clean validation part and the flipped labels.
        rate: share of training labels that are flipped.
        validation: clean examples, taken from the training file.
        length: words that are read of each tweet.
    """
    train_file, test_file, glove = sentiment_files()
    texts, labels = read_tweets(train_file)
    test_texts, test_labels = read_tweets(test_file)
    tokens, test_tokens = ([words(text)[:length] for text in part] for part in (texts, test_texts))
    numbers, vectors = read_vectors(glove, {word for part in (tokens, test_tokens) for text in part for word in text})
    inputs, test = (_numbered(part, numbers, length) for part in (tokens, test_tokens))
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    clean, rest = order[:validation], order[validation:]
    wrong = np.zeros(len(rest), bool)
    wrong[generator.permutation(len(rest))[: round(rate * len(rest))]] = True
    given = torch.from_numpy(np.where(wrong, 1 - labels[rest], labels[rest]))
    return Tweets(
        vectors, inputs[rest], given, torch.from_numpy(wrong),
        inputs[clean], torch.from_numpy(labels[clean]), test, torch.from_numpy(test_labels),
    )  # fmt: skip


def _numbered(tokens: Sequence[Sequence[str]], numbers: dict[str, int], length: int) -> Tensor:
    found = np.zeros((len(tokens), length), np.int64)
    for row, text in zip(found, tokens, strict=True):
        known = [numbers[word] for word in text if word in numbers]
        row[: len(known)] = known
    return torch.from_numpy(found)
