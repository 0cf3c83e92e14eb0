"""Cleaning of real text with a recurrent network: mails of which 30 % are marked wrongly, and 100 clean ones.

A tanh recurrent network reads the first 40 words of each mail. Every arm sees the same number of training batches; the
tuners learn one weight for each training mail. A demonstration, not a study: settings were chosen by hand.

Needs the mails: wellposed data get spam-assassin
"""

import sys
import time
from functools import partial

import numpy as np
import torch
from torch import nn

from wellposed import Compose, TensorLoader, fit
from wellposed.datasets import DatasetNotInstalled, find_dataset
from wellposed.datasets.mails import hashed_words, read_mails
from wellposed.datasets.registry import locate
from wellposed.tuning import BOREP, OneStepUnrolled, SampleWeights, clipped_ma_soba
from wellposed.weights import WeightDecay

LENGTH, BUCKETS, WIDTH, HIDDEN = 40, 4096, 32, 64
TRAIN, CLEAN, TEST, FLIPPED, BATCH, EPOCHS = 3000, 100, 1500, 0.3, 100, 40


class Reader(nn.Module):
    """Embedding, tanh recurrent layer, the mean of its states, and two logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, WIDTH, padding_idx=0)
        self.recurrent = nn.RNN(WIDTH, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, words):
        states, _ = self.recurrent(self.embedding(words))
        return self.head(states.mean(1))


def mails(seed):
    entry = find_dataset("spam-assassin")
    folder = locate(entry)
    if folder is None:
        raise DatasetNotInstalled(entry.how_to_get)
    # "Hard ham" looks like spam: those mails would measure something else.
    found = [mail for mail in read_mails(folder) if mail.group != "hard-ham-1"]
    order = np.random.default_rng(seed).permutation(len(found))[: TRAIN + CLEAN + TEST]
    words = torch.from_numpy(hashed_words([found[i].text for i in order], LENGTH, BUCKETS))
    labels = torch.tensor([int(found[i].spam) for i in order])
    return words.split([TRAIN, CLEAN, TEST]), labels.split([TRAIN, CLEAN, TEST])


def area_under_roc(weights, right):
    ranks = weights.argsort().argsort().double() + 1
    count = int(right.sum())
    return float((ranks[right].sum() - count * (count + 1) / 2) / (count * (len(right) - count)))


def main(seeds=3, epochs=EPOCHS):
    torch.set_num_threads(1)
    schedule = {"schedule": "cosine"}
    arms = {
        "noisy labels": None,
        "noisy, early stopped": "stopped",
        "100 clean mails alone": "clean",
        "one unrolled step": partial(OneStepUnrolled, inner_lr=1.0, outer_lr=0.3),
        "MA-SOBA, clipped": partial(clipped_ma_soba, outer_lr=300.0, inner_lr=1.0, z_lr=0.3, clip=1e-3, **schedule),
        "BO-REP": partial(BOREP, outer_lr=1.0, inner_lr=1.0, z_lr=0.3, **schedule),
    }
    print(f"{'arm':<24}{'test error, %':>16}{'AUROC of weights':>20}{'seconds':>10}   ({seeds} seeds)")
    rows = {name: [] for name in arms}
    for seed in range(seeds):
        (words, clean, test), (truth, clean_labels, test_labels) = mails(seed)
        flipped = torch.rand(TRAIN, generator=torch.Generator().manual_seed(seed)) < FLIPPED
        given = torch.where(flipped, 1 - truth, truth)
        for name, tuner in arms.items():
            torch.manual_seed(seed)
            model, weights = Reader(), SampleWeights(TRAIN, init=0.73)
            data = (clean, clean_labels) if tuner == "clean" else (words, given)
            options = {"optimizer": partial(torch.optim.SGD, lr=1.0)}
            validation = TensorLoader(clean, clean_labels, batch_size=CLEAN)
            if tuner == "stopped":
                options |= {"validation": validation, "early_stopping": 10}
            elif callable(tuner):
                options = {"validation": validation, "tuner": tuner}
            started = time.perf_counter()
            count = epochs * (TRAIN // CLEAN) if tuner == "clean" else epochs
            method = Compose(weights, WeightDecay(1e-4)) if callable(tuner) else WeightDecay(1e-4)
            loader = TensorLoader(*data, batch_size=BATCH, shuffle=True)
            model = fit(model, loader, epochs=count, regularizer=method, seed=seed, **options).model
            seconds = time.perf_counter() - started
            with torch.no_grad():
                error = 100 * float((model(test).argmax(1) != test_labels).double().mean())
            found = area_under_roc(weights.weights(), ~flipped) if callable(tuner) else float("nan")
            rows[name].append((error, found, seconds))
    for name, values in rows.items():
        error, area, seconds = np.array(values).T
        print(f"{name:<24}{error.mean():>9.1f} ± {error.std():<4.1f}{area.mean():>20.3f}{np.median(seconds):>10.1f}")


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except DatasetNotInstalled as missing:
        sys.exit(str(missing))
