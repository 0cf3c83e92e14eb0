"""ELR inside a real training step with 1,000 classes, against plain cross-entropy: pairs in turn, one process."""

import statistics
import time

import torch
from torch import nn

from wellposed.losses import EarlyLearning

CLASSES, BATCH, PAIRS, STEPS = 1000, 64, 81, 1


def network():
    """A small convolutional network with a wide head: about 2 million parameters."""
    torch.manual_seed(0)
    widths = [3, 64, 128, 256]
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, 32, 32, generator=generator)
    targets = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    index = torch.randperm(50_000, generator=generator)[:BATCH]
    elr = EarlyLearning(50_000, CLASSES)
    losses = {
        "cross-entropy": lambda logits: nn.functional.cross_entropy(logits, targets),
        "ELR": lambda logits: elr(logits, targets, index),
    }
    models = {name: network() for name in losses}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for name, model in models.items()}

    def seconds(name):
        started = time.perf_counter()
        for _ in range(STEPS):
            optimizers[name].zero_grad()
            losses[name](models[name](inputs)).backward()
            optimizers[name].step()
        return (time.perf_counter() - started) / STEPS

    for name in losses:
        seconds(name)
    times = {name: [] for name in losses}
    for pair in range(PAIRS):
        for name in list(losses) if pair % 2 else list(losses)[::-1]:
            times[name].append(seconds(name))
    ratios = [a / b for a, b in zip(times["ELR"], times["cross-entropy"], strict=True)]
    for name, values in times.items():
        print(f"{name:<14} median {1e3 * statistics.median(values):7.2f} ms a step of {BATCH}, {CLASSES} classes")
    low, high = sorted(ratios)[31], sorted(ratios)[-32]  # 95 % for the median of 81 pairs
    print(
        f"ELR / cross-entropy: median {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}], {PAIRS} pairs of {STEPS} steps"
    )


if __name__ == "__main__":
    main()
