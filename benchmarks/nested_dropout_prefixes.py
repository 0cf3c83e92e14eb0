"""Accuracy of all 512 prefixes at once against one masked pass each; and the layer's price beside torch's dropout."""

import statistics
import time

import torch
from torch import nn

from wellposed.features import NestedDropout, prefix_accuracy

FEATURES, CLASSES, BATCH, PAIRS = 512, 100, 128, 21


def looped(features, labels, head):
    """What a user writes first: for every k, mask and classify."""
    found = []
    for k in range(1, FEATURES + 1):
        masked = features.clone()
        masked[:, k:] = 0
        found.append((head(masked).argmax(1) == labels).float().mean())
    return torch.stack(found)


def alternating(first, second, repeats):
    """Median seconds of both and the ratios second / first, measured in turn."""
    times = ([], [])
    for pair in range(PAIRS + 1):
        for which in (0, 1) if pair % 2 else (1, 0):
            started = time.perf_counter()
            for _ in range(repeats):
                (first, second)[which]()
            if pair:  # the first pair warms up
                times[which].append((time.perf_counter() - started) / repeats)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratios


def report(what, names, measured):
    one, other, ratios = measured
    low, high = ratios[5], ratios[-6]  # 97 % for the median of 21 pairs
    print(
        f"{what}: {names[0]} {1e3 * one:.3f} ms, {names[1]} {1e3 * other:.3f} ms, ratio {statistics.median(ratios):.2f} "
        f"[{low:.2f}, {high:.2f}], {PAIRS} pairs"
    )


@torch.no_grad()
def prefixes():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, FEATURES, generator=generator).relu()
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    head = nn.Linear(FEATURES, CLASSES)
    difference = (prefix_accuracy(features, labels, head) - looped(features, labels, head)).abs().max()
    assert float(difference) <= 1 / BATCH, "a tie that rounding breaks may move one example, no more"
    measured = alternating(
        lambda: prefix_accuracy(features, labels, head), lambda: looped(features, labels, head), repeats=1
    )
    report(f"{FEATURES} prefixes, {CLASSES} classes, {BATCH} examples", ("running sums", "loop"), measured)


def layer():
    features = torch.randn(BATCH, FEATURES, requires_grad=True)
    nested, dropout = NestedDropout(FEATURES), nn.Dropout(0.5)

    def step(module):
        features.grad = None
        module(features).sum().backward()

    measured = alternating(lambda: step(dropout), lambda: step(nested), repeats=100)
    report(f"forward and backward, {BATCH} x {FEATURES}", ("nn.Dropout", "NestedDropout"), measured)


def main():
    torch.set_num_threads(1)
    prefixes()
    layer()


if __name__ == "__main__":
    main()
